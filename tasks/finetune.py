"""Fine-tuning: all weights of an encoder and a linear head on a few labels, then measured on a test set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from mmssl.config import override
from mmssl.data.listing import Listing
from mmssl.distributed import world
from mmssl.errors import UserError
from mmssl.files import write_json
from mmssl.objectives.classify import Classify
from mmssl.run import Run
from modalities.encoder import Encoder
from tasks.build import Recipe, parse_recipe
from tasks.features import Extractor, Samples, class_targets, commonest_share, extract
from tasks.fit import fit, load_objective
from tasks.initial import Weights
from tasks.metrics import Score, classification_scores, score_table, scores_as_dict
from tasks.report import Table, write_report
from tasks.run_report import run_sections

DEFAULTS: dict[str, Any] = {
    # MAE's fine-tuning of ViT-B (arXiv:2111.06377, table 9) where it does not depend on ImageNet's size.
    "objective": {"name": "classify", "label_smoothing": 0.1},
    "optim": {"base_lr": 5e-4, "betas": [0.9, 0.999], "weight_decay": 0.05, "layer_decay": 0.65, "warmup": 0.05},
    "train": {"epochs": 100},
}
LARGEST_BATCH = 256
FIXED = {
    "train.init_from": "fine-tuning starts from ENCODER, or with --scratch from random weights",
    "objective.name": "fine-tuning classifies",
    "objective.classes": "the classes are the sorted training labels",
}


@dataclass(frozen=True)
class FinetuneResult:
    """What fine-tuning reached, and from where."""

    scores: dict[str, Score]
    run: Path
    start: Literal["pre-trained", "scratch"]
    labels: str
    """How many labels, in words."""
    seed: int
    steps: int
    samples: Samples

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON; scores are fractions."""
        return {
            "task": "finetune",
            "scores": scores_as_dict(self.scores),
            "protocol": {"start": self.start, "labels": self.labels, "seed": self.seed, "steps": self.steps},
            "run": str(self.run),
            **self.samples.as_dict(),
        }

    def render(self, console: Console) -> None:
        """Print one table and what a reader must know."""
        console.print(score_table("fine-tuning", {f"{self.start}, {self.labels}": self.scores}))
        console.print(f"{self.samples}; {self.steps} steps, seed {self.seed}; run in {self.run}", markup=False)


