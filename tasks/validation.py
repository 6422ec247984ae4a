"""Measuring a classifier that is still trained on files it never learns from, and keeping its best weights."""

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn

from mmssl.checkpoint import checkpoints
from mmssl.data.listing import Listing
from mmssl.distributed import Council, World, world
from mmssl.engine import Engine
from mmssl.errors import MmsslError, NonFiniteLoss, UnusableData, UserError
from mmssl.files import LazyTensors, open_tensors, replacing_file, save_tensors, write_json
from mmssl.objectives.classify import Classify
from mmssl.run import Run
from modalities.classifier import Classifier
from tasks.features import DecodeOnly, Extractor, Features, NonFiniteFeatures, check_readable, compute
from tasks.labels import check_positive
from tasks.metrics import average_precision


class Validation(NamedTuple):
    """Labelled files to measure on while training."""

    files: Listing
    targets: np.ndarray[Any, Any]
    """Class indices int64 [n], or float32 [n, classes] of 0 and 1."""
    skip_broken: bool = False

    def fingerprint(self) -> str:
        """Return a text that another validation part does not have."""
        names = "\n".join(self.files.name(i) for i in range(len(self.files)))
        return hashlib.sha256(os.fsencode(names) + self.targets.tobytes()).hexdigest()


class Measure(NamedTuple):
    """One measurement; a greater score is better, and of equal scores the lower loss."""

    step: int
    score: float
    """Accuracy, or mAP where a file has several labels."""
    loss: float

    def beats(self, other: "Measure") -> bool:
        """Whether it is the better of two; NaN is worse than any number."""
        mine, others = (
            [-math.inf if math.isnan(value) else value for value in (one.score, -one.loss)] for one in (self, other)
        )
        return mine > others


