"""Linear probe, protocol ``logistic``: L2-regularised multinomial logistic regression on frozen, standardised features.

The optimum is unique, so there is nothing to tune but the regularisation, which part of the training samples chooses.
``tasks.probe_protocols`` has the protocols of papers, which are other numbers.
"""

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from rich.console import Console
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupShuffleSplit, train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mmssl.data.listing import Listing
from mmssl.errors import UserError
from tasks.features import ExtractOptions, Extractor, Labelled, Samples, labelled_features
from tasks.metrics import Score, classification_scores, score_table, scores_as_dict

GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)
"""Inverse strengths of the regularisation (scikit-learn's C) that are tried, from strong to weak."""

HOLD_OUT = 0.2
"""Share of the training samples that chooses among them."""

MAX_ITER = 2000
TOLERANCE = 1e-5
"""Largest gradient at which a fit has converged. At scikit-learn's 1e-4 a warm start from the last strength can already
count as converged, and weak regularisation would never be tried."""

Array = np.ndarray[Any, Any]


class LogisticProbe:
    """Logistic regression on features scaled by the mean and deviation of what it is fitted on."""

    def __init__(self, vectors: Tensor, targets: Tensor) -> None:
        """Take the features [n, d] and the class indices int64 [n] to fit."""
        # In float32 the line search stalls before the gradient is small; float64 needs fewer steps and less time.
        inputs = vectors.double().numpy()
        self._scaler = StandardScaler().fit(inputs)
        self._inputs, self._targets = self._scaler.transform(inputs), targets.numpy()
        self.model = LogisticRegression(max_iter=MAX_ITER, tol=TOLERANCE, warm_start=True)
        self.converged = False

    def fit(self, c: float, start: LogisticRegression | None = None) -> LogisticRegression:
        """Fit with inverse regularisation ``c``, from where ``start`` or else the last fit ended; return a copy."""
        if start is not None and np.array_equal(start.classes_, np.unique(self._targets)):
            self.model = copy.copy(start)
        self.model.set_params(C=c)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.model.fit(self._inputs, self._targets)
        self.converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
        return copy.copy(self.model)

    @property
    def iterations(self) -> int:
        """How many steps the last fit took."""
        return int(np.max(self.model.n_iter_))

    def scores(self, vectors: Tensor, num_classes: int) -> Tensor:
        """Return class scores float64 [n, C]; a class that had no sample to fit is never chosen."""
        decision = self.model.decision_function(self._scaler.transform(vectors.double().numpy()))
        if decision.ndim == 1:  # two classes: scikit-learn has one score, for the second
            decision = np.stack([-decision, decision], axis=1)
        scores = torch.full((len(vectors), num_classes), -math.inf, dtype=torch.float64)
        scores[:, torch.from_numpy(self.model.classes_)] = torch.from_numpy(decision)
        return scores


@dataclass(frozen=True)
class Choice:
    """How the regularisation was chosen on held-out training samples."""

    c: float
    hold_out: int
    """Samples held out."""
    stratified: bool
    accuracy: dict[float, float]
    """Held-out accuracy of every strength of the grid that was tried."""
    model: LogisticRegression
    """The fit with ``c`` on the samples that were not held out."""


def choose(
    vectors: Tensor, targets: Tensor, seed: int = 0, groups: Tensor | None = None, patience: int = len(GRID)
) -> Choice:
    """Choose the regularisation of training features [n, d] with class indices int64 [n] by held-out accuracy.

    A fifth of the samples is held out, as many of each class as its share and at least one; where a class has a single
    sample, a fifth of all; of samples in two or more ``groups`` int64 [n], such as the frames of files, a fifth of the
    groups. Of equal accuracies the strongest regularisation is taken. Nothing weaker is tried where so many in a row
    (``patience``) were worse than the best. Raises UserError where fewer than two classes are left to fit.
    """
    fit, out, stratified = _halves(targets.numpy(), seed, None if groups is None else groups.numpy())
    if len(targets[fit].unique()) < 2:
        classes = len(targets.unique())
        raise UserError(f"{len(targets)} training samples of {classes} classes are too few for a linear probe")
    probe = LogisticProbe(vectors[fit], targets[fit])
    accuracy: dict[float, float] = {}
    best, model, worse = GRID[0], probe.model, 0
    for c in GRID:
        fitted = probe.fit(c)
        guesses = probe.scores(vectors[out], int(targets.max()) + 1).argmax(1)
        accuracy[c] = float((guesses == targets[out]).double().mean())
        worse = worse + 1 if accuracy[c] < accuracy[best] else 0
        if c == GRID[0] or accuracy[c] > accuracy[best]:
            best, model = c, fitted
        if worse == patience:
            break
    return Choice(best, len(out), stratified, accuracy, model)


