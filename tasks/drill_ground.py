"""Where drills take place: small pictures, an undisturbed run on two ranks, and how others are compared with it."""

import multiprocessing
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch

from mmssl import checkpoint
from mmssl.data.sample_log import faults
from mmssl.distributed import World
from mmssl.errors import MmsslError, UserError
from mmssl.launch import GRACE, Ranks
from mmssl.run import Run, read_lines
from tasks.batches import make_buckets, make_plan, training_files
from tasks.build import as_objective, load_recipe, sketch_objective
from tasks.drill_ranks import RECIPE, Gate, pretrain

PICTURES, STEPS, EVERY, WORLD = 20, 12, 3, 2
SETTINGS: dict[str, Any] = {
    "signal.size": [16, 16],
    "model.tokenizer.patch_size": [4, 4],
    "model.backbone": {"dim": 16, "depth": 2, "num_heads": 2, "drop_path": 0.2},
    "objective.decoder": {"dim": 16, "depth": 1, "num_heads": 2},
    "train.steps": STEPS,
    "train.batch_size": 8,
    "train.ema": 0.9,
    "train.log_every": 1,
    "optim.clip": 1.0,
    "data.workers": 0,
    "data.log_samples": True,
    "checkpoint.every_steps": EVERY,
}
LAST_WORDS = 600
"""Characters of what was said that are told where something is wrong."""
TIMEOUT = 300.0
"""Seconds within which a run of a second must have ended."""
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


class Ended(NamedTuple):
    """How the ranks of a run ended, and all that they printed."""

    codes: list[int]
    said: str

    def __str__(self) -> str:
        return f"{self.codes}, saying: {' '.join(self.said.split())[-LAST_WORDS:]}"


class Ground:
    """The folder of all drills: pictures and runs by name. Making it takes the undisturbed run, of ``seconds``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "pictures"
        draw_pictures(self.data)
        self.undisturbed = self.run("undisturbed")
        began = time.monotonic()
        done = self.go("undisturbed")
        self.seconds = time.monotonic() - began
        if done.codes != [0] * WORLD:
            raise MmsslError(f"the undisturbed run ended with {done}")

    def run(self, name: str) -> Run:
        """Return the run folder of a drill."""
        return Run(self.folder / name)

    def start(
        self, name: str, resume: bool = False, gate: Gate | None = None, pipe: Connection | None = None,
        settings: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None,
    ) -> Ranks:  # fmt: skip
        """Start a run on two ranks."""
        run = self.run(name)
        arguments = (self.data, run.path, {**SETTINGS, **(settings or {})}, resume, gate, pipe)
        number = sum(1 for _ in self.folder.glob(f"{name}-log-*"))
        logs = self.folder / f"{name}-log-{number}"
        return Ranks(pretrain, arguments, WORLD, logs=logs, environment={**ON_CPU, **(environment or {})})

    def go(self, name: str, resume: bool = False, environment: Mapping[str, str] | None = None) -> Ended:
        """Run to the end."""
        with self.start(name, resume, environment=environment) as ranks:
            return ended(ranks)

    def disturb(
        self,
        name: str,
        gate: Gate,
        act: Callable[[Ranks], object],
        settings: Mapping[str, Any] | None = None,
        grace: float = GRACE,
    ) -> Ended:
        """Run to the gate, act, and let it go on for as long as it does."""
        ours, theirs = multiprocessing.Pipe()
        with ours, theirs, self.start(name, gate=gate, pipe=theirs, settings=settings) as ranks:
            wait([ours, *(process.sentinel for process in ranks.processes)], TIMEOUT)
            if not ours.poll():
                raise MmsslError(f"drill {name}: no rank came to where it {gate.does} {gate.name}: {ended(ranks)}")
            act(ranks)
            ours.send("go on")
            return ended(ranks, grace)

    def resume(self, name: str, step: int) -> list[str]:
        """Resume a run, which must go on from ``step`` and end as the undisturbed one; returns what is wrong."""
        done = self.go(name, resume=True)
        if done.codes != [0] * WORLD:
            return [f"resumed, it ended with {done}"]
        at_step = f"resuming from step {step} of {STEPS}" in done.said
        return ([] if at_step else [f"it did not resume from step {step}: {done}"]) + self.compare(name)

    def compare(self, name: str) -> list[str]:
        """Return in sentences where a run that has ended is not as the undisturbed one."""
        run, wrong = self.run(name), []
        here, there = ([(line["step"], line["loss"]) for line in one.metrics()] for one in (run, self.undisturbed))
        if here != there:
            wrong.append(f"(step, loss) are {sorted({*here} - {*there})}, not {sorted({*there} - {*here})}")
        lines = read_lines(run.samples_file)
        wrong += faults(lines, self.plan())
        if lines != read_lines(self.undisturbed.samples_file):
            wrong.append("the samples of the steps are others")
        return wrong + self._compare_states(run)

    def _compare_states(self, run: Run) -> list[str]:
        try:
            here, there = (
                checkpoint.Checkpoint(one.checkpoints / f"step-{STEPS:08d}") for one in (run, self.undisturbed)
            )
        except UserError as error:
            return [str(error)]
        if sorted(here.names()) != sorted(there.names()):
            return ["the last checkpoint holds other tensors"]
        other = [name for name in there.names() if not torch.equal(here.read(name), there.read(name))]
        return [f"{len(other)} tensors differ, such as {other[0]}"] if other else []

    def plan(self) -> Any:
        """Return which samples the steps are to be taken on."""
        recipe = load_recipe(RECIPE, SETTINGS)
        tokenizer = next(iter(as_objective(sketch_objective(recipe)).encoders().values())).tokenizer
        buckets = make_buckets(recipe, training_files(recipe, self.data, None), tokenizer)
        return make_plan(recipe, buckets, World(), 0, STEPS)


def ended(ranks: Ranks, grace: float = GRACE) -> Ended:
    """Wait for the ranks' end, and no longer than ``grace`` seconds for those that outlive one that failed."""
    codes = ranks.wait(TIMEOUT, grace)
    return Ended(codes, "\n".join(ranks.said(rank) for rank in range(ranks.size)))


def draw_pictures(folder: Path) -> None:
    """Write small smooth pictures."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(PICTURES):
        waves = np.sin(np.linspace(0, rng.uniform(2, 6), 20)[:, None, None] + rng.uniform(0, 6, (1, 20, 3)))
        PIL.Image.fromarray((127.5 * (1 + waves)).astype(np.uint8)).save(folder / f"{i:02d}.png")
