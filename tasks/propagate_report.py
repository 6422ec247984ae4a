"""What label propagation reached: the numbers, the tables of the official toolkit and the report page."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from mmssl.files import replacing_file, write_json
from tasks.films import CROSSES, spread
from tasks.following import Settings
from tasks.metrics import Score, scores_as_dict
from tasks.propagate_rows import MOST_LINES, Row, curves, pace, words
from tasks.propagate_scores import UNSCORED, counted
from tasks.report import Curve, Facts, Medium, Picture, Section, Strip, Table, Words, write_report

MOST_FILMS, MOST_BYTES = 12, 7 * 2**20
"""So many films are in a report at most, and about so many bytes of them: a page should open at once."""
FILMS_BESIDE = 3
SWATCH = 32, 128
"""Height and width in pixels of a colour in the key."""
TOOLKIT = {
    "J&F_mean": "J&F-Mean", "J_mean": "J-Mean", "J_recall": "J-Recall", "J_decay": "J-Decay", "F_mean": "F-Mean",
    "F_recall": "F-Recall", "F_decay": "F-Decay",
}  # fmt: skip
"""The scores that the official toolkit has in its table, and what it calls them."""


class Moment(NamedTuple):
    """A frame of a sequence."""

    frame: int
    found: Picture
    truth: Picture | None


class Film(NamedTuple):
    """A sequence in motion."""

    name: str
    picture: Picture
    """Its first frame."""
    animation: bytes
    """An animated WebP of the same shape."""
    moments: Sequence[Moment] = ()
    """A few frames with what was found and what is true."""


@dataclass(frozen=True)
class PropagateResult:
    """What was followed how well, and how."""

    kind: str
    encoder: str
    """What it is called; may be empty."""
    data: str
    split: str
    """The list of sequences; "" where all are taken."""
    planned: int
    """How many sequences there are; ``sequences`` are fewer before the end."""
    settings: Settings
    weights: str
    """Whose weights, in words."""
    out: Path
    seconds: float = 0.0
    """Everything included."""
    scores: dict[str, Score] = field(default_factory=dict)
    """Over all sequences; none where nothing but first frames is annotated."""
    over: str = ""
    """What these are means over, in words."""
    classes: dict[str, float] = field(default_factory=dict)
    """parts: the IoU of every class over all sequences."""
    sequences: list[Row] = field(default_factory=list, repr=False)

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
        notes = [f"not scored, as {UNSCORED[self.kind]}: {', '.join(left_out)}"] if left_out else []
        if not self.complete:
            notes.append(f"only {len(self.sequences)} of {counted(self.planned, 'sequence')} followed so far")
        return notes

    @property
    def complete(self) -> bool:
        """Whether all sequences were followed."""
        return len(self.sequences) == self.planned

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON; scores are fractions."""
        return {
            "task": "propagate",
            "kind": self.kind,
            "encoder": self.encoder,
            "data": self.data,
            "split": self.split,
            "complete": self.complete,
            "scores": scores_as_dict(self.scores),
            "over": self.over,
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
            table.caption, table.caption_justify = f"all: {self.all_words()}", "left"
            for column in ("", *map(words, self.scores)):
                table.add_column(column, justify="right" if column else "left", overflow="fold")
            for row in self.sequences:
                table.add_row(escape(row.name), *(_percent(value) for value in self._cells(row)))
            table.add_section()
            table.add_row("all", *(str(score) for score in self.scores.values()))
            console.print(table)
        speed = f"{self.amount()}, {pace(self.frames_per_second)}"
        for line in (speed, self.how(), *self.notes, f"everything is in {self.out}"):
            console.print(line, markup=False, soft_wrap=True)

    def _cells(self, row: Row) -> list[float]:
        means = {} if row.scored is None else row.scored.means
        return [means.get(name, math.nan) for name in self.scores]

    def how(self) -> str:
        """Return whose features were compared, and how."""
        return self.settings.described(self.weights)

    def amount(self) -> str:
        """Return how much was followed."""
        return f"{counted(self.frames, 'frame')} of {counted(len(self.sequences), 'sequence')}"

    def all_words(self) -> str:
        """Return what the scores over all sequences are."""
        scored = sum(row.scored is not None for row in self.sequences)
        return f"mean over {self.over} of {counted(scored, 'sequence')}; 95 % bootstrap intervals over sequences"

    def write_scores(self) -> None:
        """Write ``propagate.json``, and for masks the official toolkit's two tables."""
        write_json(self.out / "propagate.json", self.as_dict())
        if self.kind == "masks" and self.scores:
            values = [f"{self.scores[name].value:.6f}" for name in TOOLKIT]
            write_csv(self.out / "global_results.csv", [[*TOOLKIT.values()], values])
            write_csv(self.out / "per_sequence_results.csv", [["Sequence", "J-Mean", "F-Mean"], *self._objects()])

    def write(self, measure: str, films: Sequence[Film]) -> None:
        """Write everything: the scores, and ``report.html``."""
        self.write_scores()
        write_report(self.out / "report.html", self.finding(), self.subtitle(), self.sections(measure, films))

    def _objects(self) -> list[list[str]]:
        return [
            [f"{row.name}_{one}", f"{values['J_mean']:.6f}", f"{values['F_mean']:.6f}"]
            for row in self.sequences if row.scored is not None for one, values in row.scored.parts.items()
        ]  # fmt: skip

    def finding(self) -> str:
        """Return the report's title."""
        if not self.scores:
            return f"{self.kind.capitalize()} followed through {counted(self.frames, 'frame')}"
        name, score = next(iter(self.scores.items()))
        return f"{self.kind.capitalize()} followed: {words(name)} {score.value:.1%}"

    def subtitle(self) -> str:
        """Return what is below it."""
        return f"{self.amount()}, {self.weights}"

    def sections(self, measure: str, films: Sequence[Film]) -> list[Section]:
        """Return the parts of the report."""
        sections: list[Section] = []
        if self.scores:
            rows: list[list[str | Score]] = [[words(name), score] for name, score in self.scores.items()]
            sections.append(Table("Scores", f"All: {self.all_words()}.", ["", "all"], rows))
        if films:
            sections += [self._films(films), *self._moments(films)]
        if self.scores:
            sections += [self._curve(measure), self._per_sequence()]
        if self.classes:
            rows = [[name, _alone(value)] for name, value in self.classes.items()]
            sections.append(Table("Classes", "Over all sequences; 0 is the background.", ["class", "IoU"], rows))
        value, unit = pace(self.frames_per_second).split(maxsplit=1)
        facts = {
            "Frames": f"{self.frames:,}",
            unit.capitalize(): value,
            "Seconds in all": f"{self.seconds:.0f}",
        }
        named = {"Encoder": self.encoder, "data": self.data, "split": self.split}
        what = "; ".join(f"{name} {value}" for name, value in named.items() if value)
        how = self.how()
        lines = [f"{what}.", f"{how[0].upper()}{how[1:]}.", *self.notes]
        return [*sections, Facts("Speed", facts), Words("Settings", "\n\n".join(lines))]

    def _films(self, films: Sequence[Film]) -> Strip:
        values = {row.name: row.value for row in self.sequences}
        ordered = sorted(films, key=lambda film: values[film.name] if math.isfinite(values[film.name]) else -1)
        fitting = MOST_BYTES * len(films) // sum(len(film.animation) for film in films)
        shown = []
        for film in (ordered[::-1][pick] for pick in spread(len(films), max(1, min(MOST_FILMS, fitting)))):
            score = f"\n{values[film.name]:.1%}" if math.isfinite(values[film.name]) else ""
            shown.append((f"{film.name}{score}", Medium(film.picture, film=film.animation)))
        note = f"The first frame is given, everything else is found.{CROSSES if self.kind == 'keypoints' else ''}"
        if len(films) > len(shown):
            note += f" {len(shown)} of {len(films)}, spread from the best to the worst."
        lines = [shown[first : first + FILMS_BESIDE] for first in range(0, len(shown), FILMS_BESIDE)]
        return Strip("Films", note, lines, stacked=True)

    def _moments(self, films: Sequence[Film]) -> list[Strip]:
        values = {row.name: row.value for row in self.sequences}
        shown = sorted((film for film in films if film.moments), key=lambda film: -values[film.name])
        sections = []
        for film, word in zip(shown, ("the best", "the worst"), strict=False):
            columns = []
            for frame, found, truth in film.moments:
                under = [] if truth is None else [("truth", truth)]
                columns.append([(f"frame {frame}: found", found), *under])
            title = f"{film.name}, {word}" if len(shown) > 1 else film.name
            sections.append(Strip(title, "More frames of every sequence are in the folder sheets.", columns))
        return sections

    def _curve(self, measure: str) -> Curve:
        scored = [row for row in self.sequences if row.scored is not None]
        notes = []
        if len(scored) > MOST_LINES:
            notes.append("The mean over the sequences that have the frame, the best and the worst.")
        if self.kind == "masks":
            notes.append("The first and the last frame are not scored.")
        return Curve(f"{measure} over time", "frame", measure, curves(scored), " ".join(notes), percent=True)

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
            ["", "frames", *map(words, names)],
            rows,
        )