def _halves(targets: Array, seed: int, groups: Array | None) -> tuple[Array, Array, bool]:
    """Return the indices to fit and to hold out, and whether those are stratified."""
    if groups is not None and len(np.unique(groups)) > 1:
        split = GroupShuffleSplit(1, test_size=HOLD_OUT, random_state=seed)
        fit, out = next(split.split(targets, groups=groups))
        return fit, out, False
    _, counts = np.unique(targets, return_counts=True)
    stratified = bool(counts.min() >= 2)
    held = math.ceil(HOLD_OUT * len(targets))
    fit, out = train_test_split(
        np.arange(len(targets)),
        test_size=max(held, len(counts)) if stratified else held,
        stratify=targets if stratified else None,
        random_state=seed,
    )
    return fit, out, stratified


def fit_probe(vectors: Tensor, targets: Tensor, seed: int = 0) -> tuple[LogisticProbe, Choice]:
    """Choose the regularisation on part of the training features [n, d], then fit them all with it."""
    if len(targets) < 3 or len(targets.unique()) < 2:
        raise UserError("a linear probe needs at least 3 training samples and 2 classes")
    choice = choose(vectors, targets, seed)
    return fit_chosen(vectors, targets, choice), choice


def fit_chosen(vectors: Tensor, targets: Tensor, choice: Choice) -> LogisticProbe:
    """Return the probe of all training features [n, d] with the regularisation that was chosen."""
    probe = LogisticProbe(vectors, targets)
    probe.fit(choice.c, start=choice.model)
    return probe


@dataclass(frozen=True)
class ProbeResult:
    """Scores, and the protocol that led to them."""

    scores: dict[str, Score]
    choice: Choice
    seed: int
    converged: bool
    iterations: int
    samples: Samples
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON; scores are fractions."""
        return {
            "task": "linear-probe",
            "scores": scores_as_dict(self.scores),
            "protocol": {**self.settings(), **self.outcome()},
            **self.samples.as_dict(),
            "notes": self.notes,
        }

    def settings(self) -> dict[str, Any]:
        """Return what was decided before anything was fitted."""
        return {
            "name": "logistic",
            "solver": "lbfgs",
            "grid": list(GRID),
            "hold_out_fraction": HOLD_OUT,
            "hold_out": self.choice.hold_out,
            "stratified": self.choice.stratified,
            "max_iter": MAX_ITER,
            "tolerance": TOLERANCE,
            "seed": self.seed,
        }

    def outcome(self) -> dict[str, Any]:
        """Return what fitting led to, besides the scores."""
        return {
            "hold_out_accuracy": [self.choice.accuracy.get(c) for c in GRID],
            "c": self.choice.c,
            "converged": self.converged,
            "iterations": self.iterations,
        }

    def describe(self) -> str:
        """Return the settings in a sentence."""
        return (
            "protocol logistic: L-BFGS on standardised features, "
            f"C chosen from {GRID[0]:g} ... {GRID[-1]:g} on {self.choice.hold_out} held-out training samples "
            f"(a fifth), at most {MAX_ITER} iterations to a gradient of {TOLERANCE:g}, seed {self.seed}"
        )

    def render(self, console: Console) -> None:
        """Print one table and what a reader must know."""
        title = "Linear probe, protocol logistic"
        console.print(score_table(title, {f"C = {self.choice.c:g}": self.scores}))
        for line in [str(self.samples), self.describe(), *self.notes]:
            console.print(line, markup=False, highlight=False)


def linear_probe(
    encoder: Extractor,
    train: Listing,
    test: Listing,
    label_column: str = "label",
    seed: int = 0,
    **options: Unpack[ExtractOptions],
) -> ProbeResult:
    """Fit a linear classifier on the training files' features and score it on the test files.

    ``seed`` is that of the hold-out and of the intervals. Raises UserError for too few training samples or classes, and
    as ``labelled_features``.
    """
    known, queries, samples = labelled_features(encoder, train, test, label_column, **options)
    return probe_features(known, queries, samples, seed)


def probe_features(known: Labelled, queries: Labelled, samples: Samples, seed: int = 0) -> ProbeResult:
    """Fit a linear classifier on features that are already there and score it on the test features."""
    probe, choice = fit_probe(known.vectors, known.targets, seed)
    scores = classification_scores(probe.scores(queries.vectors, len(samples.classes)), queries.targets, seed)
    notes = []
    if not choice.stratified:
        notes.append("the held-out samples are not stratified: a class has a single training sample")
    if not probe.converged:
        notes.append(f"the solver had not converged after {probe.iterations} iterations")
    return ProbeResult(scores, choice, seed, probe.converged, probe.iterations, samples, notes)
