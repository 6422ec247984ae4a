"""Locks between processes that end with the process that took them: its forks, which may outlive it, have none."""

import fcntl
import os
from pathlib import Path
from typing import TextIO

_HELD: set[TextIO] = set()


def _let_go() -> None:
    # A lock is there for as long as any process has the file open: data workers and decoders, which are forks of the
    # one that holds it and outlive it for seconds when it is killed, must not.
    for file in _HELD:
        file.close()
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go)


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK, 0o666)  # a pipe would wait for a reader


class Lock:
    """An exclusive lock on a file, which is made if need be; good until ``release`` or the end of the process."""

    def __init__(self, path: Path) -> None:
        """Open the file; raises OSError."""
        self._file = open(path, "a", opener=_at_once)  # noqa: SIM115 - kept, and Path.open has no opener
        _HELD.add(self._file)

    def take(self, wait: bool = False) -> bool:
        """Return whether it is taken: not where another has it, unless it is waited for."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def inode(self) -> int:
        """Return which file it is: another one may be at its path by now."""
        return os.fstat(self._file.fileno()).st_ino

    def release(self) -> None:
        """Let others have it; may be called again."""
        _HELD.discard(self._file)
        self._file.close()
