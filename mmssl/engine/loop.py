"""The training loop: one for every modality, objective and engine."""

import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmssl.contracts import Batch, Progress
from mmssl.distributed import Council, World, lost
from mmssl.engine import Engine, StepResult
from mmssl.engine.finite import NonFiniteSamples
from mmssl.engine.progress import Progressbar, memory_gb
from mmssl.engine.schedule import WarmupCosine
from mmssl.errors import MmsslError, NonFiniteLoss, Stopped, UnusableData, is_out_of_memory

Loaded = tuple[Batch, list[tuple[int, str]]]


def ignore(*_facts: object) -> None:
    """Take what a hook is told and do nothing."""


@dataclass(frozen=True)
class Hooks:
    """What the loop tells the world outside, on every rank (they decide themselves who writes)."""

    checkpoint: Callable[[int], None]
    """Write a checkpoint after this many steps; a collective."""
    log: Callable[[dict[str, Any]], None]
    """Take a line of metrics, the same on every rank but for what it says of memory and pace."""
    broken: Callable[[int, str], int]
    """Record a broken file by global index and reason, the same on every rank; returns how many there are by now."""
    name: Callable[[int], str]
    """Return the name of a sample."""
    validate: Callable[[int], bool] | None = None
    """Measure after this many steps if it is time; returns whether to stop here. A collective."""
    before: Callable[[int], None] = ignore
    """A step begins, after this many: what will look at it gets ready."""
    after: Callable[[int, Sequence[Batch]], None] = ignore
    """A step was taken, of this number counted from 1, on these micro-batches. A collective, before ``log``."""
    phase: Callable[[str], None] = ignore
    """Note what this rank does next, in a word that goes on from "it is": reading, computing, writing ..."""


class Pace(NamedTuple):
    """What a run computes, and what it could."""

    gflop: float
    """10^9 operations of training on one sample."""
    peak: float | None = None
    """10^9 operations per second that the devices of all ranks can do; None where that is not known."""

    def reached(self, samples_per_s: float) -> dict[str, float]:
        """Return the metrics of a rate: the operations of the model as it is written, none of it computed twice."""
        gflops = samples_per_s * self.gflop
        return {"gflop_per_s": gflops} | ({} if self.peak is None else {"mfu": gflops / self.peak})


@dataclass(frozen=True)
class Limits:
    """When the loop writes, logs and gives up."""

    steps: int
    accumulate: int
    batch_size: int
    log_every: int
    checkpoint_steps: int | None
    checkpoint_minutes: float | None
    max_broken: int
    seed: int
    pace: Pace | None = None
    """What it takes to say how fast the loop is; on the rank that talks."""


@dataclass
class Meter:
    """Sums over the steps since the last line of metrics; nothing is read from the device before the line is due."""

    pace: Pace | None = None
    totals: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    waited: float = 0.0
    computed: float = 0.0
    since: float = field(default_factory=time.monotonic)

    def add(self, result: StepResult, waited: float, computed: float) -> None:
        """Count one step, for which so many seconds went into waiting for data and into computing."""
        values = {"loss": result.loss, **result.metrics}
        if result.grad_norm is not None:
            values["grad_norm"] = result.grad_norm.detach()
        for key, value in values.items():
            self.totals[key] = self.totals[key] + value if key in self.totals else value
        self.steps += 1
        self.waited += waited
        self.computed += computed

    def line(self, council: Council, batch_size: int) -> dict[str, float]:
        """Return means over steps and ranks, and the pace. A collective; empties the meter."""
        means = council.mean(torch.stack([value.float() for value in self.totals.values()])) / self.steps
        elapsed = time.monotonic() - self.since
        line = dict(zip(self.totals, means.tolist(), strict=True))
        rate = self.steps * batch_size / elapsed
        line |= {"samples_per_s": rate, "wait": self.waited / elapsed, "compute": self.computed / elapsed}
        self.totals, self.steps, self.since, self.waited, self.computed = {}, 0, time.monotonic(), 0.0, 0.0
        return line if self.pace is None else line | self.pace.reached(rate)


