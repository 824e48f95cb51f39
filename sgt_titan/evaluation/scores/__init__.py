"""What a mechanism costs and what a guess is worth: one file a score, with its zero and its yardsticks."""
