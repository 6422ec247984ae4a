"""Verifying a recipe: real steps of it on several ranks, compared with one process that sees the whole batch."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from mmssl import launch
from mmssl.cost import Memory, Sharding
from mmssl.data import inline
from mmssl.data.listing import Listing
from mmssl.distributed import World
from mmssl.engine.deepspeed_setup import autocast_precision, system_config
from mmssl.errors import UserError
from tasks.batches import training_files
from tasks.build import Recipe, deepspeed_settings, default_device, measure_memory, precision, sketch_objective
from tasks.fit import check_batch, check_locked, inherited, learned
from tasks.plan_rows import counted, in_words, planned, size
from tasks.verify_ranks import (
    MARGIN,
    MOMENT_TOLERANCE,
    STATE_TOLERANCE,
    TOLERANCE,
    Compared,
    Job,
    Reference,
    accepted,
    compare,
    references,
)
from tasks.writer import say

STAGES = ("0", "1", "2", "3")
PATIENCE = 3600.0
"""Seconds that all steps of one number of ranks may take."""
VOCABULARY, WORDS = 300, 400
"""Synthetic texts: different words, and at most so many in a text."""


@dataclass(frozen=True)
class Row:
    """What was found on a number of ranks under one DeepSpeed configuration."""

    world: int
    zero: str
    loss: float
    """The greatest difference of the loss of a step."""
    grad_norm: float
    """The greatest difference of the gradient's norm of a step; 0 where nobody asked for it."""
    samples: bool
    """Whether each step was taken on the same samples."""
    tensor: str
    """The tensor of the state that differs most for what it may."""
    difference: float
    allowed: float
    different: int
    """How many tensors differ by more than they may."""
    faults: tuple[str, ...]
    """What is different, in words."""

    @property
    def verdict(self) -> str:
        """Return "equal", or what is different."""
        return " and ".join(self.faults) + " differ" if self.faults else "equal"


@dataclass(frozen=True)
class Verification:
    """What ranks and one process made of the same steps."""

    rows: list[Row]
    losses: list[float]
    """Of the one process, step by step."""
    precision: str
    loss_allowed: float
    floor: float
    """How far, at most, rounding alone carried a tensor: of the twin's state from the one process's."""
    floor_tensor: str

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not any(row.faults for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "equal": self.equal,
            **{key: value for key, value in vars(self).items() if key != "rows"},
            "rows": [{**vars(row), "verdict": row.verdict} for row in self.rows],
        }

    def render(self, console: Console) -> None:
        """Print a table."""
        table = Table("world", "zero", "loss", "gradient norm", "tensor that differs most", "by", "allowed", "verdict",
                      box=None, pad_edge=False)  # fmt: skip
        for row in self.rows:
            values = (row.world, row.zero, row.loss, row.grad_norm, row.tensor, row.difference, row.allowed)
            table.add_row(*map(in_words, values), row.verdict)
        console.print(table)
        console.print(
            f"Differences from one process on the whole batch, after {counted(len(self.losses), 'step')} in "
            f"{self.precision}. "
            f"Allowed are {self.loss_allowed:g} for the loss, {STATE_TOLERANCE:g} for weights, averages and buffers, "
            f"for moments {MOMENT_TOLERANCE:g} of their greatest value; or {MARGIN:g} times what rounding does, if "
            f"that is more: {self.floor:.2g} at most ({self.floor_tensor}).",
            soft_wrap=True,
        )


