"""Commands that train and evaluate many exports, and what is drawn and printed of them all."""
