"""``results.json`` for people: the terminal, figures, one HTML page. Reads a plain dict and measures nothing.

Every key of the dict may be missing: a suite leaves things out.
"""
