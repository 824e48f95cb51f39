"""Imported once by the fork server of ``launch.py``, which drops errors of what it preloads unless they are told."""

import launch

launch.preload()
