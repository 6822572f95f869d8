"""The error whose message is written for the user."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can put right; the message gives the value, the place, the accepted range and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """
