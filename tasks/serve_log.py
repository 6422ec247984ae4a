"""What a service says while it runs: a JSON object in a line each, whoever has something to say."""

import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def to_stderr(line: str) -> None:
    """Write a line of the log."""
    print(line, file=sys.stderr, flush=True)


def now() -> str:
    """Return the time as the log has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class _Lines(logging.Handler):
    def __init__(self, log: Callable[[str], None]) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        entry: dict[str, Any] = {"time": now(), "of": record.name, "level": record.levelname.lower()}
        entry["said"] = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            entry["error"] = "".join(traceback.format_exception(record.exc_info[1]))
        self._log(json.dumps(entry))


@contextmanager
def json_lines(log: Callable[[str], None]) -> Iterator[None]:
    """Have what libraries log and warn of written by ``log``; Python itself would write it as it comes."""
    root, lines = logging.getLogger(), _Lines(log)
    root.addHandler(lines)
    # What it warns of is in the sender's bytes, and answered.
    forms = logging.getLogger("python_multipart")
    level = forms.level
    forms.setLevel(logging.ERROR)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        forms.setLevel(level)
        root.removeHandler(lines)
