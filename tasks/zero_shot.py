"""Zero-shot classification of files, and of a labelled test set: how often class names alone are enough."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from mmssl.data.listing import Listing
from mmssl.errors import UserError
from mmssl.files import write_json
from tasks.features import ExtractOptions, Features, Samples, commonest_share, extract
from tasks.finetune import recall
from tasks.finetune_result import Measured
from tasks.metrics import accuracy, classification_scores
from tasks.predict import checked, listed, write
from tasks.zero_shot_classifier import ZeroShotClassifier
from tasks.zero_shot_result import (
    OpenSet,
    ZeroShotPredictions,
    ZeroShotResult,
    calibration_error,
    most_mistaken,
)

NAMED = 3
"""So many labels that are no class are named in a sentence."""


def name_files(
    classifier: ZeroShotClassifier,
    paths: Sequence[str | Path],
    *,
    top: int = 5,
    out: str | Path | None = None,
    split: str | None = None,
    skip_broken: bool = False,
) -> ZeroShotPredictions:
    """Classify files, and all files of folders and manifests; arguments, files and errors as ``tasks.predict``."""
    if top < 1:
        raise UserError(f"--top {top}: give a number from 1")
    out = None if out is None else checked(Path(out))
    # Of a classifier it asks for the encoder, to know the modality.
    files, names = listed(classifier.reader.encoder.kind, paths, split)
    found = extract(classifier, files, skip_broken=skip_broken, cache=None)
    kept = set(found.kept)
    left = [names[i] for i in range(len(files)) if i not in kept]
    result = ZeroShotPredictions(
        [(names[i], one) for i, one in zip(found.kept, classifier.ranked(found.vectors, top), strict=True)],
        [(name, reason) for name, (_, reason) in zip(left, found.skipped, strict=True)],
        out,
        classifier.threshold,
    )
    if out is not None:
        write(result, out)
    return result


def zero_shot(
    classifier: ZeroShotClassifier,
    test: Listing,
    label_column: str = "label",
    out: str | Path | None = None,
    seed: int = 0,
    **options: Unpack[ExtractOptions],
) -> ZeroShotResult:
    """Classify labelled test files by class names alone; ``seed`` is that of the intervals.

    Where ``out`` is given, a folder, the result is written there as ``zero-shot.json`` and ``report.html``. Raises
    UserError for a label that is no class, before any file is read, and as ``extract``.
    """
    targets = class_numbers(test, label_column, classifier.classes)
    folder = None if out is None else Path(out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    vectors = extract(classifier.reader, test, **options)
    result = _measured(classifier, vectors, torch.tensor(targets)[vectors.kept], seed)
    if folder is not None:
        write_json(folder / "zero-shot.json", result.as_dict())
        result.report(folder / "report.html", str(test.root))
    return result


def class_numbers(test: Listing, label_column: str, classes: Sequence[str]) -> list[int]:
    """Return the class of every file; raises UserError for fewer than two classes and for labels that are none."""
    labels = test.labels(label_column)
    number = {name: i for i, name in enumerate(classes)}
    if len(number) < 2:
        raise UserError(f"{test.root}: of one class, '{classes[0]}', every file is; accuracy needs at least two")
    unknown = sorted(set(labels) - set(number))
    if unknown:
        more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
        words = ", ".join(f"'{label}'" for label in unknown[:NAMED])
        raise UserError(f"{test.root}: no class is given for the label{'s' if len(unknown) > 1 else ''} {words}{more}")
    return [number[label] for label in labels]


def _measured(classifier: ZeroShotClassifier, found: Features, target: Tensor, seed: int) -> ZeroShotResult:
    classes = classifier.classes
    # Scores saturate, similarities do not: these decide the order.
    similarities = found.vectors @ classifier.class_vectors.T
    best = similarities.argmax(1)
    right = best == target
    confidence = classifier.probabilities(similarities).gather(1, best[:, None]).squeeze(1)
    counts = target.tolist()
    samples = Samples(0, len(target), classes, commonest_share(counts, counts), found.skipped)
    per_class = {name: recall(right[target == c]) for c, name in enumerate(classes)}
    return ZeroShotResult(
        Measured(classification_scores(similarities, target, seed), per_class, samples),
        {
            one: classification_scores(found.vectors @ classifier.of_template(i).T, target, seed)["top1"]
            for i, one in enumerate(classifier.templates)
        },
        calibration_error(confidence, right),
        most_mistaken(best, target, classes),
        _open_set(classifier.threshold, confidence, right),
        protocol(classifier),
    )


def _open_set(threshold: float | None, confidence: Tensor, right: Tensor) -> OpenSet | None:
    if threshold is None:
        return None
    rejected = confidence < threshold
    return OpenSet(threshold, accuracy(rejected), None if rejected.all() else accuracy(right[~rejected]))


def protocol(classifier: ZeroShotClassifier) -> dict[str, Any]:
    """Return how files are scored, for JSON."""
    return {
        "modality": classifier.modality,
        "templates": list(classifier.templates),
        "similarity": "cosine",
        "scores": "softmax" if classifier.bias is None else "sigmoid",
        "temperature": 1 / classifier.scale,
        "bias": classifier.bias,
    }
