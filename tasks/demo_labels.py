"""What a demo asks of an encoder: how well a few labels are enough, with it and without."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmssl.data.listing import Listing, list_files
from modalities.encoder import MODALITIES, Encoder, load
from tasks.demo import DATA_FOLDER, PRETRAINED, RUN_FOLDER, Findings, Rows, note
from tasks.features import Extractor, class_targets
from tasks.finetune import finetune
from tasks.knn import knn
from tasks.labels import subset
from tasks.linear_probe import linear_probe
from tasks.metrics import Score
from tasks.report import Section

RANDOM_SEED = 4
"""Of the encoder with random weights."""
SCRATCH = "scratch"
NEIGHBOURS = 10


@dataclass(frozen=True)
class Question:
    """What is asked of the encoder: rows of the manifest, their labels, how many of them."""

    what: str
    """What is to be recognised, in the plural: a column of the table."""
    source: str | None
    """The rows with this source; None takes all."""
    shots: int
    """Labels per class."""
    train: str = "train"
    test: str = "test"
    """Names of the splits."""
    finetuning: Mapping[str, Any] | None = None
    """Settings of fine-tuning; None does without it."""
    labels: str = "label"
    """The column of the manifest that holds them."""

    @property
    def few(self) -> str:
        """How few labels there are, in words."""
        return f"{self.shots} labels per class"

    @property
    def column(self) -> str:
        """The heading of its column."""
        return f"{self.what}, {self.few}"


@dataclass(frozen=True)
class FewLabels:
    """Accuracies with few labels; the first question, which is to be fine-tuned for, gives the report its title."""

    modality: str
    questions: Sequence[Question]
    baselines: Callable[[Encoder], dict[str, Extractor]]
    """What the encoder is compared with besides itself at random, by name."""
    shown: Callable[[Listing], list[int]]
    """Which of the files of the split ``test`` are shown reconstructed."""
    drawn: Callable[[Encoder, Path], list[Section]] = lambda encoder, out: []
    """Further sections of the report, from the encoder and the demo's folder."""

    def take(self, out: Path) -> Findings:
        """Measure the run; ``out`` gets two fine-tuned runs per question."""
        data, encoder = out / DATA_FOLDER, load(out / RUN_FOLDER)
        asked = [(question, *sides(question, self.modality, data)) for question in self.questions]
        rows: Rows = {}
        note(f"2 of 3: fine-tuning with {self.questions[0].few}, from the pre-trained encoder and from scratch")
        for one in asked:
            fine_tune(*one, encoder, out, rows)
        note("3 of 3: linear probe and nearest neighbours on frozen features")
        torch.manual_seed(RANDOM_SEED)
        random = Encoder(encoder.config).eval()
        starts: dict[str, Extractor] = {PRETRAINED: encoder, "random weights": random, **self.baselines(encoder)}
        for one in asked:
            frozen(*one, starts, rows)
        test = list_files(data, MODALITIES[self.modality], split="test")
        tests = " and ".join(f"{len(tested):,} test {question.what}" for question, _, tested in asked)
        return Findings(
            finding(self.questions[0], rows),
            rows,
            [question.column for question in self.questions],
            tests,
            "Then it was given few labels: fine-tuning trains all of it, the linear probe and the nearest neighbours "
            "use its vectors as they are.",
            test.select(self.shown(test)),
            self.drawn(encoder, out),
        )


def sides(question: Question, modality: str, data: Path) -> tuple[Listing, Listing]:
    """Return the training and the test files that a question is about."""
    both = [list_files(data, MODALITIES[modality], split=split) for split in (question.train, question.test)]
    if question.source is None:
        return both[0], both[1]
    train, test = (
        one.select([i for i, source in enumerate(one.columns["source"]) if source == question.source]) for one in both
    )
    return train, test


def fine_tune(question: Question, train: Listing, test: Listing, encoder: Encoder, out: Path, rows: Rows) -> None:
    """Add to ``rows`` what fine-tuning with few labels reaches, from the encoder and from scratch."""
    if question.finetuning is None:
        return
    for start, scratch in ((PRETRAINED, False), (SCRATCH, True)):
        folder = out / f"{question.source or question.what}-from-{start}"
        tuned = finetune(
            encoder, train, test, folder, label_column=question.labels, shots=question.shots, scratch=scratch,
            overrides=question.finetuning,
        )  # fmt: skip
        rows.setdefault(("fine-tuned", start), {})[question.column] = tuned.scores["top1"]


def frozen(question: Question, train: Listing, test: Listing, starts: Mapping[str, Extractor], rows: Rows) -> None:
    """Add to ``rows`` what the features of every starting point reach with the labels that fine-tuning has."""
    _, targets, _ = class_targets(train, test, question.labels)
    train = train.select(subset(targets, None, question.shots, 0) or [])
    for method, measure in (("linear probe", probe_top1), (f"{NEIGHBOURS} nearest neighbours", knn_top1)):
        for start, extractor in starts.items():
            rows.setdefault((method, start), {})[question.column] = measure(extractor, train, test, question.labels)


def probe_top1(extractor: Extractor, train: Listing, test: Listing, labels: str = "label") -> Score:
    """Return the linear probe's accuracy."""
    return linear_probe(extractor, train, test, labels).scores["top1"]


def knn_top1(extractor: Extractor, train: Listing, test: Listing, labels: str = "label") -> Score:
    """Return the accuracy of nearest neighbours."""
    return knn(extractor, train, test, labels, k=(NEIGHBOURS,)).scores[NEIGHBOURS]["top1"]


def finding(question: Question, rows: Rows) -> str:
    """Return in a sentence what pre-training was good for: a difference counts where intervals do not overlap."""
    scores = {names: row[question.column] for names, row in rows.items() if question.column in row}
    tuned, scratch = scores["fine-tuned", PRETRAINED], scores["fine-tuned", SCRATCH]
    if tuned.low > scratch.high:
        return f"With {question.few}: {tuned.value:.0%} right after pre-training, {scratch.value:.0%} from scratch"
    harm = scratch.low > tuned.high
    probed = scores["linear probe", PRETRAINED]
    others = {start: one for (method, start), one in scores.items() if method == "linear probe" and start != PRETRAINED}
    best = max(others, key=lambda start: others[start].value)
    if not harm and probed.low > max(one.high for one in others.values()):
        return (
            f"With {question.few}, a linear probe is {probed.value:.0%} right after pre-training and "
            f"{others[best].value:.0%} on {best}; fine-tuning shows no clear difference"
        )
    return f"With {question.few}, pre-training {'did harm' if harm else 'made no clear difference'} here"
