"""What the processes of ``mmssl verify`` do: take a recipe's steps, and compare what came of them.

One process takes them with the torch engine on the whole batch, and once more from weights that differ in the last
bits: the twin. Its distance tells how far rounding alone may carry each tensor. Then ranks take them with DeepSpeed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from mmssl.contracts import Batch
from mmssl.data.listing import Listing
from mmssl.data.sample_log import global_batch
from mmssl.distributed import Council, World, world
from mmssl.engine import Engine
from mmssl.engine.loop import Hooks, ignore, train
from mmssl.engine.precision import Precision
from mmssl.engine.schedule import WarmupCosine
from mmssl.errors import UserError
from mmssl.files import save_tensors
from tasks.batches import make_batches
from tasks.build import Recipe, build_engine, build_objective, deepspeed_settings, default_device, parse_recipe
from tasks.fit import join, make_limits, start_from

NUDGE: dict[Precision, float] = {"fp32": 1e-7, "bf16": 2.0**-9, "fp16": 2.0**-12}
"""By what share the twin's weights differ: about what a product is rounded by."""
TOLERANCE: dict[Precision, float] = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}
"""How far a loss may be off, whatever the twin does."""
STATE_TOLERANCE, MOMENT_TOLERANCE = 1e-5, 1e-4
"""How far a tensor may be off, whatever the twin does, and a moment as a share of its greatest value."""
MARGIN = 10.0
"""Times the twin's distance are not yet a difference: it is one draw of the rounding, and other orders are others."""
REFERENCE = "reference.safetensors"


@dataclass(frozen=True)
class Job:
    """What is to be verified, as every process is told."""

    page: dict[str, Any]
    """The recipe."""
    precision: Precision
    listing: Listing
    synthetic: bool
    targets: np.ndarray[Any, Any] | None
    folder: Path
    """Where the state of the one process is kept for the ranks."""

    def recipe(self, engine: Literal["torch", "deepspeed"]) -> Recipe:
        """Return the recipe for one of the engines."""
        page = {**self.page, "train": {**self.page["train"], "engine": engine}}
        return parse_recipe(page, "the recipe")


@dataclass
class Trace:
    """What was seen of every step: its loss, its gradient's norm where there is clipping, its samples."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    samples: list[dict[str, list[int]]] = field(default_factory=list)

    def log(self, line: dict[str, Any]) -> None:
        """Take a line of metrics."""
        self.losses.append(line["loss"])
        self.norms += [line["grad_norm"]] if "grad_norm" in line else []


class Reference(NamedTuple):
    """What one process found, and its twin's distance from that."""

    trace: Trace
    twin: Trace
    floors: dict[str, float]
    """The greatest difference of each tensor of the state."""
    scales: dict[str, float]
    """The greatest absolute value of each."""

    def typical(self, kind: str) -> float:
        """Return the twin's distance in most tensors of a kind (``param``, ``exp_avg`` ...), as a share of their scale.

        In a tensor of one number it may be small by chance.
        """
        names = [name for name, scale in self.scales.items() if scale and name.startswith(f"{kind}/")]
        return median(self.floors[name] / self.scales[name] for name in names) if names else 0.0


class Difference(NamedTuple):
    """A tensor that differs, or would most likely: by how much, and how much is allowed."""

    tensor: str
    value: float
    allowed: float

    @property
    def excess(self) -> float:
        """How many times what is allowed it is; infinite for what is no number."""
        ratio = self.value / self.allowed
        return ratio if ratio == ratio else float("inf")


class Compared(NamedTuple):
    """What a number of ranks found under one DeepSpeed configuration."""

    trace: Trace
    worst: Difference
    different: int
    """How many tensors differ by more than is allowed."""


def accepted(configs: Mapping[str, Any]) -> None:
    """Raise UserError, with its name, for a configuration that DeepSpeed refuses, before anything is computed."""
    join(world())
    from mmssl.engine.deepspeed_engine import accept

    for name, config in configs.items():
        try:
            accept(config)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None


def references(jobs: Sequence[Job]) -> list[Reference]:
    """Take the steps of each job in this one process, and write down the state that they end in."""
    return [reference(job) for job in jobs]


