"""The demos: what self-supervision is for, shown on media that come with the package, offline and in minutes.

A demo is data: an archive, settings and what is asked of the run (``Demo``). Running it is the same for all of them.
"""

import os
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from mmssl.data.listing import Listing
from mmssl.errors import UserError, nearest
from mmssl.files import write_json
from mmssl.run import Run
from tasks.batches import training_files
from tasks.build import load_recipe
from tasks.metrics import Score
from tasks.pretrain import pretrain
from tasks.report import Section, Table, Words, write_report
from tasks.run_report import run_sections

DATA = Path(__file__).parent / "demo_data"
DATA_FOLDER, RUN_FOLDER = "data", "pretrained"
"""In a demo's folder: what was unpacked, and the run."""
PRETRAINED = "pre-trained"

Rows = dict[tuple[str, str], dict[str, Score]]
"""(method, starting point) -> column -> accuracy."""


@dataclass(frozen=True)
class Findings:
    """What a demo measured."""

    title: str
    """The finding in a sentence."""
    rows: Rows
    columns: Sequence[str]
    tests: str
    """What the accuracies are of: numbers of files, in words."""
    asked: str
    """What was done with the run, in sentences."""
    shown: Listing
    """Files that the run's report may show."""
    sections: Sequence[Section] = ()
    """Further ones, behind the table."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What JSON has besides the table."""
    next: str = ""
    """What to type next."""


class Exam(Protocol):
    """What a demo asks of its run."""

    def take(self, out: Path) -> Findings:
        """Measure the run in the demo's folder."""
        ...


@dataclass(frozen=True)
class Demo:
    """A demo's data and settings."""

    name: str
    """What it is asked for by."""
    archive: Path
    """What is unpacked: media, and a manifest with the columns path, label, split and source."""
    recipe: str
    pretraining: Mapping[str, Any]
    exam: Exam
    nouns: str
    """What is learned from, in the plural."""
    note: str
    """What the report says of the data and the baselines."""
    given: str = "without labels"
    """What it is learned from with, or without."""
    learner: str = "a masked autoencoder"
    """What is pre-trained."""
    task: str = "An encoder learned by predicting hidden patches from visible ones."
    """How it learns, in a sentence."""


@dataclass(frozen=True)
class DemoResult:
    """The demo's table and where its report is."""

    out: Path
    nouns: str
    findings: Findings

    @property
    def rows(self) -> Rows:
        """The table's."""
        return self.findings.rows

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values; scores are fractions."""
        table = [
            {"method": method, "start": start, **{name: score.as_dict() for name, score in scores.items()}}
            for (method, start), scores in self.rows.items()
        ]
        paths = {"out": str(self.out), "report": str(self.out / "report.html")}
        return {"task": "demo", **paths, "table": table, **self.findings.more}

    def render(self, console: Console) -> None:
        """Print the table and where to look next."""
        title = f"accuracy on test {self.nouns}"
        table = RichTable(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        for column in ("", "starting from", *self.findings.columns):
            table.add_column(column)
        for (method, start), scores in self.rows.items():
            table.add_row(method, start, *(str(scores[c]) if c in scores else "" for c in self.findings.columns))
        console.print(table)
        console.print(f"report: {self.out / 'report.html'}   run: {self.out / RUN_FOLDER}", soft_wrap=True)
        if self.findings.next:
            console.print(f"next: {self.findings.next}", markup=False, highlight=False, soft_wrap=True)


def demos() -> dict[str, Demo]:
    """Return the demos by name."""
    from tasks import demo_audio, demo_image, demo_image_text, demo_speech, demo_video

    modules = (demo_image, demo_video, demo_audio, demo_speech, demo_image_text)
    return {module.DEMO.name: module.DEMO for module in modules}


def demo(modality: str = "image", out: str | Path = "demo-run") -> DemoResult:
    """Pre-train a tiny encoder on what comes with the package, and measure what it learned."""
    known = demos()
    if modality not in known:
        raise UserError(f"--modality '{modality}' has no demo{nearest(modality, known)}")
    return run_demo(known[modality], Path(out))


def run_demo(demo: Demo, out: Path) -> DemoResult:
    """Run a demo: ``out`` gets the data, the run, what the exam leaves behind, the table and the report."""
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give another --out")
    data, run = out / DATA_FOLDER, out / RUN_FOLDER
    # A model this small leaves a core to the data worker: on two cores one thread trains 1.3 x faster than two.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    unpack(demo.archive, data)
    recipe = load_recipe(demo.recipe, demo.pretraining)
    learned_from = f"{len(training_files(recipe, data, None)):,} {demo.nouns} {demo.given}"
    note(f"1 of 3: pre-training {demo.learner} on {learned_from}")
    pretrain(recipe, data, run)
    result = DemoResult(out, demo.nouns, demo.exam.take(out))
    write_json(out / "demo.json", result.as_dict())
    report(demo, result, learned_from)
    return result


def note(text: str) -> None:
    """Tell what comes next."""
    print(text, file=sys.stderr, flush=True)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a demo's data."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def report(demo: Demo, result: DemoResult, learned_from: str) -> None:
    """Write the demo's report over the run's: its finding first."""
    found = result.findings
    table = Table(
        f"What was learned {demo.given}",
        f"Accuracy on {found.tests} with a 95 % bootstrap interval. Every row is what this run measured.",
        ["method", "starting from", *found.columns],
        [[*names, *(scores.get(c, "") for c in found.columns)] for names, scores in result.rows.items()],
        highlight=[i for i, (_, start) in enumerate(result.rows) if start == PRETRAINED],
    )
    words = Words("How to read this", f"{demo.task} {found.asked} {demo.note}")
    subtitle = f"{demo.learner[0].upper()}{demo.learner[1:]}, pre-trained on {learned_from} on this machine"
    sections = [table, words, *found.sections, *run_sections(Run(result.out / RUN_FOLDER), found.shown, held_out=True)]
    write_report(result.out / "report.html", found.title, subtitle, sections)
