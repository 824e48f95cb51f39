"""Samples: where rows come from, how they become tokens, and which of them make up a step."""