def reference(job: Job) -> Reference:
    """Take a job's steps and its twin's in this process."""
    recipe = job.recipe("torch")

    def walked(nudged: bool) -> tuple[Trace, dict[str, Tensor]]:
        objective = started(recipe)
        moved = nudge(objective, NUDGE[job.precision]) if nudged else {}
        engine = build_engine(recipe, objective, default_device(), None)
        trace = walk(job, recipe, engine, World())
        # The nudge itself is still in the weights and their averages: what counts is what the steps made of it.
        state = {name: value.cpu().clone() for name, value in engine.state()}
        return trace, {name: value - moved[name] if name in moved else value for name, value in state.items()}

    trace, state = walked(nudged=False)
    save_tensors(job.folder / REFERENCE, state)
    twin, other = walked(nudged=True)
    floors = {name: distance(value, other[name]) for name, value in state.items()}
    return Reference(trace, twin, floors, {name: float(value.double().abs().max()) for name, value in state.items()})


def started(recipe: Recipe) -> nn.Module:
    """Make the objective as a run starts with it."""
    objective = build_objective(recipe)
    start_from(objective, recipe, None)
    return objective


@torch.no_grad()
def nudge(objective: nn.Module, share: float) -> dict[str, Tensor]:
    """Change all weights by a random share of about this, and return by how much, by the names of the state."""
    generator = torch.Generator().manual_seed(1)
    moved: dict[str, Tensor] = {}
    for name, parameter in objective.named_parameters():
        before = parameter.clone()
        parameter.mul_(1 + share * torch.randn(parameter.shape, generator=generator))
        moved |= {f"param/{name}": parameter - before, f"ema/{name}": parameter - before}
    return moved


def distance(a: Tensor, b: Tensor) -> float:
    """Return the greatest difference of two tensors; infinite for those of other shapes."""
    if a.shape != b.shape:
        return float("inf")
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def walk(job: Job, recipe: Recipe, engine: Engine, me: World) -> Trace:
    """Take the steps in the loop that trains, at the greatest learning rate: a warm-up would hide differences."""
    trace, council, files = Trace(), Council(me.size), len(job.listing)
    batches = make_batches(recipe, job.listing, engine.objective, job.targets, me, 0, engine.device, job.synthetic)
    rate = recipe.optim.peak_lr(recipe.train.batch_size)

    def after(_step: int, micros: Sequence[Batch]) -> None:
        trace.samples.append(global_batch(micros, council))

    hooks = Hooks(ignore, trace.log, lambda _index, _reason: 0, job.listing.name, after=after)
    schedule = WarmupCosine(rate, recipe.steps(files), floor=rate)
    train(engine, batches, schedule, make_limits(recipe, files), hooks, me, council)
    return trace


def compare(jobs: Sequence[Job], found: Sequence[Reference], systems: Sequence[str]) -> list[dict[str, Compared]]:
    """Take the steps of each job on these ranks, under each DeepSpeed configuration, and compare with one process."""
    me = world()
    join(me)
    return [
        {system: compared(job, one, system, me) for system in systems} for job, one in zip(jobs, found, strict=True)
    ]


def compared(job: Job, one: Reference, system: str, me: World) -> Compared:
    """Take the steps of a job under one DeepSpeed configuration, and compare them with those of one process."""
    recipe = job.recipe("deepspeed")
    ds = deepspeed_settings(recipe, me, system)
    engine = build_engine(recipe, started(recipe), default_device(), ds)
    trace = walk(job, recipe, engine, me)
    with safe_open(job.folder / REFERENCE, framework="pt") as file:
        found = [*differences(engine, one, file.keys(), file.get_tensor)]
    engine.close()
    # Buffers are every rank's own.
    found = [difference for each in Council(me.size).gather(found) for difference in each]
    worst = max(found, key=lambda difference: difference.excess)
    return Compared(trace, worst, len({difference.tensor for difference in found if difference.excess > 1}))


def differences(
    engine: Engine, one: Reference, names: Sequence[str], read: Callable[[str], Tensor]
) -> Iterator[Difference]:
    """Yield how far each tensor of the state is from the one process's; of two that are not in both, infinitely."""
    missing = set(names)
    for name, value in engine.state():
        known = name in missing
        missing.discard(name)
        yield Difference(name, distance(value.cpu(), read(name)) if known else float("inf"), allowed(name, one))
    yield from (Difference(name, float("inf"), 1.0) for name in sorted(missing))


def allowed(name: str, one: Reference) -> float:
    """Return how far a tensor may be off.

    Moments are as small as gradients and their squares, so that they are measured by themselves. They show what AdamW
    hides from the weights: gradients that are all a number of times too large.
    """
    kind, scale = name.partition("/")[0], one.scales.get(name, 0.0)
    least = STATE_TOLERANCE if kind in ("param", "ema", "buffer") else max(MOMENT_TOLERANCE * scale, 1e-30)
    return max(least, MARGIN * max(one.floors.get(name, 0.0), one.typical(kind) * scale))
