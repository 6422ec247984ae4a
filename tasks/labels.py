"""Labels for training: class indices or several labels per file, seeded parts of them, and a validation part.

Every part depends on (labels, seed) alone, so runs that are to be compared, from scratch or not, learn from the same.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmssl.data.fragment import real
from mmssl.data.listing import Listing
from mmssl.errors import UserError, nearest
from tasks.features import check_apart, class_targets, commonest_share

Array = np.ndarray[Any, Any]
"""Targets: class indices int64 [n], or float32 [n, classes] of 0 and 1."""


def file_targets(
    train: Listing, test: Listing, column: str = "label", separator: str | None = None
) -> tuple[list[str], Array, Array]:
    """Return the classes (the sorted training labels) and the targets of the training and the test files.

    With a ``separator`` a manifest's cell holds any number of labels, an empty cell none, and targets are float32
    [n, classes]. Raises UserError as ``class_targets``.
    """
    if separator is None:
        classes, *targets = class_targets(train, test, column)
        return classes, np.asarray(targets[0]), np.asarray(targets[1])
    sets = [label_sets(listing, column, separator) for listing in (train, test)]
    classes = sorted(set().union(*sets[0]))
    if len(classes) < 2:
        raise UserError(f"{train.root}: --multi-label needs at least two classes in '{column}', but found {classes}")
    check_known(sets[1], classes, test, train)
    check_apart(train, test)
    return classes, multi_hot(sets[0], classes), multi_hot(sets[1], classes)


def more_targets(
    listing: Listing, classes: list[str], train: Listing, column: str = "label", separator: str | None = None
) -> Array:
    """Return the targets of further files with the classes of ``train``; UserError for a label that is none of them."""
    if separator is not None:
        sets = label_sets(listing, column, separator)
        check_known(sets, classes, listing, train)
        return multi_hot(sets, classes)
    labels = listing.labels(column)
    check_known([{*labels}], classes, listing, train)
    number = {name: c for c, name in enumerate(classes)}
    return np.array([number[label] for label in labels])


def label_sets(listing: Listing, column: str, separator: str) -> list[set[str]]:
    """Return the labels of each file in a manifest's ``column``, separated by ``separator``."""
    if not separator:
        raise UserError("--separator is empty: give the character between two labels, such as '|'")
    if not listing.columns:
        raise UserError(f"{listing.root}: --multi-label needs a manifest with a '{column}' column, and there is none")
    if column not in listing.columns:
        raise UserError(f"{listing.root}: the manifest has no '{column}' column{nearest(column, listing.columns)}")
    cells = listing.columns[column]
    return [{label.strip() for label in (cell or "").split(separator)} - {""} for cell in cells]


def multi_hot(labels: Sequence[set[str]], classes: list[str]) -> Array:
    """Return float32 [n, classes], 1 where a file has the label."""
    number = {name: c for c, name in enumerate(classes)}
    targets = np.zeros((len(labels), len(classes)), np.float32)
    for row, names in zip(targets, labels, strict=True):
        row[[number[name] for name in names]] = 1
    return targets


def check_known(labels: Sequence[set[str]], classes: list[str], listing: Listing, train: Listing) -> None:
    """Raise UserError for a label that no training file has."""
    unseen = sorted(set().union(*labels) - set(classes))
    if unseen:
        more = f" and {len(unseen) - 3} more" if len(unseen) > 3 else ""
        words = ", ".join(f"'{label}'" for label in unseen[:3]) + more
        raise UserError(f"{listing.root}: no training sample in {train.root} has the label {words}")


def check_positive(targets: Array, listing: Listing, what: str) -> None:
    """Raise UserError where files can have several labels and none of them has any: there is no mAP then."""
    if targets.ndim == 2 and not targets.any():
        raise UserError(f"{listing.root}: none of the {len(targets)} {what} has a label, and mAP needs at least one")


def percentage(text: str, option: str) -> float:
    """Return "10%" as 0.1; raises UserError for another form, 0% or more than 100%."""
    try:
        fraction = float(text.removesuffix("%")) / 100
    except ValueError:
        fraction = -1.0
    if not text.endswith("%") or not 0 < fraction <= 1:
        raise UserError(f"{option} {text}: give a percentage from above 0% to 100%, such as 1% or 10%")
    return fraction


