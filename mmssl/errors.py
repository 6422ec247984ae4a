"""What can go wrong, with the exit code that the command line gives it, and the nearest valid spelling."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out: torch has a type for it on GPUs, and only words on CPUs."""
    words = ("can't allocate memory", "CUDA out of memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the closest valid spelling, else the list of valid ones if it is short."""
    options = sorted(valid)
    lower = {option.lower(): option for option in options}
    close = get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{lower[close[0]]}'?"
    return f"; valid: {', '.join(options)}" if 0 < len(options) <= LISTED else ""


def sibling(path: Path) -> str:
    """Return "; did you mean 'x'?" for a path that does not exist, from what is beside it, or nothing."""
    # The first part of the path that is missing is the one that is misspelt.
    while not path.parent.exists():
        path = path.parent
    try:
        hint = nearest(path.name, (entry.name for entry in path.parent.iterdir()))
    except OSError:
        return ""
    return hint if hint.startswith("; did you mean") else ""  # a folder's whole contents would not help
