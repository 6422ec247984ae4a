"""What label propagation reached: the numbers, the tables of the official toolkit and the report page."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from mmssl.files import replacing_file, write_json
from tasks.films import RINGS, spread
from tasks.following import Settings
from tasks.metrics import Score, scores_as_dict
from tasks.propagate_scores import LEAST, SequenceScores
from tasks.report import Curve, Facts, Medium, Picture, Section, Strip, Table, Words, write_report

MOST_FILMS, MOST_BYTES = 12, 7 * 2**20
"""So many films are in a report at most, and about so many bytes of them: a page should open at once."""
FILMS_BESIDE = 3
MOST_LINES = 6
"""With more sequences than these, only the mean, the best and the worst one have a curve."""
TOOLKIT = {
    "J&F_mean": "J&F-Mean", "J_mean": "J-Mean", "J_recall": "J-Recall", "J_decay": "J-Decay", "F_mean": "F-Mean",
    "F_recall": "F-Recall", "F_decay": "F-Decay",
}  # fmt: skip
"""The scores that the official toolkit has in its table, and what it calls them."""


class Film(NamedTuple):
    """A sequence in motion."""

    name: str
    picture: Picture
    """Its first frame."""
    animation: bytes
    """An animated WebP of the same shape."""


@dataclass(frozen=True)
class Row:
    """One sequence: what it is, and what it scored, if it could be scored."""

    name: str
    frames: int
    seconds: float
    scored: SequenceScores | None

    @property
    def value(self) -> float:
        """Its first score; NaN where there is none."""
        return math.nan if self.scored is None else next(iter(self.scored.means.values()))

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values; scores are fractions."""
        facts = {"name": self.name, "frames": self.frames, "seconds": self.seconds}
        if self.scored is None:
            return {**facts, "scores": None, "parts": None, "curve": None}
        frames, values = self.scored.curve
        curve = {"frames": list(frames), "values": list(values)}
        return {**facts, "scores": self.scored.means, "parts": self.scored.parts, "curve": curve}

    def __str__(self) -> str:
        if self.scored is None:
            return f"{self.frames} frames"
        return f"{self.frames} frames, {_words(next(iter(self.scored.means)))} {self.value:.1%}"


