"""Fine-tuning: an encoder, or its last blocks, and a head on labelled files, then measured on a test set."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import torch

from mmssl.data.listing import Listing
from mmssl.distributed import world
from mmssl.errors import UserError
from mmssl.files import write_json
from mmssl.objectives.classify import ClassifyConfig
from mmssl.run import Run
from modalities.classifier import Classifier
from modalities.encoder import Encoder
from tasks.build import Recipe, default_device
from tasks.features import Samples, check_disjoint
from tasks.finetune_protocols import finetune_recipe
from tasks.finetune_result import ClassScore, FinetuneResult, Measured, SeedsResult
from tasks.fit import fit
from tasks.initial import Weights
from tasks.labels import (
    Array,
    balanced_weights,
    blind_score,
    check_positive,
    file_targets,
    held_out,
    more_targets,
    subset,
)
from tasks.metrics import Score, accuracy, average_precision_scores, classification_scores
from tasks.validation import Validation, finite, read_validation, readable, shared_features


class FinetuneOptions(TypedDict, total=False):
    """The options of ``finetune``."""

    label_column: str
    labels: str | None
    shots: int | None
    scratch: bool
    protocol: str
    validation: str | Listing | None
    multi_label: bool
    separator: str
    skip_broken: bool
    overrides: Mapping[str, Any] | None
    deepspeed_config: str | None


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
    protocol: str = "plain",
    validation: str | Listing | None = None,
    multi_label: bool = False,
    separator: str = "|",
    skip_broken: bool = False,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    deepspeed_config: str | None = None,
) -> FinetuneResult:
    """Fine-tune ``encoder`` on ``train`` into the run folder ``out`` and measure it on ``test``.

    ``labels`` ("1%") or ``shots`` (per class) take a seeded, stratified part of the training labels, the same for the
    same ``train.seed``; ``scratch`` starts the same architecture from random weights, which is the baseline.
    ``validation`` is a part of what is left ("10%"), held out, or other files: the weights that do best on it are kept.
    ``protocol`` names the settings, ``overrides`` change them. With ``multi_label`` a manifest's label cell holds any
    number of labels, separated by ``separator``. What is left is an encoder and a ``Classifier`` in the run folder.

    Raises UserError for a mistake, UnusableData for a broken test file unless ``skip_broken``.
    """
    overrides, mark = overrides or {}, separator if multi_label else None
    classes, targets, test_targets = file_targets(train, test, label_column, mark)
    seed = finetune_recipe(encoder, classes, overrides, len(targets), protocol, multi_label)[0].train.seed
    chosen = subset(targets, labels, shots, seed)
    if chosen is not None:
        train, targets = train.select(chosen), targets[chosen]
    read = partial(more_targets, classes=classes, train=train, column=label_column, separator=mark)
    train, targets, apart = set_apart(train, test, targets, validation, seed, read)
    check_positive(test_targets, test, "test files")
    if apart is not None:
        check_positive(apart[1], apart[0], "validation files")
    measured_on = None if apart is None else Validation(*apart, skip_broken)
    check_measured(overrides, measured_on)
    recipe, settings = finetune_recipe(encoder, classes, overrides, len(targets), protocol, multi_label)
    run = Run(out)
    fit(
        counted(recipe, targets), train, run, targets, None if scratch else weights_of(encoder), resume,
        deepspeed_config, measured_on, readable(encoder, test, skip_broken),
    )  # fmt: skip
    result = FinetuneResult(
        measure(run, test, test_targets, targets, skip_broken),
        run.path,
        "scratch" if scratch else "pre-trained",
        f"{shots} labels per class" if shots else f"{labels} of the labels" if labels else "all labels",
        seed,
        run.metrics()[-1]["step"],
        settings,
        None if measured_on is None else read_validation(run),
    )
    if world().is_main:
        write_json(run.path / "finetune.json", result.as_dict())
        result.report(train)
    return result


def set_apart(
    train: Listing,
    test: Listing,
    targets: Array,
    validation: str | Listing | None,
    seed: int,
    read: Callable[[Listing], Array],
) -> tuple[Listing, Array, tuple[Listing, Array] | None]:
    """Return the files to train on with their targets, and those to validate on: a part held out, or other files."""
    if isinstance(validation, Listing):
        check_disjoint(validation, train, "both the validation and the training set")
        check_disjoint(validation, test, "both the validation and the test set")
        return train, targets, (validation, read(validation))
    if validation is None:
        return train, targets, None
    held = held_out(targets, validation, seed, train.paths)
    rest = np.setdiff1d(np.arange(len(targets)), held)
    return train.select(rest.tolist()), targets[rest], (train.select(held), targets[held])


def finetune_seeds(
    encoder: Encoder,
    train: Listing,
    test: Listing,
    out: str | Path,
    seeds: Sequence[int],
    resume: bool = False,
    **options: Unpack[FinetuneOptions],
) -> SeedsResult:
    """Fine-tune once per seed into ``out``/seed-N, each with its own labels, and put the scores side by side."""
    out = Path(out)
    overrides = options.get("overrides") or {}
    if len(parse_seeds(",".join(map(str, seeds)), overrides)) < 2:
        raise UserError("one seed has no deviation; give two or more")
    folders = [out / f"seed-{seed}" for seed in seeds]
    # Looked up before any rank makes a folder (which ``fit`` does when it has heard of all), so that all decide alike.
    begun = [resume and (i == 0 or Run(folder).config_file.exists()) for i, folder in enumerate(folders)]
    if not resume and out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give --resume to continue it or another --out")
    runs = []
    for seed, folder, again in zip(seeds, folders, begun, strict=True):
        options["overrides"] = {**overrides, "train.seed": seed}
        runs.append(finetune(encoder, train, test, folder, resume=again, **options))
    result = SeedsResult(runs, out)
    if world().is_main:
        write_json(out / "finetune.json", result.as_dict())
        result.report()
    return result


def parse_seeds(text: str | None, overrides: Mapping[str, Any]) -> list[int]:
    """Return the seeds in "0,1,2", none for None; UserError for anything else and for one that is set twice."""
    if text is None:
        return []
    if "train.seed" in overrides:
        raise UserError("train.seed is what --seeds sets; give one of them")
    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(f"--seeds {text}: give different whole numbers separated by commas, such as 0,1,2")
    return seeds


def check_measured(overrides: Mapping[str, Any], measured_on: Validation | None) -> None:
    """Raise UserError for settings of a validation that there is not."""
    for key in ("train.patience", "train.validate_every"):
        if key in overrides and measured_on is None:
            raise UserError(f"{key} needs files to measure on: give --validation 10% or --validation-split NAME")


def counted(recipe: Recipe, targets: Array) -> Recipe:
    """Return the recipe with balanced class weights as numbers, so that the run folder needs no labels."""
    objective = recipe.objective
    assert isinstance(objective, ClassifyConfig)
    if objective.class_weights != "balanced":
        return recipe
    weights = balanced_weights(targets, len(objective.classes))
    return recipe.model_copy(update={"objective": objective.model_copy(update={"class_weights": weights})})


def weights_of(encoder: Encoder) -> Weights:
    """Return an encoder's weights as what a run starts from."""
    tensors = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    return Weights(tensors, "the encoder", {"encoder.": encoder.tokenizer.grid})


