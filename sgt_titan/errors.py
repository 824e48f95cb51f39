"""The one exception a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: which file or key, what is wrong, what would be right, in one line.

    Entry points print the message and exit with code 2; nothing has been written by then. Anything
    else that escapes is a defect of ours and keeps its traceback.
    """
