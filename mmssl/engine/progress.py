"""What a person sees while a run trains: one line on stderr, live on a terminal and now and then in a pipe."""

import sys
import time
from types import TracebackType
from typing import Self

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn


class Progressbar:
    """Shows loss, samples/s, share of time waiting for data, memory and the time left; on rank 0 alone."""

    def __init__(self, steps: int, start: int, visible: bool = True) -> None:
        self.console = Console(file=sys.stderr, highlight=False)
        self.steps, self.step, self.visible = steps, start, visible
        self.live = visible and self.console.is_terminal
        self._start, self._began = start, time.monotonic()
        self._spoke = -float("inf")
        self._bar = Progress(
            BarColumn(bar_width=24), TextColumn("{task.completed}/{task.total}"), TextColumn("{task.description}"),
            console=self.console, transient=True,
        )  # fmt: skip
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self.live:
            self._bar.start()
            self._task = self._bar.add_task("starting", total=self.steps, completed=self._start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self._bar.stop()

    def advance(self, step: int, text: str | None) -> None:
        """Move to ``step``; ``text`` is the news, if there is any."""
        self.step = step
        if self._task is not None:
            self._bar.update(self._task, completed=step)
        if text is None or not self.visible:
            return
        elapsed = time.monotonic() - self._began
        left = elapsed / max(1, step - self._start) * (self.steps - step)
        line = f"{text}  {duration(left)} left"
        if self._task is not None:
            self._bar.update(self._task, description=line)
        elif time.monotonic() - self._spoke > 10 or step == self.steps:
            self._spoke = time.monotonic()
            self.console.print(f"step {step}/{self.steps}  {line}", soft_wrap=True)


def duration(seconds: float) -> str:
    """Return a time in words: 42 s, 3 min 20 s, 2 h 5 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, hours = divmod(seconds, 60), divmod(seconds // 60, 60)
    return f"{minutes[0]} min {minutes[1]} s" if seconds < 3600 else f"{hours[0]} h {hours[1]} min"


def memory_gb(device: torch.device) -> float:
    """Return the memory in use, in GB: peak allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return float(psutil.Process().memory_info().rss) / 1e9
