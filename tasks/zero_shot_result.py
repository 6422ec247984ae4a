"""What zero-shot classification says: of files, and of a test set as numbers, tables and a report page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from tasks.finetune_result import MOST_CLASSES, Measured, class_table
from tasks.metrics import Score, score_table
from tasks.predict import PredictResult
from tasks.report import Section, Table, Words, write_report

NONE = "none of them"
"""What is shown for a file that is of none of the classes."""
BINS = 15
"""Of the calibration error: as many as in its usual form."""


@dataclass(frozen=True)
class ZeroShotPredictions(PredictResult):
    """What class names alone say about files; a label that is None means that the file is of none of the classes."""

    threshold: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return {"task": "zero-shot", "threshold": self.threshold, "files": self.as_list()}

    def render(self, console: Console) -> None:
        """Print a row per file, with a threshold its best answer alone; or where the result went."""
        if self.threshold is None or not self.predictions:
            super().render(console)
            return
        best = [(path, [{**one[0], "label": one[0]["label"] or NONE}]) for path, one in self.predictions]
        PredictResult(best, self.skipped, self.out).render(console)
        left = sum(one[0]["label"] is None for _, one in self.predictions)
        console.print(
            f"{left} of {len(self.predictions)} files are {NONE}: no class reaches a score of {self.threshold:g}",
            markup=False,
        )


class OpenSet(NamedTuple):
    """What a threshold does to files that are all of some class."""

    threshold: float
    rejected: Score
    """Share of the files whose best score is below it."""
    accepted: Score | None
    """Share of the others that are right; None where there are none."""

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values; scores are fractions."""
        accepted = None if self.accepted is None else self.accepted.as_dict()
        return {"threshold": self.threshold, "rejected": self.rejected.as_dict(), "top1_of_accepted": accepted}

    def __str__(self) -> str:
        accepted = "" if self.accepted is None else f"; of the others {self.accepted} are right"
        return f"below the threshold of {self.threshold:g}, so taken for {NONE}: {self.rejected}{accepted}"


@dataclass(frozen=True)
class ZeroShotResult:
    """How well class names alone tell test files apart."""

    measured: Measured
    templates: dict[str, Score]
    """Top-1 accuracy of each template by itself, in their order."""
    calibration_error: float
    mistaken: dict[str, str]
    """For each class the one that its files are most often mistaken for; missing where all are right."""
    open_set: OpenSet | None
    protocol: dict[str, Any]
    """How similarities became scores."""

    @property
    def chance(self) -> float:
        """What guessing evenly would score."""
        return 1 / len(self.measured.samples.classes)

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON; scores are fractions."""
        return {
            "task": "zero-shot",
            **{key: value for key, value in self.measured.as_dict().items() if key != "train"},
            "chance": self.chance,
            "templates": [{"template": one, "top1": score.as_dict()} for one, score in self.templates.items()],
            "expected_calibration_error": self.calibration_error,
            "open_set": None if self.open_set is None else self.open_set.as_dict(),
            "protocol": self.protocol,
        }

    def render(self, console: Console) -> None:
        """Print the scores, those of each template and class, and what a reader must know."""
        console.print(score_table("zero-shot classification", {self._row: self.measured.scores}))
        if len(self.templates) > 1:
            rows = {one: {"top1": score} for one, score in self.templates.items()}
            console.print(score_table("each template by itself", rows))
        if len(self.measured.per_class) <= MOST_CLASSES:
            console.print(class_table(self.measured))
        for line in self._lines():
            console.print(line, markup=False, soft_wrap=True)

    @property
    def _row(self) -> str:
        count = len(self.templates)
        return f"{count} templates together" if count > 1 else next(iter(self.templates))

    def _lines(self) -> list[str]:
        samples = self.measured.samples
        skipped = f"; {len(samples.skipped)} broken files left out" if samples.skipped else ""
        bias = "" if self.protocol["bias"] is None else f" and bias {self.protocol['bias']:.3g}"
        lines = [
            f"{samples.test} test files, {len(samples.classes)} classes; guessing scores {self.chance:.1%}, always "
            f"guessing the commonest class {samples.commonest:.1%}{skipped}",
            f"scores are the {self.protocol['scores']} of cosine similarities, with temperature "
            f"{self.protocol['temperature']:.3g}{bias}",
            f"calibration error {self.calibration_error:.1%}: how far scores are from the share that is right, over "
            f"{BINS} equal intervals of the best score",
        ]
        return lines if self.open_set is None else [*lines, str(self.open_set)]

    def report(self, out: Path, name: str) -> None:
        """Write the page."""
        scores, samples = self.measured.scores, self.measured.samples
        columns = ["", *(metric.replace("_", " ") for metric in scores)]
        sections: list[Section] = [Table("Scores", "With 95 % intervals.", columns, [[self._row, *scores.values()]])]
        if len(self.templates) > 1:
            rows: list[list[str | Score]] = [[one, score] for one, score in self.templates.items()]
            sections.append(Table("Templates", "Each by itself.", ["template", "top1"], rows))
        classes: list[list[str | Score]] = [
            [label, str(one.files), self.mistaken.get(label, ""), one.score]
            for label, one in self.measured.per_class.items()
        ]
        heads = ["class", "test files", "mostly mistaken for", "recall"]
        sections.append(Table("Classes", "The recall of each class.", heads, classes))
        sections.append(Words("Measured on", "\n\n".join(self._lines())))
        title = f"{scores['top1'].value:.1%} of {samples.test} files named right by class names alone"
        write_report(out, title, f"{name}, {len(samples.classes)} classes", sections)


def calibration_error(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """Return the expected calibration error (Guo et al., arXiv:1706.04599, equation 3), a fraction.

    It is the mean over the files of how far, in the file's interval of ``confidence`` float [n] (0 to 1), the mean
    confidence is from the share that is ``right``, bool [n].
    """
    index = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, confidence.double() - right.double())
    return float(gap.abs().sum() / len(confidence))


def most_mistaken(found: Tensor, target: Tensor, classes: Sequence[str]) -> dict[str, str]:
    """Return for each class the other that its files are most often taken for; of equals the first by class order."""
    wrong = found != target
    pairs = torch.stack([target[wrong], found[wrong]], dim=1)
    kinds, counts = pairs.unique(dim=0, return_counts=True)
    order = counts.argsort(stable=True, descending=True).tolist()
    best: dict[str, str] = {}
    for own, other in (kinds[i].tolist() for i in order):
        best.setdefault(classes[own], classes[other])
    return best