def finetune(
    encoder: Encoder,
    train: Listing,
    test: Listing,
    out: str | Path,
    *,
    label_column: str = "label",
    labels: str | None = None,
    shots: int | None = None,
    scratch: bool = False,
    skip_broken: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> FinetuneResult:
    """Fine-tune ``encoder`` on ``train`` into the run folder ``out`` and measure it on ``test``.

    ``labels`` ("1%") or ``shots`` (per class) take a seeded, stratified part of the training labels, the same for the
    same ``train.seed``; ``scratch`` starts the same architecture from random weights, which is the baseline. Raises
    UserError for a mistake, UnusableData for a broken test file unless ``skip_broken``.
    """
    classes, targets, test_targets = class_targets(train, test, label_column)
    for key, reason in FIXED.items():
        if key in (overrides or {}):
            raise UserError(f"{key} cannot be set here: {reason}")
    seed = finetune_recipe(encoder, classes, overrides or {}, len(targets)).train.seed
    chosen = subset(targets, labels, shots, seed)
    if chosen is not None:
        train, targets = train.select(chosen), [targets[i] for i in chosen]
    recipe = finetune_recipe(encoder, classes, overrides or {}, len(targets))
    state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    initial = None if scratch else Weights(state, "the encoder", encoder.tokenizer.grid)
    run = Run(out)
    fit(recipe, train, run, np.asarray(targets), initial)
    scores, samples = evaluate(run, test, test_targets, classes, targets, skip_broken)
    steps = recipe.steps(len(targets))
    words = f"{shots} labels per class" if shots else f"{labels} of the labels" if labels else "all labels"
    result = FinetuneResult(scores, run.path, "scratch" if scratch else "pre-trained", words, seed, steps, samples)
    if world().is_main:
        write_json(run.path / "finetune.json", result.as_dict())
        report(run, result, train)
    return result


def report(run: Run, result: FinetuneResult, train: Listing) -> None:
    """Write the run's report: the scores first."""
    note = f"On {result.samples.test} test files, with 95 % bootstrap intervals."
    table = Table(
        "Scores",
        note,
        ["", *(name.replace("_", " ") for name in result.scores)],
        [[f"{result.start}, {result.labels}", *result.scores.values()]],
    )
    subtitle = f"{result.samples.train} labels of {len(result.samples.classes)} classes, {result.start}"
    write_report(run.report_file, f"{run.path.name}: fine-tuned", subtitle, [table, *run_sections(run, train)])


def finetune_recipe(encoder: Encoder, classes: list[str], overrides: Mapping[str, Any], samples: int) -> Recipe:
    """Return the recipe of a fine-tuning run: the encoder's own settings, the defaults and ``overrides``."""
    base = {**DEFAULTS, **encoder.config.model_dump(mode="json", include={"modality", "signal", "model"})}
    base["objective"] = {**DEFAULTS["objective"], "classes": classes}
    base["train"] = {**DEFAULTS["train"], "batch_size": min(LARGEST_BATCH, samples)}
    return parse_recipe(override(base, overrides), "finetune")


def subset(targets: Sequence[int], labels: str | None, shots: int | None, seed: int) -> list[int] | None:
    """Return the indices of a seeded part of the labels, stratified by class, in order; None for all of them.

    ``labels`` is a percentage such as "1%" of each class, rounded, at least one each; ``shots`` a number per class.
    Raises UserError for a malformed or impossible one.
    """
    if labels is not None and shots is not None:
        raise UserError("--labels and --shots exclude each other")
    if labels is None and shots is None:
        return None
    groups = [np.flatnonzero(np.asarray(targets) == c) for c in range(max(targets) + 1)]
    if shots is not None:
        least = min(len(group) for group in groups)
        if not 1 <= shots <= least:
            raise UserError(f"--shots {shots}: give a number from 1 to {least}, the size of the smallest class")
        counts = [shots] * len(groups)
    else:
        assert labels is not None
        try:
            fraction = float(labels.removesuffix("%")) / 100
        except ValueError:
            fraction = -1.0
        if not labels.endswith("%") or not 0 < fraction <= 1:
            raise UserError(f"--labels {labels}: give a percentage from above 0% to 100%, such as 1% or 10%")
        counts = [max(1, round(fraction * len(group))) for group in groups]
    rng = np.random.default_rng([seed, 1])
    picks = [rng.permutation(group)[:count] for group, count in zip(groups, counts, strict=True)]
    return sorted(int(i) for i in np.concatenate(picks))


class Logits:
    """Stands in for an encoder where features are extracted: a fine-tuned classifier's scores."""

    def __init__(self, objective: Classify, encoder: Encoder) -> None:
        self.objective = objective
        self.decode, self.transform, self.fingerprint = encoder.decode, encoder.transform, encoder.fingerprint

    @torch.no_grad()
    def features(self, signal: Tensor) -> Tensor:
        """Return class scores [B, classes]."""
        return self.objective.logits({"signal": signal}).float()


def evaluate(
    run: Run, test: Listing, targets: Sequence[int], classes: list[str], trained_on: Sequence[int], skip_broken: bool
) -> tuple[dict[str, Score], Samples]:
    """Measure a fine-tuned run on test files."""
    _, objective = load_objective(run.path)
    assert isinstance(objective, Classify)
    encoder = objective.encoder
    assert isinstance(encoder, Encoder)
    stand_in: Extractor = Logits(objective, encoder)
    features = extract(stand_in, test, skip_broken=skip_broken, cache=None)
    kept = [targets[i] for i in features.kept]
    scores = classification_scores(features.vectors, torch.tensor(kept))
    guess = commonest_share(trained_on, kept)
    return scores, Samples(len(trained_on), len(kept), classes, guess, features.skipped)
