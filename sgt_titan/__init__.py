"""Train, export and use Stained Glass Transforms (arXiv 2506.09452)."""

__version__ = "0.1.0"
