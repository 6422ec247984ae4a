"""What looks at a run while it trains: its encoders' features, what the metrics say of it, and TensorBoard."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from mmssl.cards import recognised
from mmssl.contracts import Batch, Warns
from mmssl.cost import Cost
from mmssl.distributed import Council, World
from mmssl.engine.loop import Pace
from mmssl.health import Features
from mmssl.run import Run
from mmssl.verdict import History, Verdict, verdict
from tasks.board import FOLDER, Board
from tasks.build import Recipe, default_device, measure_cost, parse_recipe, precision, sketch_objective

COSTS = ("optim", "train", "data", "checkpoint")
"""Sections of a recipe that do not change what a sample costs."""


class Monitor:
    """Adds to a run's lines of metrics what its encoders are like, and tells bad signs once each."""

    def __init__(
        self, run: Run, recipe: Recipe, objective: nn.Module, me: World, council: Council, steps: int,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.run, self.recipe, self.objective, self.me, self.say = run, recipe, objective, me, say
        self.steps, self.start = steps, 0
        self.features = Features(objective, me, council, self._due)
        self.history, self.told = History(steps), set[str]()
        self.board: Board | None = None

    def _due(self, done: int) -> bool:
        return done % self.recipe.train.log_every == 0 or done in (self.start + 1, self.steps)

    def resume(self, step: int) -> None:
        """Go on after ``step`` steps, of which the run folder has the metrics."""
        self.start = step
        for line in self.run.metrics():
            self.history.add(line)

    def before(self, step: int) -> None:
        """A step begins, after this many."""
        self.features.before(step)

    def after(self, step: int, micros: Sequence[Batch]) -> None:
        """A step was taken. A collective."""
        self.features.after(step, micros)

    def see(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """Return a line with what is known besides, after telling what is bad in it and was not told before."""
        whole = {**line, **self.features.metrics}
        self.history.add(whole)
        if isinstance(self.objective, Warns) and (warning := self.objective.warning(whole)) is not None:
            self._tell("objective", warning)
        for finding in self.verdict().findings:
            self._tell(finding.key, f"at step {line['step']}, {finding}")
        return whole

    def _tell(self, key: str, sentence: str) -> None:
        if key not in self.told:
            self.told.add(key)
            self.say(sentence)

    def show(self, line: Mapping[str, Any]) -> None:
        """Write a line for TensorBoard, where that is asked for."""
        if self.recipe.train.tensorboard and self.board is None:
            self.board = Board(self.run.path / FOLDER, self.start)
        if self.board is not None:
            self.board.write(line)

    def verdict(self) -> Verdict:
        """Return what can be said of the run so far."""
        return verdict(self.history)

    def finish(self) -> None:
        """Tell how the run was."""
        if self.board is not None:
            self.board.close()
        if self.history.recent:
            self.say(str(self.verdict()))


def cost_of(recipe: Recipe) -> Cost:
    """Return what one sample of a recipe costs; measured once for all runs that differ in their training only."""
    page = recipe.as_dict()
    return _cost(json.dumps({key: value for key, value in page.items() if key not in COSTS}, sort_keys=True))


@lru_cache(maxsize=64)
def _cost(page: str) -> Cost:
    recipe = parse_recipe({**json.loads(page), "train": {"steps": 1}}, "the recipe")
    # Of one sample, which is not mixed with another as in fine-tuning.
    return measure_cost(recipe, sketch_objective(recipe).eval())


def pace_of(recipe: Recipe, me: World) -> Pace | None:
    """Return what the loop needs to say how fast it is; on rank 0, which alone talks."""
    if not me.is_main:
        return None
    device, peak = default_device(), None
    if device.type == "cuda" and (card := recognised(torch.cuda.get_device_name())) is not None:
        peak = card.tflops.get(precision(recipe, device))
    return Pace(cost_of(recipe).gflop_train, None if peak is None else 1e3 * peak * me.size)