@dataclass(frozen=True)
class PropagateResult:
    """What was followed how well, and how."""

    kind: str
    scores: dict[str, Score]
    """Over all sequences; none where nothing but first frames is annotated."""
    classes: dict[str, float]
    """parts: the IoU of every class over all sequences."""
    sequences: list[Row]
    settings: Settings
    weights: str
    """Whose weights, in words."""
    out: Path
    seconds: float
    """Everything included."""

    @property
    def frames(self) -> int:
        """All frames of all sequences."""
        return sum(row.frames for row in self.sequences)

    @property
    def frames_per_second(self) -> float:
        """How many are read and followed in a second; scores and pictures take more time."""
        return self.frames / sum(row.seconds for row in self.sequences)

    @property
    def notes(self) -> list[str]:
        """What a reader must know."""
        left_out = [row.name for row in self.sequences if row.scored is None]
        if not left_out:
            return []
        least = LEAST.get(self.kind, 1)
        return [f"not scored, as fewer than {least} of their frames are annotated: {', '.join(left_out)}"]

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON; scores are fractions."""
        return {
            "task": "propagate",
            "kind": self.kind,
            "scores": scores_as_dict(self.scores),
            **({"classes": self.classes} if self.classes else {}),
            "sequences": [row.as_dict() for row in self.sequences],
            "settings": {**self.settings.as_dict(), "weights": self.weights},
            "frames": self.frames,
            "seconds": self.seconds,
            "frames_per_second": self.frames_per_second,
            "out": str(self.out),
            "notes": self.notes,
        }

    def render(self, console: Console) -> None:
        """Print the scores over all sequences, each sequence's own, and what a reader must know."""
        if self.scores:
            table = RichTable(title=f"propagation of {self.kind}", title_justify="left", title_style="bold",
                              box=SIMPLE_HEAD)  # fmt: skip
            table.caption, table.caption_justify = "95 % bootstrap intervals over sequences", "left"
            for column in ("", *map(_words, self.scores)):
                table.add_column(column, justify="right" if column else "left", overflow="fold")
            for row in self.sequences:
                table.add_row(escape(row.name), *(_percent(value) for value in self._cells(row)))
            table.add_section()
            table.add_row("all", *(str(score) for score in self.scores.values()))
            console.print(table)
        speed = f"{self.frames} frames of {len(self.sequences)} sequences, {self.frames_per_second:.3g} per second"
        for line in (speed, f"{self.weights}; {self.settings}", *self.notes, f"everything is in {self.out}"):
            console.print(line, markup=False, soft_wrap=True)

    def _cells(self, row: Row) -> list[float]:
        means = {} if row.scored is None else row.scored.means
        return [means.get(name, math.nan) for name in self.scores]

    def write(self, measure: str, films: Sequence[Film]) -> None:
        """Write ``propagate.json``, for masks the official toolkit's two tables, and ``report.html``."""
        write_json(self.out / "propagate.json", self.as_dict())
        if self.kind == "masks" and self.scores:
            values = [f"{self.scores[name].value:.6f}" for name in TOOLKIT]
            write_csv(self.out / "global_results.csv", [[*TOOLKIT.values()], values])
            write_csv(self.out / "per_sequence_results.csv", [["Sequence", "J-Mean", "F-Mean"], *self._objects()])
        write_report(self.out / "report.html", self.finding(), self.subtitle(), self.sections(measure, films))

    def _objects(self) -> list[list[str]]:
        return [
            [f"{row.name}_{one}", f"{values['J_mean']:.6f}", f"{values['F_mean']:.6f}"]
            for row in self.sequences if row.scored is not None for one, values in row.scored.parts.items()
        ]  # fmt: skip

    def finding(self) -> str:
        """Return the report's title."""
        if not self.scores:
            return f"{self.kind.capitalize()} followed through {self.frames} frames"
        name, score = next(iter(self.scores.items()))
        return f"{self.kind.capitalize()} followed: {_words(name)} {score.value:.1%}"

    def subtitle(self) -> str:
        """Return what is below it."""
        return f"{len(self.sequences)} sequences, {self.frames} frames, {self.weights}"

    def sections(self, measure: str, films: Sequence[Film]) -> list[Section]:
        """Return the parts of the report."""
        sections: list[Section] = []
        if self.scores:
            rows: list[list[str | Score]] = [[_words(name), score] for name, score in self.scores.items()]
            sections.append(Table("Scores", "With 95 % intervals over the sequences.", ["", "all sequences"], rows))
        if films:
            sections.append(self._films(films))
        if self.scores:
            sections += [self._curve(measure), self._per_sequence()]
        if self.classes:
            rows = [[name, _alone(value)] for name, value in self.classes.items()]
            sections.append(Table("Classes", "Over all sequences; 0 is the background.", ["class", "IoU"], rows))
        facts = {
            "Frames": f"{self.frames:,}",
            "Frames per second": f"{self.frames_per_second:.3g}",
            "Seconds in all": f"{self.seconds:.0f}",
        }
        words = [f"{self.weights[0].upper()}{self.weights[1:]}; {self.settings}.", *self.notes]
        return [*sections, Facts("Speed", facts), Words("Settings", "\n\n".join(words))]

    def _films(self, films: Sequence[Film]) -> Strip:
        values = {row.name: row.value for row in self.sequences}
        ordered = sorted(films, key=lambda film: values[film.name] if math.isfinite(values[film.name]) else -1)
        fitting = MOST_BYTES * len(films) // sum(len(film.animation) for film in films)
        shown = []
        for film in (ordered[::-1][pick] for pick in spread(len(films), max(1, min(MOST_FILMS, fitting)))):
            score = f"\n{values[film.name]:.1%}" if math.isfinite(values[film.name]) else ""
            shown.append((f"{film.name}{score}", Medium(film.picture, film=film.animation)))
        note = f"The first frame is given, everything else is found.{RINGS if self.kind == 'keypoints' else ''}"
        if len(films) > len(shown):
            note += f" {len(shown)} of {len(films)}, spread from the best to the worst."
        lines = [shown[first : first + FILMS_BESIDE] for first in range(0, len(shown), FILMS_BESIDE)]
        return Strip("Films", note, lines, stacked=True)

    def _curve(self, measure: str) -> Curve:
        scored = [row for row in self.sequences if row.scored is not None]
        few = len(scored) <= MOST_LINES
        note = "" if few else "The mean over the sequences that have the frame, the best and the worst."
        return Curve(f"{measure} over time", "frame", measure, curves(scored), note, percent=True)

    def _per_sequence(self) -> Table:
        names = [name for name in self.scores if "recall" not in name and "decay" not in name]
        rows: list[list[str | Score]] = []
        for row in self.sequences:
            if row.scored is None:
                continue
            rows.append([row.name, str(row.frames), *(_alone(row.scored.means[name]) for name in names)])
            if len(row.scored.parts) > 1 and self.kind != "parts":
                rows += [
                    [f"{row.name}, object {one}", "", *(_alone(values[name]) for name in names)]
                    for one, values in row.scored.parts.items()
                ]
        return Table(
            "Sequences",
            "A sequence's score is the mean over its objects." if self.kind == "masks" else "",
            ["", "frames", *map(_words, names)],
            rows,
        )


