"""Reading one file that may be broken: every failure of a decoder becomes a short reason."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from mmssl.data import inline
from mmssl.data.fragment import file_of

T = TypeVar("T")

_TRUNCATED = re.compile(r"truncat|(premature|unexpected) end|end of file", re.IGNORECASE)
_LONGEST = 160
"""Characters of a foreign message that are kept: a ledger line should stay one line on a screen."""


class BrokenFile(Exception):
    """A file that cannot be decoded; ``reason`` is one clause such as "truncated" or "empty file"."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _TimedOut(BaseException):
    # Not an Exception: decoders that catch those must not catch this.
    pass


def guarded(decode: Callable[[str], T], path: str, timeout: float | None) -> T:
    """Return ``decode(path)``; raises BrokenFile(reason) whatever goes wrong in it.

    A decoder that is still at work after ``timeout`` seconds is interrupted, which takes SIGALRM and the main thread of
    the process (a data worker has both); elsewhere, or with None, there is no limit but that of a ``guarded`` around
    this one, whose interruption passes through. A decoder that never comes back from C code cannot be interrupted this
    way. KeyboardInterrupt and SystemExit pass through.
    """
    try:
        with _time_limit(timeout):
            return decode(path)
    except BrokenFile:
        raise
    except _TimedOut:
        if timeout is None:
            raise
        raise BrokenFile(f"timed out after {timeout:g} s") from None
    except Exception as error:
        raise BrokenFile(_reason(error, path)) from error


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    in_main_thread = threading.current_thread() is threading.main_thread()
    if seconds is None or not in_main_thread or not hasattr(signal, "setitimer"):
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise _TimedOut

    start = time.monotonic()
    handler = signal.signal(signal.SIGALRM, interrupt)
    # Whoever had set an alarm (a test runner, an outer limit) gets back what is left of it.
    pending, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, handler)
        if pending:
            signal.setitimer(signal.ITIMER_REAL, max(pending - (time.monotonic() - start), 1e-3), interval)


def _reason(error: Exception, path: str) -> str:
    # The file is asked after the failure, not before: decoders report a missing or an empty file in many words.
    if isinstance(error, MemoryError):
        return "too large to decode"
    if isinstance(error, PermissionError):
        return "permission denied"
    if inline.text(path) is not None:
        return _clause(error, path)
    file = file_of(path)
    try:
        if os.path.isdir(file):  # noqa: PTH112 (paths are strings here, a million of them)
            return "is a folder"
        if os.stat(file).st_size == 0:  # noqa: PTH116
            return "empty file"
    except FileNotFoundError:
        return "no such file"
    except OSError as fault:
        return f"cannot be read: {fault.strerror}"
    if isinstance(error, EOFError) or _TRUNCATED.search(str(error)):
        return "truncated"
    return _clause(error, path)


def _clause(error: Exception, path: str) -> str:
    lines = str(error).strip().splitlines()
    message = (
        lines[0].replace(repr(path), "").replace(path, "").replace(file_of(path), "").strip()[:_LONGEST].strip()
        if lines
        else ""
    )
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
