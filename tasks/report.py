"""The report page: what a run found, in one HTML file that asks for nothing outside itself and runs no script.

Sections are data, so that every objective and modality fills the same page. Bars and curves are CSS and SVG in the
theme's own colours; pictures are PNG data URIs.
"""

import base64
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from tasks.metrics import Score

Picture: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
Values: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

BUCKETS = 300
"""A longer series keeps the lowest and the highest value of each of so many buckets: about 600 points."""
HUES = 6
"""How many line colours the page has."""
MOST_TICKS = 7
"""An axis has at most about so many steps between its ticks."""
BOUNDLESS = 1e300
"""From here on a value counts as infinite: the length of an axis must be finite too."""
CRISP_BELOW = 128
"""Pictures with a shorter side, in pixels, are enlarged without smoothing."""


@dataclass(frozen=True)
class Curve:
    """Lines over a shared pair of axes; ``series`` maps a name to its (x, y) values, equally many of each."""

    title: str
    x_label: str
    y_label: str
    series: dict[str, tuple[Sequence[float], Sequence[float]]]
    note: str = ""


@dataclass(frozen=True)
class Pictures:
    """Groups of pictures, uint8 [h, w, 3]; each row is one group with one picture per column."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Picture]]


@dataclass(frozen=True)
class Table:
    """Text and scores; a score is drawn with its interval. The rows at the indices ``highlight`` stand out."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Score]]
    highlight: Sequence[int] = ()


@dataclass(frozen=True)
class Facts:
    """A few named values, set large."""

    title: str
    items: dict[str, str]
    note: str = ""


@dataclass(frozen=True)
class Code:
    """Verbatim text, folded away until it is asked for."""

    title: str
    text: str
    note: str = ""


@dataclass(frozen=True)
class Words:
    """Paragraphs, with blank lines between them."""

    title: str
    text: str
    note: str = ""


Section: TypeAlias = Curve | Pictures | Table | Facts | Code | Words


def write_report(path: Path, title: str, subtitle: str, sections: Sequence[Section]) -> None:
    """Write the page to ``path``, aside first and then renamed: there is never half a report.

    ``title`` is the one-line finding. Raises ValueError for a section whose parts do not fit together.
    """
    template = Template(files("tasks").joinpath("assets/report.html").read_text(encoding="utf-8"))
    body = "\n".join(_section(section, f"section-{i}") for i, section in enumerate(sections, start=1))
    page = template.substitute(title=escape(title), subtitle=escape(subtitle), body=body)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        # A lone surrogate, as in a file name that is not UTF-8, has no encoding of its own.
        aside.write_text(page, encoding="utf-8", errors="backslashreplace")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _section(section: Section, name: str) -> str:
    note = f'<p class="note">{escape(section.note)}</p>' if section.note else ""
    return (
        f'<section aria-labelledby="{name}">\n<div><h2 id="{name}">{escape(section.title)}</h2>{note}</div>\n'
        f'<div class="content">\n{_content(section, name)}\n</div>\n</section>'
    )


def _content(section: Section, name: str) -> str:
    match section:
        case Curve():
            return _curve(section)
        case Pictures():
            return _pictures(section)
        case Table():
            return _table(section, name)
        case Facts():
            items = (f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in section.items.items())
            return f'<dl class="tiles">{"".join(items)}</dl>'
        case Code():
            lines = len(section.text.splitlines())
            return (
                f"<details><summary>Show {lines} line{'' if lines == 1 else 's'}</summary>"
                f'<pre tabindex="0" role="region" aria-labelledby="{name}"><code>{escape(section.text)}</code></pre>'
                "</details>"
            )
        case Words():
            return "".join(f"<p>{escape(part.strip())}</p>" for part in section.text.split("\n\n") if part.strip())


# Tables


def _table(table: Table, name: str) -> str:
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(f"table {table.title!r}: a row of {len(row)} cells under {len(table.columns)} columns")
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    body = "\n".join(_row(row, i in table.highlight) for i, row in enumerate(table.rows))
    # A table may be wider than a phone: it scrolls by itself, also from the keyboard.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{name}"><table aria-labelledby="{name}">\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>{_scale(table)}"
    )


def _row(row: Sequence[str | Score], best: bool) -> str:
    first, *others = (escape(cell) if isinstance(cell, str) else _score(cell) for cell in row)
    cells = "".join(f"<td>{cell}</td>" for cell in others)
    return f'<tr{" class=best" if best else ""}><th scope="row">{first}</th>{cells}</tr>'


