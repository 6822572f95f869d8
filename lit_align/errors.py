"""The error whose message is written for the user."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can put right; the message gives the value, the place, the accepted range and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """


class Stopped(KeyboardInterrupt):
    """A run ended on a signal, in order: its state is in the newest checkpoint.

    Args:
        signal: The signal's number; the exit code is 128 more.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal
