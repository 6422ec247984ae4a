"""What fine-tuning reached: the numbers, how they are shown, and the report page."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from mmssl.data.listing import Listing
from mmssl.run import Run
from tasks.features import Samples
from tasks.finetune_protocols import Protocol
from tasks.metrics import Score, score_table, scores_as_dict
from tasks.report import Curve, Section, Table, Words, write_report
from tasks.run_report import run_sections

MOST_CLASSES = 40
"""More classes than these are not printed one by one; the report and the JSON have them all."""


class ClassScore(NamedTuple):
    """How one class fares: its recall, or its average precision where a file has several labels."""

    score: Score
    """NaN where no test file has the class."""
    files: int
    """Test files of the class."""


class Measured(NamedTuple):
    """What a test set says about a classifier."""

    scores: dict[str, Score]
    per_class: dict[str, ClassScore]
    samples: Samples
    multi_label: bool = False

    @property
    def class_metric(self) -> str:
        """What ``per_class`` holds."""
        return "average precision" if self.multi_label else "recall"

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values; scores are fractions, null where there is none."""
        facts = self.samples.as_dict()
        if self.multi_label:
            facts["random_order"] = facts.pop("commonest_class")
        per_class = {
            name: {self.class_metric.replace(" ", "_"): one.score.as_dict() if one.files else None, "test": one.files}
            for name, one in self.per_class.items()
        }
        return {"scores": scores_as_dict(self.scores), "per_class": per_class, **facts}

    def __str__(self) -> str:
        if not self.multi_label:
            return str(self.samples)
        samples = self.samples
        skipped = f"; {len(samples.skipped)} broken files left out" if samples.skipped else ""
        return (
            f"{samples.train} training and {samples.test} test samples, {len(samples.classes)} classes, any number of "
            f"them per file; a random order scores {100 * samples.commonest:.1f}%{skipped}"
        )


@dataclass(frozen=True)
class FinetuneResult:
    """What fine-tuning reached, from where, and how."""

    measured: Measured
    run: Path
    start: Literal["pre-trained", "scratch"]
    labels: str
    """How many labels, in words."""
    seed: int
    steps: int
    """Optimiser steps taken."""
    protocol: Protocol
    validation: dict[str, Any] | None
    """What the validation part said, as ``tasks.validation.Validator.facts``."""

    @property
    def scores(self) -> dict[str, Score]:
        """The test scores by name."""
        return self.measured.scores

    @property
    def samples(self) -> Samples:
        """What they were measured on."""
        return self.measured.samples

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON; scores are fractions."""
        facts = {"start": self.start, "labels": self.labels, "seed": self.seed, "steps": self.steps}
        return {
            "task": "finetune",
            **self.measured.as_dict(),
            "protocol": {**facts, **self.protocol.as_dict()},
            "validation": self.validation,
            "run": str(self.run),
        }

    def render(self, console: Console) -> None:
        """Print the scores, each class's own, and what a reader must know."""
        console.print(score_table("fine-tuning", {f"{self.start}, {self.labels}": self.scores}))
        if len(self.measured.per_class) <= MOST_CLASSES:
            console.print(class_table(self.measured))
        words = [f"{self.measured}; {self.steps} steps, seed {self.seed}", str(self.protocol)]
        if self.validation is not None:
            words.append(validation_words(self.validation))
        words.append(f"run, classifier and report in {self.run}")
        for line in words:
            console.print(line, markup=False, soft_wrap=True)

    def report(self, train: Listing) -> None:
        """Write the run's report: the scores first."""
        run, row = Run(self.run), f"{self.start}, {self.labels}"
        note = f"With 95 % intervals. {self.measured}."
        columns = ["", *(name.replace("_", " ") for name in self.scores)]
        sections: list[Section] = [Table("Scores", note, columns, [[row, *self.scores.values()]])]
        metric = self.measured.class_metric
        rows: list[list[str | Score]] = [[name, str(n), score] for name, (score, n) in self.measured.per_class.items()]
        sections.append(Table("Classes", f"The {metric} of each class.", ["class", "test files", metric], rows))
        if self.validation is not None:
            history = self.validation["history"]
            series = ([one["step"] for one in history], [one["score"] for one in history])
            words, name = validation_words(self.validation), self.validation["metric"]
            sections.append(Curve("Validation", "step", name, {"validation": series}, words, percent=True))
        sections.append(Words("Protocol", str(self.protocol)))
        what = "files with labels" if self.measured.multi_label else "labels"
        subtitle = f"{self.samples.train} {what} of {len(self.samples.classes)} classes, {self.start}"
        write_report(run.report_file, f"{run.path.name}: fine-tuned", subtitle, [*sections, *run_sections(run, train)])


def class_table(measured: Measured) -> RichTable:
    """Return a table of one row per class."""
    table = RichTable(title="classes", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("", overflow="fold")
    table.add_column("test files", justify="right")
    table.add_column(measured.class_metric, justify="right")
    for name, one in measured.per_class.items():
        table.add_row(escape(name), str(one.files), str(one.score) if one.files else "not measured")
    return table


def validation_words(validation: Mapping[str, Any]) -> str:
    """Return what validation decided, in words."""
    best = next(one for one in validation["history"] if one["step"] == validation["best_step"])
    return (
        f"the weights are those of step {best['step']}, the best of {len(validation['history'])} measurements on "
        f"{validation['files']} validation files ({validation['metric']} {best['score']:.1%})"
    )


@dataclass(frozen=True)
class SeedsResult:
    """The same fine-tuning with several seeds: other labels, other order, other initial heads."""

    runs: list[FinetuneResult]
    out: Path

    @property
    def summary(self) -> dict[str, dict[str, float]]:
        """Mean and sample standard deviation (n - 1) over the seeds, by the score's name."""
        values = {name: [run.scores[name].value for run in self.runs] for name in self.runs[0].scores}
        return {name: {"mean": mean(v), "std": stdev(v), "seeds": len(v)} for name, v in values.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON; scores are fractions."""
        first = self.runs[0].as_dict()
        shared = {key: first[key] for key in ("train", "test", "classes")}
        runs = [run.as_dict() for run in self.runs]
        return {"task": "finetune", "summary": self.summary, **shared, "runs": runs}

    @property
    def measured_on(self) -> list[str]:
        """What the seeds were measured on, and where the weights of each come from."""
        validated = [(run.seed, run.validation) for run in self.runs if run.validation is not None]
        return [str(self.runs[0].measured), *(f"seed {seed}: {validation_words(one)}" for seed, one in validated)]

    def render(self, console: Console) -> None:
        """Print one table: a row per seed with its interval, then mean and deviation."""
        first = self.runs[0]
        rows = {f"seed {run.seed}": run.scores for run in self.runs}
        table = score_table(f"fine-tuning, {first.start}, {first.labels}", rows)
        table.add_section()
        table.add_row("mean ± deviation", *(spread(one) for one in self.summary.values()))
        console.print(table)
        words = [*self.measured_on, f"the deviation is over {len(self.runs)} seeds (n - 1)", str(first.protocol)]
        for line in (*words, f"runs, classifiers and reports in {self.out}/seed-*"):
            console.print(line, markup=False, soft_wrap=True)

    def report(self) -> None:
        """Write the page that puts the seeds side by side."""
        first = self.runs[0]
        rows: list[list[str | Score]] = [[f"seed {run.seed}", *run.scores.values()] for run in self.runs]
        rows.append(["mean ± deviation", *(spread(one) for one in self.summary.values())])
        note = "With 95 % intervals; the deviation is over the seeds (n - 1). Each seed's own report is in its folder."
        table = Table("Scores", note, ["", *(name.replace("_", " ") for name in first.scores)], rows, [len(rows) - 1])
        subtitle = f"{first.start}, {first.labels}, {len(self.runs)} seeds"
        write_report(
            self.out / "report.html", f"{self.out.name}: fine-tuned", subtitle,
            [table, Words("Measured on", "\n\n".join(self.measured_on)), Words("Protocol", str(first.protocol))],
        )  # fmt: skip


def spread(one: Mapping[str, float]) -> str:
    """Return a mean and its deviation in percent."""
    return f"{100 * one['mean']:.1f}% ± {100 * one['std']:.1f}"