class Validator:
    """The loop's ``validate`` hook: measures now and then, keeps the best weights, says when to stop.

    It works on a copy of the objective on each rank, filled with the engine's weights (their averages where there are
    any), so that it needs nothing of the engine but its state; each rank reads its share of the files.
    """

    def __init__(
        self, asked: Validation, objective: nn.Module, run: Run, every: int, steps: int, patience: int | None,
        averaged: bool,
    ) -> None:  # fmt: skip
        """Copy ``objective``, which no engine may have touched yet; ``every`` and ``steps`` are optimiser steps."""
        assert isinstance(objective, Classify)
        self.asked, self.run, self.every, self.steps, self.patience = asked, run, every, steps, patience
        self.copy = copy.deepcopy(objective).requires_grad_(False)
        self.classifier = Classifier.of(self.copy, list(objective.facts["classes"]))
        self.source = "ema/" if averaged else "param/"
        self.history: list[Measure] = []
        self.best: Measure | None = None

    def check(self, me: World, council: Council) -> None:
        """Decode every file once, so that a broken one is found before anything is trained. A collective.

        Raises UnusableData for a broken file unless it may be left out, UserError where none of the others has a label.
        """
        files = self.asked.files
        found = readable(self.classifier, files, self.asked.skip_broken)(me, council)
        check_positive(self.asked.targets[found.kept], files, "validation files that can be read")

    def attach(self, engine: Engine, me: World, council: Council, tell: Callable[[str], None]) -> None:
        """Say what is measured, with whom, and who hears of it."""
        self.engine, self.me, self.council, self.tell = engine, me, council, tell
        self.classifier.to(engine.device)

    def __call__(self, step: int) -> bool:
        """Measure after ``step`` steps if it is time; returns whether training should stop. A collective."""
        if step % self.every and step != self.steps:
            return False
        self._fill()
        measure = self._measure(step)
        self.history.append(measure)
        if self.best is None or measure.beats(self.best):
            self.best = measure
            self._keep()
        if self.me.is_main:
            write_json(self.run.path / "validation.json", self.facts())
            self._tell(measure)
        return self.enough

    @property
    def enough(self) -> bool:
        """Whether the last ``patience`` measurements brought no new best."""
        since = [measure for measure in self.history if self.best is not None and measure.step > self.best.step]
        return self.patience is not None and len(since) >= self.patience

    def _fill(self) -> None:
        own = {**dict(self.copy.named_parameters()), **dict(self.copy.named_buffers())}
        for name, tensor in self.engine.state():
            if name.startswith((self.source, "buffer/")):
                own[name.split("/", 1)[1]].data.copy_(tensor)

    def _measure(self, step: int) -> Measure:
        with finite(f"at step {step} the scores of the validation files"):
            found = shared_features(self.classifier, self.asked.files, self.asked.skip_broken, self.me, self.council)
        targets = torch.from_numpy(self.asked.targets[found.kept])
        if targets.ndim == 2:
            score = float(average_precision(found.vectors, targets).nanmean())
            loss = F.binary_cross_entropy_with_logits(found.vectors, targets)
        else:
            score = float((found.vectors.argmax(1) == targets).double().mean())
            loss = F.cross_entropy(found.vectors, targets)
        return Measure(step, score, float(loss))

    def _keep(self) -> None:
        problem = None
        if self.me.is_main:
            assert self.best is not None
            try:
                file = self._file(self.best.step)
                file.parent.mkdir(exist_ok=True)
                with replacing_file(file) as aside:
                    save_tensors(aside, self.copy.state_dict())
            except OSError as error:
                problem = error.strerror or str(error)
        if problem := self.council.gather(problem)[0]:
            raise MmsslError(f"{self.run.path / 'best'}: the best weights could not be written ({problem})")

    def _tell(self, measure: Measure) -> None:
        name = "mAP" if self.asked.targets.ndim == 2 else "accuracy"
        best = "the best so far" if measure == self.best else f"the best is step {self.best.step}" if self.best else ""
        self.tell(f"step {measure.step}: validation {name} {measure.score:.1%}, loss {measure.loss:.4f} ({best})")

    def _file(self, step: int) -> Path:
        return self.run.path / "best" / f"step-{step:08d}.safetensors"

    def weights(self) -> LazyTensors | None:
        """Return the best weights and buffers by name in the objective; None before the first measurement."""
        if self.best is None:
            return None
        file = self._file(self.best.step)
        try:
            return open_tensors(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: the best weights so far are not readable ({error})") from None

    def tidy(self) -> None:
        """Delete weights that are the best no more, but for those that a checkpoint names: a run may go on from it."""
        named = best_steps(self.run.checkpoints) | ({self.best.step} if self.best is not None else set())
        kept = {self._file(step) for step in named}
        for file in (self.run.path / "best").glob("step-*"):
            if file not in kept:
                file.unlink()

    def facts(self) -> dict[str, Any]:
        """Return where it stands, as JSON values, for checkpoints."""
        return {
            "files": len(self.asked.files),
            "fingerprint": self.asked.fingerprint(),
            "metric": "mAP" if self.asked.targets.ndim == 2 else "top1",
            "best_step": None if self.best is None else self.best.step,
            "history": [measure._asdict() for measure in self.history],
        }

    def restore(self, facts: dict[str, Any]) -> None:
        """Go on from what ``facts`` returned."""
        self.history = [Measure(**measure) for measure in facts["history"]]
        self.best = next((m for m in self.history if m.step == facts["best_step"]), None)
        if self.me.is_main:
            write_json(self.run.path / "validation.json", self.facts())


def best_steps(folder: Path) -> set[int]:
    """Return the steps whose weights were the best when a checkpoint in ``folder`` was written."""
    steps = set()
    for path in checkpoints(folder):
        try:
            facts = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
            steps.add(facts["validation"]["best_step"])
        except (OSError, ValueError, LookupError, TypeError):
            continue  # no run can go on from a checkpoint like that
    return steps - {None}


def read_validation(run: Run) -> dict[str, Any] | None:
    """Return what a run's validation found: ``Validator.facts``; None where there was none."""
    file = run.path / "validation.json"
    found: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found


@contextmanager
def finite(what: str) -> Iterator[None]:
    """Blame the training, and no file, where a trained model's scores, ``what`` in words, are NaN or infinite."""
    try:
        yield
    except NonFiniteFeatures:
        raise NonFiniteLoss(
            f"{what} are NaN or infinite: the training has diverged; lower optim.base_lr or set optim.clip"
        ) from None


def shared_features(
    encoder: Extractor, files: Listing, skip_broken: bool, me: World | None = None, council: Council | None = None
) -> Features:
    """Return what ``extract`` does, without a cache, each rank reading its share of the files. A collective.

    Raises UnusableData, on every rank alike, as ``extract``.
    """
    me = me or world()
    council = council or Council(me.size)
    mine = range(me.rank, len(files), me.size)
    problem, part = None, Features(torch.empty(0), [])
    try:
        if mine:
            part = compute(encoder, files.select(mine), skip_broken=skip_broken)
    except UnusableData as error:
        problem = error
    broken = sorted(set(range(len(mine))) - set(part.kept)) if part.skipped else []
    left_out = [(mine[i], entry) for i, entry in zip(broken, part.skipped, strict=True)]
    found = council.gather((problem, part.vectors, [mine[i] for i in part.kept], left_out))
    for problem, *_ in found:
        if problem is not None:
            raise problem
    kept = [index for _, _, indices, _ in found for index in indices]
    skipped = [entry for _, entry in sorted(pair for *_, pairs in found for pair in pairs)]
    check_readable(Features(torch.empty(0), kept, skipped), files)
    vectors = torch.cat([rows for _, rows, _, _ in found if len(rows)])[torch.tensor(kept).argsort()]
    return Features(vectors, sorted(kept), skipped)


def readable(encoder: Extractor, files: Listing, skip_broken: bool) -> Callable[[World, Council], Features]:
    """Return a collective that decodes every file once, so that a broken one is found before anything is trained.

    Raises as ``shared_features``.
    """
    return partial(shared_features, DecodeOnly(encoder), files, skip_broken)