def verify(
    recipe: Recipe,
    data: str | Path | None = None,
    *,
    split: str | None = None,
    worlds: Sequence[int] = (1, 2),
    zero: Sequence[str] = STAGES,
    steps: int = 3,
) -> Verification:
    """Take ``steps`` optimiser steps of ``recipe`` on each number of ranks in ``worlds`` and under each DeepSpeed
    configuration in ``zero`` (a stage, the name of a shipped one or a JSON file), and compare with one process.

    Without ``data``, on synthetic signals. Compared are the loss and the gradient's norm of each step, the samples that
    it was taken on, and after the last step every parameter, moment, average and buffer. AdamW turns what rounding
    leaves of a gradient that should be zero into whole steps, so that no fixed tolerance is right for all tensors: it
    would be blind to differences or see some where there are none. So one process takes the steps twice, the second
    time from weights that differ in the last bits, and each tensor may differ by some times what it then differs by. In
    16 bit that is much, so that what is small is seen in fp32 alone.
    Raises UserError for what cannot be run so, MmsslError where a rank fails.
    """
    with tempfile.TemporaryDirectory(prefix="mmssl-verify-") as folder:
        systems = {stage: f"zero{stage}" if stage in STAGES else stage for stage in zero}
        short = check(recipe, steps, worlds, [*systems.values()])
        if data is not None:
            training_files(short, data, split)  # what is wrong with them is told before anything is announced
        check_memory(short, worlds, [*systems.values()])
        job = make_job(recipe, data, split, steps, Path(folder))
        configs = {name: deepspeed_settings(short, World(), name) for name in systems.values()}
        on_ranks(accepted, (configs,), 1, Path(folder))
        (found,) = on_ranks(references, ([job],), 1, Path(folder))
        rows = []
        for world in worlds:
            (compared,) = on_ranks(compare, ([job], [found], [*systems.values()]), world, Path(folder))
            rows += [make_row(job, world, stage, found, compared[name]) for stage, name in systems.items()]
    return verification(job, found, rows)


def on_ranks(function: Any, arguments: tuple[Any, ...], world: int, folder: Path) -> Any:
    """Return what a function found on rank 0 of ``world``."""
    threads = max(1, torch.get_num_threads() // world)
    with launch.Ranks(function, arguments, world, logs=folder / f"{world}-{function.__name__}", threads=threads) as up:
        return up.results(PATIENCE)[0]


def make_job(recipe: Recipe, data: str | Path | None, split: str | None, steps: int, folder: Path) -> Job:
    """Resolve what is to be verified as a run would."""
    recipe = shortened(inherited(recipe), steps)
    products = precision(recipe, default_device())
    listing = synthetic_listing(recipe, steps) if data is None else training_files(recipe, data, split)
    recipe, _ = learned(recipe, listing)
    targets = recipe.objective.synthetic_targets(len(listing))
    return Job(recipe.as_dict(), products, listing, data is None, targets, folder)


def shortened(recipe: Recipe, steps: int) -> Recipe:
    """Return a recipe for so many steps, without what does not change what they compute."""
    products = precision(recipe, default_device())
    length = {"steps": steps, "epochs": None, "log_every": 1, "patience": None, "precision": products}
    # Starting data workers would take longer than the steps.
    alone = recipe.data.model_copy(update={"workers": 0, "log_samples": False})
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=length), "data": alone})


def synthetic_listing(recipe: Recipe, steps: int) -> Listing:
    """Return rows of short texts, so few that an epoch ends within the steps; some lack a modality where rows may."""
    train, rng = recipe.train, np.random.default_rng(0)
    files = max(2, ceil(2 / 3 * train.batch_size * steps / recipe.data.repeats))
    words = ["".join(map(chr, rng.integers(97, 123, size))) for size in rng.integers(1, 8, VOCABULARY)]
    texts = [inline.join(synthetic_text(words, rng)) for _ in range(files)]
    media: dict[str, list[str | None]] = {}
    if recipe.objective.several:
        for place, name in enumerate(recipe.encoders):
            optional = place > 0 and len(recipe.encoders) > 2
            media[name] = [None if optional and i % 3 == place % 3 else text for i, text in enumerate(texts)]
    column = recipe.objective.together
    columns: dict[str, list[str | None]] = {} if column is None else {column: [f"value {i % 2}" for i in range(files)]}
    return Listing(Path("synthetic"), texts, columns, rows=range(1, files + 1), media=media)


def synthetic_text(words: Sequence[str], rng: np.random.Generator) -> str:
    """Return a text of some sentences that mean nothing."""
    chosen = rng.choice(words, rng.integers(8, WORDS))
    return " ".join(f"{word}." if i % 6 == 5 else word for i, word in enumerate(chosen))


def check(recipe: Recipe, steps: int, worlds: Sequence[int], systems: Sequence[str]) -> Recipe:
    """Return the recipe as the ranks take it; raises UserError where the batch or a configuration does not fit."""
    check_locked(recipe)
    check_precision(recipe, systems)
    recipe = shortened(inherited(recipe), steps)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"engine": "deepspeed"})})
    for world in worlds:
        check_batch(recipe, World(size=world))
        if default_device().type == "cuda" and world > torch.cuda.device_count():
            raise UserError(f"--world {world}: there are {torch.cuda.device_count()} GPUs, and each rank takes one")
        for system in systems:
            deepspeed_settings(recipe, World(size=world), system)
    return recipe


