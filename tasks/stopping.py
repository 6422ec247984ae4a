"""Signals while something long is done that leaves what it has done: an exit with a sentence."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mmssl.errors import Stopped


@contextmanager
def stopping(words: Callable[[], str]) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into Stopped, which says ``words``; in another thread than the main one do nothing."""

    def stop(signum: int, _frame: Any) -> None:
        # Not an Exception: what reads files takes those for broken files.
        raise KeyboardInterrupt(signum)

    in_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main else ()
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stopped(words(), int(error.args[0]) if error.args else signal.SIGINT) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
