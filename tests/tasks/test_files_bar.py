"""What is said while many files are read: nothing at once in a pipe, a bar on a terminal, and nothing left of it."""

import io
import itertools

import pytest
from rich.console import Console

from tasks import files_bar
from tasks.files_bar import FilesBar


@pytest.fixture
def clock(monkeypatch):
    """Four seconds pass between two looks at the time."""
    ticks = itertools.count(0, 4)
    monkeypatch.setattr(files_bar.time, "monotonic", lambda: next(ticks))


def shown(terminal):
    out = io.StringIO()
    with FilesBar() as bar:
        bar.console = bar._bar.live.console = Console(file=out, force_terminal=terminal, width=80)
        for done in range(1, 9):
            bar(1000 * done, 8000)
        assert not bar._bar.live.is_started
    return out.getvalue()


def test_in_a_pipe_a_line_comes_now_and_then(clock):
    lines = shown(terminal=False).splitlines()
    assert lines[0] == "embedding 3,000 of 8,000 files"
    assert 1 <= len(lines) <= 3


def test_on_a_terminal_the_bar_goes_when_all_is_done():
    assert "8000/8000" in shown(terminal=True)