def check_precision(recipe: Recipe, systems: Sequence[str]) -> None:
    """Raise UserError where a configuration decides the precision that the recipe leaves open.

    The one process, which has no configuration, has to compute in the same.
    """
    usual = precision(recipe, default_device())
    for system in systems if recipe.train.precision == "auto" else ():
        asked = autocast_precision(system_config(system), system)
        if asked not in (None, usual):
            raise UserError(
                f"{system} computes in {asked}, but one process, with train.precision=auto, in {usual} here; add "
                f"train.precision={asked} to compare both in that"
            )


def check_memory(recipe: Recipe, worlds: Sequence[int], systems: Sequence[str]) -> None:
    """Say what will be done and what it takes; raises UserError where that is more than there is."""
    objective, train = sketch_objective(recipe), recipe.train
    micro = train.batch_size // train.accumulate
    here = default_device().type == "cpu"

    def gigabytes(memory: Memory, ranks: int) -> float:
        return (memory.total + memory.host) * (ranks if here else 1) / 1e9

    whole = measure_memory(recipe, objective, micro)
    needs = {"one process on the whole batch": gigabytes(planned(recipe, whole, None), 1)}
    for world in worlds:
        foot = measure_memory(recipe, objective, micro // world)
        for system in systems:
            memory = planned(recipe, foot, Sharding.of(system_config(system), world))
            needs[f"{counted(world, 'rank')} under {system}"] = gigabytes(memory, world)
    name, most = max(needs.items(), key=lambda need: need[1])
    parameters = sum(parameter.numel() for parameter in objective.parameters())
    where = f"{' and '.join(map(str, worlds))} {'rank' if worlds == [1] else 'ranks'} under {', '.join(systems)}"
    say(
        f"{counted(train.steps or 0, 'step')} of {counted(train.batch_size, 'sample')}, {parameters:,} parameters: "
        f"twice in one process, then on {where}; up to {size(most)} ({name})"
    )
    free = (psutil.virtual_memory().available if here else torch.cuda.mem_get_info()[0]) / 1e9
    if most > free:
        raise UserError(
            f"verify needs {size(most)} ({name}), but {size(free)} are free: lower train.batch_size or the model's "
            "sizes, or raise train.accumulate"
        )


def make_row(job: Job, world: int, zero: str, one: Reference, found: Compared) -> Row:
    """Compare the steps, and say what differs."""
    trace, tolerance, worst = one.trace, TOLERANCE[job.precision], found.worst
    loss, norm = apart(trace.losses, found.trace.losses), apart(trace.norms, found.trace.norms)
    of_loss = max(tolerance * max(1.0, *map(abs, trace.losses)), MARGIN * apart(trace.losses, one.twin.losses))
    of_norm = max(tolerance * max(1.0, *trace.norms, 0.0), MARGIN * apart(trace.norms, one.twin.norms))
    same = trace.samples == found.trace.samples
    faults = {
        "samples": same,
        "losses": loss <= of_loss,
        "gradient norms": norm <= of_norm,
        f"{found.different} tensors": not found.different,
    }
    return Row(
        world, zero, loss, norm, same, worst.tensor, worst.value, worst.allowed, found.different,
        tuple(name for name, good in faults.items() if not good),
    )  # fmt: skip


def apart(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the greatest difference of two series of numbers; infinite where they are not as long."""
    if len(a) != len(b):
        return float("inf")
    return max((abs(x - y) for x, y in zip(a, b, strict=True)), default=0.0)


def verification(job: Job, found: Reference, rows: list[Row]) -> Verification:
    """Put the rows together with what they are compared with."""
    tensor = max(found.floors, key=lambda name: found.floors[name])
    return Verification(rows, found.trace.losses, job.precision, TOLERANCE[job.precision], found.floors[tensor], tensor)


def parse_worlds(text: str) -> list[int]:
    """Return the numbers in "1,2"; UserError for anything else."""
    try:
        worlds = [int(word) for word in text.split(",")]
    except ValueError:
        worlds = []
    if not worlds or min(worlds) < 1:
        raise UserError(f"--world {text}: give numbers of ranks separated by commas, such as 1,2")
    return list(dict.fromkeys(worlds))