def _score(score: Score) -> str:
    """Return the percentage, a bar from 0 to 100 % with the interval as a whisker, and the interval in figures."""
    if not math.isfinite(score.value):
        return '<span class="interval">not measured</span>'
    known = math.isfinite(score.low) and math.isfinite(score.high)
    interval = f'<span class="interval">{100 * score.low:.1f} to {100 * score.high:.1f}</span>' if known else ""
    return f'<div class="score"><span class="value">{score.value:.1%}</span>{_bar(score)}{interval}</div>'


def _bar(score: Score) -> str:
    if not _has_bar(score):
        return ""
    value, low, high = (f"{100 * part:.2f}%" for part in (score.value, score.low, score.high))
    return f'<span class="bar" aria-hidden="true" style="--value: {value}; --low: {low}; --high: {high}"></span>'


def _has_bar(cell: str | Score) -> bool:
    return not isinstance(cell, str) and all(0 <= part <= 1 for part in cell)


def _scale(table: Table) -> str:
    if not any(_has_bar(cell) for row in table.rows for cell in row):
        return ""
    return '<p class="note">Bars run from 0 to 100%; the whisker is the interval that is written beside it.</p>'


# Pictures


def _pictures(pictures: Pictures) -> str:
    columns, rows = pictures.columns, pictures.rows
    if not rows:
        return "<p>There are no pictures.</p>"
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"pictures {pictures.title!r}: a row of {len(row)} under {len(columns)} columns")
    # Wide pictures, such as spectrograms, would be slivers side by side.
    stacked = any(picture.shape[1] > 2 * picture.shape[0] for picture in rows[0])
    per_line = 1 if stacked else min(max(6 // len(columns), 1), 3)
    groups = "\n".join(f"<li>{_group(columns, row, i)}</li>" for i, row in enumerate(rows, start=1))
    kind = f"groups per-{per_line}" + (" stacked" if stacked else "")
    return f'<ol class="{kind}" style="--of: {len(columns)}">\n{groups}\n</ol>'


def _group(columns: Sequence[str], row: Sequence[Picture], number: int) -> str:
    return "".join(
        f"<figure>{_image(picture, f'{column}, example {number}')}"
        f'<figcaption aria-hidden="true">{escape(column)}</figcaption></figure>'
        for column, picture in zip(columns, row, strict=True)
    )


def _image(picture: Picture, alt: str) -> str:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"a picture is uint8 [h, w, 3], not {picture.dtype} {list(picture.shape)}")
    height, width = picture.shape[:2]
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    crisp = ' class="crisp"' if min(height, width) < CRISP_BELOW else ""
    return f'<img{crisp} src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{escape(alt)}">'


# Curves


class Axis(NamedTuple):
    """The range of an axis and its ticks, as positions (0 to 1) and labels."""

    low: float
    high: float
    ticks: list[tuple[float, str]]

    def place(self, values: Values) -> Values:
        """Map values to positions along the axis."""
        return (values - self.low) / (self.high - self.low)


class Line(NamedTuple):
    """One series as float64 arrays, y NaN wherever x or y is not finite."""

    name: str
    x: Values
    y: Values

    def finite(self) -> tuple[Values, Values]:
        """Return the points that can be drawn."""
        mask = np.isfinite(self.y)
        return self.x[mask], self.y[mask]


def _curve(curve: Curve) -> str:
    lines = [_line(name, *xy) for name, xy in curve.series.items()]
    drawn = [line.finite() for line in lines]
    if not any(len(x) for x, _ in drawn):
        return "<p>There is no finite value to draw.</p>"
    x_axis = _axis(np.concatenate([x for x, _ in drawn]), widen=False)
    y_axis = _axis(np.concatenate([y for _, y in drawn]), widen=True)
    left = max(len(label) for _, label in y_axis.ticks) + 1.5
    right = max(len(label) for _, label in x_axis.ticks) / 2
    ticks = "".join(
        f'<span class="tick y" style="bottom: {100 * at:.2f}%">{label}</span>' for at, label in y_axis.ticks
    )
    ticks += "".join(f'<span class="tick x" style="left: {100 * at:.2f}%">{label}</span>' for at, label in x_axis.ticks)
    grid = "".join(f"M0 {1000 * (1 - at):.1f}H1000" for at, _ in y_axis.ticks)
    paths = "".join(
        f'<path class="line" style="--hue: var(--s{i % HUES})" d="{_path(line, x_axis, y_axis)}"/>'
        for i, line in enumerate(lines)
    )
    spoken = escape(f"{curve.y_label} against {curve.x_label}. " + " ".join(_spoken(line) for line in lines))
    keys = "".join(f'<span style="--hue: var(--s{i % HUES})">{_key(line)}</span>' for i, line in enumerate(lines))
    # The labels are HTML over a stretched drawing: on a phone the drawing shrinks and the letters do not.
    drawing = f'<path class="grid" d="{grid}"/>{paths}'
    return (
        f'<figure style="--left: {left:.1f}ch; --right: {right:.1f}ch">\n'
        f'<div class="plot" role="img" aria-label="{spoken}"><span class="y-label">{escape(curve.y_label)}</span>'
        f'<div class="area"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none">{drawing}</svg>{ticks}</div>'
        f'<span class="x-label">{escape(curve.x_label)}</span></div>\n'
        f'<figcaption class="legend">{keys}</figcaption></figure>'
    )


def _line(name: str, x: Sequence[float], y: Sequence[float]) -> Line:
    if len(x) != len(y):
        raise ValueError(f"series {name!r} has {len(x)} x values and {len(y)} y values")
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    return Line(name, xs, np.where((np.abs(xs) < BOUNDLESS) & (np.abs(ys) < BOUNDLESS), ys, np.nan))


def _axis(values: Values, widen: bool) -> Axis:
    """Choose round ticks for the values' range; ``widen`` stretches the axis to the ticks around it."""
    low, high = float(values.min()), float(values.max())
    largest = max(-low, high, 1e-300)
    if high - low <= 1e-9 * largest:
        margin = largest / 10 if largest > 1e-300 else 0.5
        low, high = low - margin, high + margin
    power = 10.0 ** math.floor(math.log10((high - low) / MOST_TICKS))
    step = next(step for factor in (1, 2, 5, 10, 20) if (step := factor * power) >= (high - low) / MOST_TICKS)
    # The slack keeps a range that ends at a tick, but for rounding, at that tick.
    first, last = low / step + 1e-9, high / step - 1e-9
    if widen:
        first, last = math.floor(first), math.ceil(last)
        low, high = first * step, last * step
    numbers = [i * step for i in range(math.ceil(first - 2e-9), math.floor(last + 2e-9) + 1)]
    return Axis(low, high, [((number - low) / (high - low), _label(number, step)) for number in numbers])


def _label(number: float, step: float) -> str:
    if not 1e-4 <= step < 1e6:
        return f"{number:.6g}"
    if step >= 1000 and number:
        return f"{number / 1000:,.0f}k"
    return f"{number:,.{max(0, -math.floor(math.log10(step)))}f}"


def _thin(line: Line) -> Line:
    """Keep the lowest, the highest and the first missing value of each bucket: spikes and gaps stay visible."""
    count = len(line.y)
    if count <= 2 * BUCKETS:
        return line
    kept = {0, count - 1}
    for start, stop in pairwise(np.linspace(0, count, BUCKETS + 1).astype(int).tolist()):
        part = line.y[start:stop]
        missing = np.isnan(part)
        if not missing.all():
            kept |= {start + int(np.nanargmin(part)), start + int(np.nanargmax(part))}
        if missing.any():
            kept.add(start + int(missing.argmax()))
    index = sorted(kept)
    return Line(line.name, line.x[index], line.y[index])


def _path(line: Line, x_axis: Axis, y_axis: Axis) -> str:
    """Return the path data, with the pen lifted at missing values."""
    thin = _thin(line)
    parts, down = [], False
    for x, y in zip(1000 * x_axis.place(thin.x), 1000 * (1 - y_axis.place(thin.y)), strict=True):
        if math.isnan(y):
            down = False
            continue
        # The segment of length zero makes a point without neighbours a dot.
        parts.append(f"L{x:.1f} {y:.1f}" if down else f"M{x:.1f} {y:.1f}h0")
        down = True
    return "".join(parts)


def _key(line: Line) -> str:
    y = line.finite()[1]
    ending = f"{y[-1]:.4g} at the end" if len(y) else "no value"
    missing = len(line.y) - len(y)
    gaps = f", {missing:,} not finite" if missing else ""
    return f"<i></i>{escape(line.name)}<small>{ending}{gaps}</small>"


def _spoken(line: Line) -> str:
    x, y = line.finite()
    if not len(y):
        return f"{line.name}: no value."
    ends = f"{y[0]:.4g} at {x[0]:.6g}, {y[-1]:.4g} at {x[-1]:.6g}"
    return f"{line.name}: {ends}, lowest {y.min():.4g}, highest {y.max():.4g}."
