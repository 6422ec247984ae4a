"""Planned against measured memory: real steps, each kind in ranks of its own.

On a GPU the measure is what torch's allocator has given out at most. On a CPU it is the greatest resident size less
that of right before the objective was built, with an allocator that gives back at once: glibc by itself raises its
threshold as blocks are freed, up to 32 MB, and then keeps what is freed in pieces of a heap that do not always fit what
comes next.
"""

import ctypes
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import psutil
import torch

from mmssl.contracts import Batch
from mmssl.cost import BYTES, Footprint, Sharding
from mmssl.distributed import world
from mmssl.engine.deepspeed_setup import connect, system_config
from mmssl.launch import Ranks
from tasks.build import (
    Recipe,
    build_engine,
    build_objective,
    deepspeed_settings,
    default_device,
    measure_cost,
    measure_memory,
    parse_recipe,
    precision,
    sizes_of,
    sketch_objective,
    synthetic,
)
from tasks.plan_rows import ALONE, planned, shardings

RANKS = 2
STEPS = 2
"""The second has the moments that the first made."""
MOST_GFLOP = 100.0
"""Of a step on a rank, so that it takes seconds on a CPU."""
SHARE = 0.7
"""Of the memory that is free here, a step may plan to take so much."""
M_MMAP_THRESHOLD = -3


class Case(NamedTuple):
    """What is measured: a recipe as plain values, on how many samples a rank, spread by which configuration."""

    recipe: dict[str, Any]
    samples: int
    config: str = ALONE

    @property
    def ranks(self) -> int:
        """How many processes train."""
        here = RANKS if default_device().type == "cpu" else min(RANKS, torch.cuda.device_count())
        return 1 if self.config == ALONE else here

    def load(self) -> Recipe:
        """Return the recipe as it is trained here."""
        recipe = parse_recipe(self.recipe, "the recipe")
        engine = "torch" if self.config == ALONE else "deepspeed"
        return with_train(recipe, batch_size=self.samples * self.ranks, accumulate=1, compile=False, engine=engine)


def with_train(recipe: Recipe, **settings: Any) -> Recipe:
    """Return a recipe with other settings of its training."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=settings)})


def checked(recipe: Recipe, samples: int) -> list[dict[str, Any]]:
    """Take steps on at most ``samples`` per rank under each configuration; what was planned, measured and missed.

    In the precision that pays here: bf16 on a CPU that lacks it takes minutes, and is no other test of the plan.
    """
    kind = precision(with_train(recipe, precision="auto"), default_device())
    recipe = with_train(recipe, precision=kind)
    gflop = measure_cost(recipe, sketch_objective(recipe)).gflop_train
    least = recipe.objective.micro_batch_multiple * (2 if recipe.objective.several else 1)
    samples = max(least, min(samples, int(MOST_GFLOP / gflop)) // least * least)
    cases = [Case(recipe.as_dict(), samples, name) for name in (ALONE, *dict(shardings(recipe, RANKS)))]
    foot = traced(cases[0])
    return [row(case, foot) for case in cases]


def traced(case: Case) -> Footprint:
    """Return what a step takes before it is spread over ranks."""
    recipe = case.load()
    return measure_memory(recipe, sketch_objective(recipe), case.samples)


def row(case: Case, foot: Footprint) -> dict[str, Any]:
    """Return what was planned for a case, and what it took: None where it does not fit here."""
    wanted = plan_of(case, foot)
    measured = max(measure(case)) if wanted * case.ranks < SHARE * free() else None
    return {
        "deepspeed_config": case.config,
        "ranks": case.ranks,
        "micro_batch": case.samples,
        "precision": case.recipe["train"]["precision"],
        "planned_gb": wanted / 1e9,
        "measured_gb": None if measured is None else measured / 1e9,
        "planned_by_measured": None if measured is None else wanted / measured,
    }


def plan_of(case: Case, foot: Footprint) -> int:
    """Return the planned bytes of one process that can be measured here: on a CPU also those of the host."""
    sharding = None if case.config == ALONE else Sharding.of(system_config(case.config), case.ranks)
    if default_device().type != "cpu":
        return planned(case.load(), foot, sharding).total
    if sharding is not None:  # of a buffer, what nothing was ever written to is not there
        written = foot.gradients // BYTES
        sharding = replace(sharding, bucket=min(sharding.bucket, written), prefetch=min(sharding.prefetch, written))
    memory = planned(case.load(), foot, sharding)
    return memory.total + memory.host


def free() -> float:
    """Return the bytes that are free on the device."""
    if default_device().type == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    return float(psutil.virtual_memory().available)


def measure(case: Case, exact: bool = True, steps: int = STEPS) -> list[int]:
    """Return the most that a case took, in bytes, by rank; not ``exact``: with all that the allocator holds back."""
    # What the libraries say when they are imported is of no interest.
    with TemporaryDirectory() as logs, Ranks(train, (case, exact, steps), case.ranks, logs=Path(logs)) as ranks:
        return ranks.results(timeout=600)


def train(case: Case, exact: bool, steps: int) -> int:
    """Take a few steps in this process and return the most that they took, in bytes."""
    if exact and default_device().type == "cpu":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
    recipe, me, device = case.load(), world(), default_device()
    ds = deepspeed_settings(recipe, me, None if case.config == ALONE else case.config)
    if ds is not None:
        device = connect(me, device.type)
        import mmssl.engine.deepspeed_engine  # noqa: F401 (its libraries are not part of the measure)
    warm_up(device, ds is not None)
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # forget the greatest resident size so far
    before = status("VmRSS")
    objective = build_objective(recipe)
    engine = build_engine(recipe, objective, device, ds)
    one = synthetic(objective, sizes_of(recipe)[0], "cpu")
    for _ in range(steps):
        batch: Batch = {name: torch.cat([value] * case.samples).to(device) for name, value in one.items()}
        batch["index"] = torch.arange(case.samples, device=device) + case.samples * me.rank
        engine.step([batch], 1e-4)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if exact else torch.cuda.max_memory_reserved()
    return status("VmHWM") - before


def warm_up(device: torch.device, distributed: bool) -> None:
    """Let the libraries allocate what they need once, whatever is trained."""
    x = torch.randn(64, 64, device=device, requires_grad=True)
    (x @ x).sum().backward()
    torch.optim.AdamW([x], fused=True).step()
    if distributed:
        torch.distributed.all_reduce(torch.ones(1_000_000, device=device))


def status(key: str) -> int:
    """Return a size from this process's status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024
