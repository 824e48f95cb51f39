"""The cluster's half: a plugin over torchtitan 0.3.0. The only folder that imports it."""

from .lean import spare

spare()