def subset(targets: Sequence[int] | Array, labels: str | None, shots: int | None, seed: int) -> list[int] | None:
    """Return the indices of a seeded part of the labels, in order; None for all of them.

    ``labels`` is a percentage such as "1%": of each class, rounded, at least one; where files have several labels, of
    the files, every class at least once if that many files suffice. ``shots`` is a number per class. Raises UserError
    for a malformed or impossible one.
    """
    if labels is not None and shots is not None:
        raise UserError("--labels and --shots exclude each other")
    if labels is None and shots is None:
        return None
    targets, rng = np.asarray(targets), np.random.default_rng([seed, 1])
    if targets.ndim == 2:
        if labels is None:
            raise UserError(f"--shots {shots}: files with several labels have no number per class; use --labels 10%")
        return covering(targets, max(1, round(percentage(labels, "--labels") * len(targets))), rng)
    groups = by_class(targets)
    if shots is not None:
        least = min(len(group) for group in groups)
        if not 1 <= shots <= least:
            raise UserError(f"--shots {shots}: give a number from 1 to {least}, the size of the smallest class")
        counts = [shots] * len(groups)
    else:
        assert labels is not None
        fraction = percentage(labels, "--labels")
        counts = [max(1, round(fraction * len(group))) for group in groups]
    return drawn(groups, counts, rng)


def held_out(targets: Array, part: str, seed: int, paths: Sequence[str]) -> list[int]:
    """Return the indices of a seeded validation part, in order: ``part``, such as "10%", of each class.

    It takes at least one file of every class that has two, and leaves at least one of each; where files have several
    labels, what is left keeps every class. A file that is listed more than once (by whatever spelling or link) is held
    out with all its rows or not at all, and never where those contradict each other. Raises UserError where nothing can
    be held out.
    """
    fraction, rng = percentage(part, "--validation"), np.random.default_rng([seed, 2])
    files = rows_of_files(paths)
    if targets.ndim == 2:
        labels = np.stack([targets[rows].max(0) for rows in files])
        count = max(1, round(fraction * len(files)))
        kept = covering(labels, len(files) - count, rng) if count < len(files) else []
        held = sorted(set(range(len(files))) - set(kept)) if kept else []
    else:
        files = [rows for rows in files if len({*targets[rows].tolist()}) == 1]
        groups = by_class(np.array([targets[rows[0]] for rows in files])) if files else []
        counts = [max(0, min(max(1, round(fraction * len(group))), len(group) - 1)) for group in groups]
        held = drawn(groups, counts, rng) if files else []
    if not held:
        raise UserError(f"--validation {part}: too few training files ({len(targets)}) to hold any out")
    return sorted(row for i in held for row in files[i])


def rows_of_files(paths: Sequence[str]) -> list[list[int]]:
    """Return for every file that ``paths`` lead to, in order of first appearance, the indices of those that do."""
    rows: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        rows.setdefault(real(path).file, []).append(i)
    return list(rows.values())


def by_class(targets: Array) -> list[Array]:
    """Return the indices of each class's files."""
    return [np.flatnonzero(targets == c) for c in range(int(targets.max()) + 1)]


def drawn(groups: Sequence[Array], counts: Sequence[int], rng: np.random.Generator) -> list[int]:
    """Return so many indices of each group, drawn without replacement, in order."""
    picks = [rng.permutation(group)[:count] for group, count in zip(groups, counts, strict=True)]
    return sorted(int(i) for i in np.concatenate(picks))


def covering(targets: Array, count: int, rng: np.random.Generator) -> list[int]:
    """Return ``count`` indices of multi-label files [n, classes], in order, with every class among them if they do.

    The rarest classes choose first, each a random file, if none chosen before has it; the rest is random.
    """
    order = rng.permutation(len(targets))
    chosen: dict[int, None] = {}
    for c in np.argsort(targets.sum(0), kind="stable"):
        having = [int(i) for i in order if targets[i, c]]
        if having and chosen.keys().isdisjoint(having):
            chosen[having[0]] = None
    chosen |= dict.fromkeys(order.tolist())
    return sorted(list(chosen)[:count])


def balanced_weights(targets: Array, classes: int) -> list[float]:
    """Return n / (classes x n_c) for the classes of n targets int64 [n], each of which has some: mean 1 over them."""
    counts = np.bincount(targets, minlength=classes)
    return [float(weight) for weight in len(targets) / (classes * counts)]


def blind_score(train: Array, test: Array) -> float:
    """Return what guessing blindly scores.

    It is the share of the commonest training class in the test files; where files have several labels, the mean share
    of files that have a label, over the labels that any has: the mAP of a random order.
    """
    if train.ndim == 2:
        share = test.mean(0)
        return float(share[share > 0].mean()) if share.any() else math.nan
    return commonest_share(train.tolist(), test.tolist())
