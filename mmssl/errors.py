"""What can go wrong, with the exit code that the command line gives it, and the nearest valid spelling."""

from collections.abc import Iterable
from difflib import get_close_matches

LISTED = 20
"""Up to so many valid spellings are listed where none is close."""


class MmsslError(Exception):
    """Something that a person should read as one sentence, without a traceback. Exit code 1."""

    exit_code = 1


class UserError(MmsslError, ValueError):
    """The user's mistake: a bad path, key or value. Exit code 2. Every rank finds it, so only rank 0 prints it."""

    exit_code = 2


class UnusableData(MmsslError):
    """Files are there but cannot be used: too many broken in training, one broken in evaluation. Exit code 3."""

    exit_code = 3


class NonFiniteLoss(MmsslError):
    """The loss became NaN or infinite. Exit code 1."""


class Stopped(MmsslError):
    """SIGINT or SIGTERM arrived; a checkpoint was written. Exit code 130 or 143."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the closest valid spelling, else the list of valid ones if it is short."""
    options = sorted(valid)
    lower = {option.lower(): option for option in options}
    close = get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{lower[close[0]]}'?"
    return f"; valid: {', '.join(options)}" if 0 < len(options) <= LISTED else ""
