"""Puts rows, mechanisms, attacks and scores together: the commands that measure an export."""
