"""Locks between processes. Planted bug that fails here: forks that keep the lock of the process they come from."""

import os
import signal

from mmssl.locks import Lock


def test_one_has_it_at_a_time(tmp_path):
    one, other = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    assert one.take()
    assert not other.take()
    one.release()
    assert other.take()
    assert other.inode() == (tmp_path / "lock").stat().st_ino
    one.release()
    other.release()


def test_a_fork_has_it_not_even_where_it_lives_longer(tmp_path):
    lock = Lock(tmp_path / "lock")
    assert lock.take()
    there, written = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(written, b".")
        while True:
            signal.pause()
    try:
        os.read(there, 1)
        lock.release()
        other = Lock(tmp_path / "lock")
        assert other.take()
        other.release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