def measure(run: Run, test: Listing, targets: Array, trained_on: Array, skip_broken: bool = False) -> Measured:
    """Measure a run's classifier on test files, as ``predict`` uses it; every rank of a run reads its share.

    ``targets`` are those of the test files, ``trained_on`` of the training files. Raises UnusableData for a broken file
    unless ``skip_broken``, UserError where no other has a label, NonFiniteLoss for a model that has diverged.
    """
    classifier = Classifier(run.path).to(default_device())
    with finite("the trained model's scores of the test files"):
        found = shared_features(classifier, test, skip_broken)
    targets, classes = targets[found.kept], classifier.classes
    check_positive(targets, test, "test files that can be read")
    samples = Samples(len(trained_on), len(targets), classes, blind_score(trained_on, targets), found.skipped)
    target = torch.from_numpy(targets)
    if classifier.multi_label:
        score, scores = average_precision_scores(found.vectors, target)
        counts = targets.sum(0).astype(int).tolist()
        per_class = {name: ClassScore(*one) for name, *one in zip(classes, scores, counts, strict=True)}
        return Measured({"mAP": score}, per_class, samples, True)
    right = found.vectors.argmax(1) == target
    per_class = {name: recall(right[target == c]) for c, name in enumerate(classes)}
    return Measured(classification_scores(found.vectors, target), per_class, samples)


def recall(right: torch.Tensor) -> ClassScore:
    """Return the share of a class's files that are recognised."""
    nothing = Score(float("nan"), float("nan"), float("nan"))
    return ClassScore(accuracy(right) if len(right) else nothing, len(right))


def evaluate(
    run: Run, test: Listing, targets: Sequence[int], classes: list[str], trained_on: Sequence[int], skip_broken: bool
) -> tuple[dict[str, Score], Samples]:
    """Measure a run's classifier of one label per file on test files: the scores, and what they were measured on."""
    measured = measure(run, test, np.asarray(targets), np.asarray(trained_on), skip_broken)
    assert measured.samples.classes == classes
    return measured.scores, measured.samples


if __name__ == "__main__":
    # Run as a script by the launcher: the application is imported under its own name, or its classes would exist twice.
    import sys

    from mmssl.distributed import leave
    from tasks.cli import main

    leave(main(["finetune", *sys.argv[1:]]))
