"""What the tests of isolated decoding share: functions that a child runs, and how to see that a process is gone."""

import os
import select
import sys
import time
from pathlib import Path

import pytest

from mmssl.data.guard import BrokenFile
from mmssl.data.isolate import isolated

LONG = 60.0


def pid(path):
    return os.getpid()


def read(path):
    return Path(path).read_bytes()


def reason(function, path, timeout=LONG, call=isolated):
    with pytest.raises(BrokenFile) as caught:
        call(function, str(path), timeout)
    return caught.value.reason


def ended(process):
    """Open, while it lives, what tells that a process has ended: returns a function that waits for that."""
    watch = os.pidfd_open(process)

    def wait():
        done = bool(select.select([watch], [], [], LONG)[0])
        os.close(watch)
        return done

    return wait


def is_gone(process):
    """Whether nothing is left of a process, not even a zombie."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def asleep(path):
    time.sleep(LONG)


def exiting(path):
    sys.exit()