def train(
    engine: Engine, loaded: Iterable[Loaded], schedule: WarmupCosine, limits: Limits, hooks: Hooks,
    world: World, council: Council, start: int = 0,
) -> None:  # fmt: skip
    """Train from step ``start`` to ``limits.steps`` or until validation ends it, and write a checkpoint at the end.

    Raises Stopped after a checkpoint when SIGINT or SIGTERM arrived on any rank, UnusableData when too many files are
    broken, NonFiniteLoss for a NaN or infinite loss, MmsslError when memory runs out.
    """
    meter = Meter(limits.pace)
    after_step = getattr(engine.objective, "after_step", None)
    written, clock, broken = start, time.monotonic(), 0
    with (
        closing(each(loaded)) as batches,
        stop_signals() as stop,
        Progressbar(limits.steps, start, world.is_main) as bar,
        sentences(bar, limits, hooks),
    ):
        for step in range(start, limits.steps):
            began = time.monotonic()
            hooks.phase("reading data")
            micros, fresh = read(batches, limits.accumulate, engine.device, hooks)
            waited = time.monotonic() - began
            # Whatever draws from the global generator starts each step from a known state: resume needs no more.
            torch.manual_seed(((limits.seed * 1_000_003 + step) * 4096 + world.rank) % 2**63)
            hooks.phase("computing")
            hooks.before(step)
            result, done = engine.step(micros, schedule(step)), step + 1
            if after_step is not None:
                with engine.whole():
                    after_step(Progress(done, limits.steps))
            meter.add(result, waited, time.monotonic() - began - waited)
            hooks.after(done, micros)

            minutes = (time.monotonic() - clock) / 60
            due = world.is_main and limits.checkpoint_minutes is not None and minutes >= limits.checkpoint_minutes
            signals, anything_broken, timer = council.sum([stop[0], len(fresh), float(due)])
            for index, reason in chain(*council.gather(fresh)) if anything_broken else ():
                broken = hooks.broken(index, reason)
            hooks.phase("measuring")
            enough = hooks.validate is not None and hooks.validate(done)
            last = done == limits.steps or enough
            news = None
            if done % limits.log_every == 0 or last or step == start:
                line = meter.line(council, limits.batch_size)
                line = {"step": done, "lr": schedule(step), **line, "memory_gb": memory_gb(engine.device)}
                news = summary(line)
                hooks.log(line)
            bar.advance(done, news)
            if broken > limits.max_broken:
                raise UnusableData(
                    f"{broken} files are broken, more than data.max_bad_fraction allows ({limits.max_broken}); "
                    "ledger.jsonl in the run folder names them; mend them, or raise the fraction, and add --resume"
                )
            every = limits.checkpoint_steps
            if last or signals or timer or (every is not None and done % every == 0):
                hooks.phase("writing a checkpoint")
                hooks.checkpoint(done)
                written, clock = done, time.monotonic()
            if signals and not last:
                signum = stop[0] or signal.SIGTERM
                raise Stopped(
                    f"stopped at step {done} of {limits.steps} after a checkpoint; add --resume to go on",
                    signum,
                )
            if enough:
                break
    assert written == done


def each(loaded: Iterable[Loaded]) -> Generator[Loaded, None, None]:
    """Yield what is loaded; closing it ends the data workers, whoever still holds on to an error's frames.

    They do not heed signals, so a program that an error ends would wait for them for ever.
    """
    yield from loaded


def read(
    batches: Iterator[Loaded], count: int, device: torch.device, hooks: Hooks
) -> tuple[list[Batch], list[tuple[int, str]]]:
    """Return the next ``count`` micro-batches on the device, and the broken files met while they were read."""
    micros, fresh = [], []
    for batch, broken in islice(batches, count):
        micros.append({name: value.to(device, non_blocking=True) for name, value in batch.items()})
        fresh += broken
        if not batch:
            for index, reason in fresh:
                hooks.broken(index, reason)
            index, reason = fresh[-1]
            raise UnusableData(
                f"file after file is broken, lastly {hooks.name(index)} ({reason}); the ledger names them"
            )
    return micros, fresh


def summary(line: Mapping[str, float]) -> str:
    """Return a line of metrics in words."""
    data, compute = 100 * line["wait"], 100 * line["compute"]
    words = [f"loss {line['loss']:.4f}", f"{line['samples_per_s']:.0f} samples/s"]
    if "mfu" in line:
        words.append(f"MFU {100 * line['mfu']:.0f} %")
    elif "gflop_per_s" in line:
        words.append(f"{line['gflop_per_s']:.3g} GFLOP/s")
    words.append(f"{data:.0f} % waiting for data, {compute:.0f} % computing, {max(0, 100 - data - compute):.0f} % else")
    if "grad_norm" in line:
        words.append(f"gradient {line['grad_norm']:.3g}")
    if "loss_scale" in line:
        words.append(f"scale {line['loss_scale']:.3g}")
    return "  ".join([*words, f"{line['memory_gb']:.1f} GB"])


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Turn SIGINT and SIGTERM into a number that the loop looks at; a second SIGINT interrupts at once.

    Where another rank has gone, SIGTERM is ignored from then on: launchers send it at once to those that are left, who
    are to tell what happened first (``mmssl.engine.watch`` does, and heeds it again).
    """
    seen = [0]

    def note(signum: int, _frame: Any) -> None:
        if seen[0] == signum == signal.SIGINT:
            raise KeyboardInterrupt
        seen[0] = signum

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs us there handles signals
        before = {}
    try:
        yield seen
    except RuntimeError as error:
        if before and lost(error):
            before[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def sentences(bar: Progressbar, limits: Limits, hooks: Hooks) -> Iterator[None]:
    """Turn what can go wrong inside a step into sentences."""
    try:
        yield
    except NonFiniteSamples as error:
        names = ", ".join(hooks.name(index) for index in error.samples[:8])
        more = f" and {len(error.samples) - 8} more" if len(error.samples) > 8 else ""
        raise NonFiniteLoss(f"at step {bar.step + 1} {error}; its samples: {names}{more}") from None
    except (RuntimeError, MemoryError) as error:
        if str(error).startswith("DataLoader worker"):
            raise MmsslError(
                "a data worker was killed, perhaps for want of memory; lower data.workers, and add --resume to go on "
                "from the last checkpoint"
            ) from None
        if not is_out_of_memory(error):
            raise
        micro = limits.batch_size // limits.accumulate
        raise MmsslError(
            f"out of memory on micro-batches of {micro} samples ({str(error).splitlines()[0]}); "
            "raise train.accumulate or lower train.batch_size"
        ) from None