@dataclass(frozen=True)
class SourceResult:
    """What was followed through a person's own video, and how."""

    source: str
    first_mask: str
    frames: int
    size: tuple[int, int]
    """Height and width of a frame."""
    fps: float
    areas: dict[str, list[float]]
    """What share of each frame every object has: 0 where it is gone."""
    settings: Settings
    weights: str
    out: Path
    seconds: float
    """For reading, following, drawing and writing."""
    notes: list[str]
    """What had to be decided about the mask."""

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return {
            "task": "propagate",
            "source": self.source,
            "first_mask": self.first_mask,
            "frames": self.frames,
            "height": self.size[0],
            "width": self.size[1],
            "fps": self.fps,
            "objects": self.areas,
            "settings": {**self.settings.as_dict(), "weights": self.weights},
            "seconds": self.seconds,
            "frames_per_second": self.frames / self.seconds,
            "out": str(self.out),
            "notes": self.notes,
        }

    def render(self, console: Console) -> None:
        """Print what a person wants to know."""
        speed = f"{self.source}: {self.subtitle()}, {self.frames / self.seconds:.3g} frames per second"
        for line in (speed, f"{self.weights}; {self.settings}", *self.notes,
                     f"masks of every frame, overlay.mp4, sheet.png and report.html are in {self.out}"):  # fmt: skip
            console.print(line, markup=False, soft_wrap=True)

    def subtitle(self) -> str:
        """Return what there is, in words."""
        count = len(self.areas)
        return f"{count} object{'' if count == 1 else 's'} followed through {self.frames} frames"

    def write(self, film: Film) -> None:
        """Write ``propagate.json`` and ``report.html``."""
        write_json(self.out / "propagate.json", self.as_dict())
        lines = {
            f"object {name}": (range(self.frames), values) for name, values in list(self.areas.items())[:MOST_LINES]
        }
        note = "A line that falls to 0 is an object that left the frame, or was lost."
        if len(lines) < len(self.areas):
            note += f" The first {len(lines)} of {len(self.areas)} objects."
        facts = {
            "Frames": f"{self.frames:,}",
            "Frames per second, the film's own": f"{self.fps:.4g}",
            "Frames per second, followed": f"{self.frames / self.seconds:.3g}",
        }
        words = [f"{self.weights[0].upper()}{self.weights[1:]}; {self.settings}.", *self.notes]
        sections: list[Section] = [
            Strip("Film", "The first frame's mask is given, all others are found. overlay.mp4 has every frame.",
                  [[(film.name, Medium(film.picture, film=film.animation))]]),
            Curve("Size over time", "frame", "share of the frame", lines, note, percent=True),
            Facts("Speed", facts),
            Words("Settings", "\n\n".join(words)),
        ]  # fmt: skip
        write_report(self.out / "report.html", f"{film.name}: {self.subtitle()}", self.source, sections)


def curves(rows: Sequence[Row]) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
    """Return a line for each of few sequences; of many, the mean, the best and the worst one."""
    scored = {row.name: row.scored.curve for row in rows if row.scored is not None}
    if len(scored) <= MOST_LINES:
        return {name: (list(frames), values) for name, (frames, values) in scored.items()}
    at: dict[int, list[float]] = {}
    for frames, values in scored.values():
        for frame, value in zip(frames, values, strict=True):
            at.setdefault(frame, []).append(value)
    order = sorted(at)
    best, worst = max(rows, key=lambda row: row.value).name, min(rows, key=lambda row: row.value).name
    return {
        "mean": (list(order), [float(np.nanmean(at[frame])) for frame in order]),
        f"best: {best}": (list(scored[best][0]), scored[best][1]),
        f"worst: {worst}": (list(scored[worst][0]), scored[worst][1]),
    }


def write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Write a table, aside first and then renamed."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    with replacing_file(path) as aside:
        aside.write_text(text.getvalue(), encoding="utf-8")


def _alone(value: float) -> Score:
    # One value without an interval.
    return Score(value, math.nan, math.nan)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _percent(value: float) -> str:
    return "not scored" if math.isnan(value) else f"{value:.1%}"