@dataclass(frozen=True)
class SourceResult:
    """What was followed through a person's own video, and how."""

    source: str
    first_mask: str
    encoder: str
    """What it is called; may be empty."""
    frames: int
    size: tuple[int, int]
    """Height and width of a frame."""
    fps: float
    areas: dict[str, list[float]] = field(repr=False)
    """What share of each frame every object has: 0 where it is gone."""
    colours: Picture = field(repr=False)
    """In which colour each of them is drawn, uint8 [objects, 3]."""
    settings: Settings
    weights: str
    out: Path
    seconds: float
    """For reading, following, drawing and writing."""
    notes: list[str] = field(repr=False)
    """What had to be decided about the mask and the film, as it was said when it began."""

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return {
            "task": "propagate",
            "source": self.source,
            "first_mask": self.first_mask,
            "encoder": self.encoder,
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
        for line in (speed, self.settings.described(self.weights),
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
            "Frames that the film shows in a second": f"{self.fps:.4g}",
            "Frames that were followed in a second": f"{self.frames / self.seconds:.3g}",
        }
        how = self.settings.described(self.weights)
        words = [f"{how[0].upper()}{how[1:]}.", *self.notes]
        sections: list[Section] = [
            Strip("Film", "The first frame's mask is given, all others are found. overlay.mp4 has every frame.",
                  [[(film.name, Medium(film.picture, film=film.animation))]]),
            *([self._key()] if len(self.areas) > 1 else []),
            Curve("Size over time", "frame", "share of the frame", lines, note, percent=True),
            Facts("Speed", facts),
            Words("Settings", "\n\n".join(words)),
        ]  # fmt: skip
        what = f"{self.source}, with {self.encoder}" if self.encoder else self.source
        title = self.subtitle()
        write_report(self.out / "report.html", f"{title[0].upper()}{title[1:]}", what, sections)

    def _key(self) -> Strip:
        shown = [
            (f"object {name}\n{values[0]:.1%} at first", np.full((*SWATCH, 3), colour, np.uint8))
            for (name, values), colour in zip(self.areas.items(), self.colours, strict=True)
        ]
        return Strip("Objects", "Their colours in the film; the lines below have others.", [[one] for one in shown])


def write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Write a table, aside first and then renamed."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    with replacing_file(path) as aside:
        aside.write_text(text.getvalue(), encoding="utf-8")


def _alone(value: float) -> Score:
    # One value without an interval.
    return Score(value, math.nan, math.nan)


def _percent(value: float) -> str:
    return "not scored" if math.isnan(value) else f"{value:.1%}"
