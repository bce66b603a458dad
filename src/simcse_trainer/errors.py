"""The one exception for everything a user can correct."""

from __future__ import annotations


class InputError(ValueError):
    """What was expected, what was found (value, file, column, row) and what to do, in one line.

    The command line prints it without a traceback and ends with status 2.
    """
