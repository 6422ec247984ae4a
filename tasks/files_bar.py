"""What a person sees while many files are read: a bar on a terminal, elsewhere a line now and then; on stderr."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SPEAK_SECONDS = 10.0
"""Where nobody sees a bar move, a line so often."""


class FilesBar:
    """Is called with (files done, files in all), as ``tasks.features.ReportProgress``; shows nothing before that."""

    def __init__(self, doing: str = "embedding") -> None:
        self.doing, self.console = doing, Console(stderr=True, highlight=False)
        columns = TextColumn(doing), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, console=self.console, transient=True)
        self._task = self._bar.add_task("", total=None)
        self._spoke = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show how far it is; the bar goes when all is done."""
        if self.console.is_terminal:
            self._bar.start()
            self._bar.update(self._task, completed=done, total=total)
            if done >= total:
                self._bar.stop()
        elif time.monotonic() - self._spoke > SPEAK_SECONDS:
            self._spoke = time.monotonic()
            self.console.print(f"{self.doing} {done:,} of {total:,} files", soft_wrap=True)
