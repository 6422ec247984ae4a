"""Reading one file that may be broken: every failure of a decoder becomes a short reason."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import TypeVar

from mmssl.data import inline
from mmssl.data.broken import BrokenFile
from mmssl.data.fragment import file_of
from mmssl.data.local import fetcher, local

__all__ = ["BrokenFile", "guarded"]

T = TypeVar("T")

_TRUNCATED = re.compile(r"truncat|(premature|unexpected) end|end of file", re.IGNORECASE)
_LATER = 0.01
"""Seconds after which an interruption that came at a bad moment comes again."""
_whole: list[None] = []
"""Not empty while nothing may be interrupted."""
_LONGEST = 160
"""Characters of a foreign message that are kept: a ledger line should stay one line on a screen."""


class _TimedOut(BaseException):
    # Not an Exception: decoders that catch those must not catch this.
    pass


def guarded(decode: Callable[[str], T], path: str, timeout: float | None) -> T:
    """Return ``decode`` of a path, or of a file made for it where it is none of this machine (``mmssl.data.local``).

    All decoding comes through here. Raises BrokenFile(reason) whatever goes wrong in it. A decoder that is still at
    work after ``timeout`` seconds is interrupted, which takes SIGALRM and the main thread of the process (a data worker
    has both); elsewhere, or with None, there is no limit but that of a ``guarded`` around this one, whose interruption
    passes through. A decoder that never comes back from C code cannot be interrupted this way. KeyboardInterrupt and
    SystemExit pass through.
    """
    file = path
    with ExitStack() as made:  # what was made is taken away outside of the limit, which must not cut that short
        try:
            with _time_limit(timeout):
                file = made.enter_context(local(path))
                return decode(file)
        except BrokenFile:
            raise
        except _TimedOut:
            if timeout is None:
                raise
            raise BrokenFile(f"timed out after {timeout:g} s") from None
        except Exception as error:
            raise BrokenFile(_reason(error, file)) from error


@contextmanager
def as_a_whole() -> Iterator[None]:
    """Put off the interruption by a time limit until this is done: a fork's hooks that take locks must also free them.

    What is raised in such a hook is lost, and so would be the lock.
    """
    _whole.append(None)
    try:
        yield
    finally:
        _whole.pop()


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    in_main_thread = threading.current_thread() is threading.main_thread()
    if seconds is None or not in_main_thread or not hasattr(signal, "setitimer"):
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:
        if _whole:
            signal.setitimer(signal.ITIMER_REAL, _LATER)
            return
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
    file = file_of(path)
    if fetcher(file) is not None or inline.text(path) is not None:  # there is no such file here to be asked
        return _clause(error, path)
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
    if isinstance(error, OSError) and error.errno is not None:  # the system's, not a library's for what is in the file
        return f"cannot be read: {os.strerror(error.errno)}"
    return _clause(error, path)


def _clause(error: Exception, path: str) -> str:
    words = getattr(error, "strerror", None) or str(error)  # the system's own, without its number and the file's name
    lines = str(words).strip().splitlines()
    message = (
        lines[0].replace(repr(path), "").replace(path, "").replace(file_of(path), "").strip()[:_LONGEST].strip()
        if lines
        else ""
    )
    name = type(error).__name__
    if not message:
        return name
    # Python's name for it is no reason to a person; but of a missing key the words are the key alone.
    return f"{name}: {message}" if isinstance(error, KeyError) else message
