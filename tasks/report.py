"""The report page: what a run found, in one HTML file that asks for nothing outside itself and runs no script.

Sections are data, so that every objective and modality fills the same page. Bars and curves are CSS and SVG in the
theme's own colours; pictures, animations and sounds are data URIs.
"""

import base64
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from modalities.abilities import Ticks
from tasks.metrics import Score
from tasks.report_curve import Series, plot

Picture: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

CRISP_BELOW = 128
"""Pictures with a shorter side, in pixels, are enlarged without smoothing."""
TAIL = 8
"""So many letters at the end of a caption's line stay when it is shortened."""
MOST_ROOMY = 2
"""So many scores in a row of a table have their bar on the line of their figures."""
MOST_BESIDE = 6
"""So many pictures stand beside the heading of their section; more take the whole width of the page."""
STACKED = 800, 224
"""About how wide and high, in pixels, a picture is at most where wide ones stand below each other (see the style)."""
LINE = 15
"""Pixels from one label of an axis to the next, at least."""


class Axes(NamedTuple):
    """Where labels stand along a picture's lower and left side, in its own pixels from the left and from the top."""

    across: Ticks
    down: Ticks


@dataclass(frozen=True)
class Medium:
    """A picture, uint8 [h, w, 3], and what there is besides."""

    picture: Picture
    axes: Axes | None = None
    sound: bytes = b""
    """A FLAC file to be played."""
    film: bytes = b""
    """An animated WebP of the picture's shape, which stands in its place."""


Shown: TypeAlias = Picture | Medium


@dataclass(frozen=True)
class Curve:
    """Lines over a shared pair of axes; ``series`` maps a name to its (x, y) values, equally many of each.

    With ``percent``, y values are fractions, written as percentages, as a table writes its scores.
    """

    title: str
    x_label: str
    y_label: str
    series: Series
    note: str = ""
    percent: bool = False


@dataclass(frozen=True)
class Pictures:
    """Groups of pictures; each row is one group with one picture per column."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Shown]]


@dataclass(frozen=True)
class Strip:
    """Columns of captioned pictures that go to the next line together where there is no room.

    With ``stacked``, for wide pictures, each column is laid down: its pictures stand beside, the columns below each
    other. A caption's lines are shortened in their middle to the width of the column; whoever points at them reads all
    of it.
    """

    title: str
    note: str
    columns: Sequence[Sequence[tuple[str, Shown]]]
    stacked: bool = False
    narrow: bool = True
    """Whether many columns may be narrow, so that more of them stand in a line."""


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


Section: TypeAlias = Curve | Pictures | Strip | Table | Facts | Code | Words


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
    wide = " class=wide" if _is_wide(section) else ""
    return (
        f'<section aria-labelledby="{name}"{wide}>\n<div><h2 id="{name}">{escape(section.title)}</h2>{note}</div>\n'
        f'<div class="content">\n{_content(section, name)}\n</div>\n</section>'
    )


def _is_wide(section: Section) -> bool:
    """Tell whether a section takes the page's whole width: one picture alone, or many side by side."""
    match section:
        case Pictures(rows=[[_]]):
            return True
        case Strip(columns=columns, stacked=stacked):
            return stacked or len(columns) > MOST_BESIDE or [*map(len, columns)] == [1]
        case _:
            return False


def _content(section: Section, name: str) -> str:
    match section:
        case Curve():
            return plot(section.x_label, section.y_label, section.series, section.percent)
        case Pictures():
            return _pictures(section)
        case Strip():
            return _strip(section)
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
    # Where few scores share a row, their bars have room between the figures; otherwise below them.
    scores = max((sum(map(_has_bar, row)) for row in table.rows), default=0)
    kind = " class=roomy" if scores <= MOST_ROOMY else ""
    # A table may be wider than a phone: it scrolls by itself, also from the keyboard.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{name}">'
        f'<table{kind} aria-labelledby="{name}">\n'
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
    stacked = any(is_wide(shown) for shown in rows[0])
    alone = len(rows) == len(columns) == 1
    per_line = 1 if stacked or alone else min(max(MOST_BESIDE // len(columns), 1), 3)
    groups = "\n".join(f"<li>{_group(columns, row, i)}</li>" for i, row in enumerate(rows, start=1))
    kind = f"groups per-{per_line}" + (" stacked" if stacked else "")
    return f'<ol class="{kind}" style="--of: {len(columns)}">\n{groups}\n</ol>'


def is_wide(shown: Shown) -> bool:
    """Tell whether a picture is so wide, or needs so much room for its axes, that others stand below it."""
    medium = as_medium(shown)
    height, width = medium.picture.shape[:2]
    return medium.axes is not None or width > 2 * height


def _group(columns: Sequence[str], row: Sequence[Shown], number: int) -> str:
    return "".join(
        f"{_figure(shown)}{_plate(shown, f'{column}, example {number}')}"
        f'<figcaption aria-hidden="true">{escape(column)}</figcaption></figure>'
        for column, shown in zip(columns, row, strict=True)
    )


def _strip(strip: Strip) -> str:
    lines = max(caption.count("\n") + 1 for column in strip.columns for caption, _ in column)
    columns = "\n".join(f"<li>{''.join(_captioned(*one) for one in column)}</li>" for column in strip.columns)
    of = max(map(len, strip.columns)) if strip.stacked else len(strip.columns)
    kind = "strip stacked" if strip.stacked else "strip"
    least = "4.75rem" if strip.narrow else "9rem"
    return f'<ol class="{kind}" style="--of: {of}; --lines: {lines}; --least: {least}">\n{columns}\n</ol>'


def _captioned(caption: str, shown: Shown) -> str:
    whole = caption.replace("\n", ", ")
    lines = "".join(f"<span>{_elidable(line)}</span>" for line in caption.split("\n"))
    return f'{_figure(shown)}<figcaption title="{escape(whole)}">{lines}</figcaption>{_plate(shown, whole)}</figure>'


def _elidable(line: str) -> str:
    """Return a line whose beginning gives way where room is short, as its end says more of a file's name."""
    return f"<span>{escape(line[:-TAIL])}</span><span>{escape(line[-TAIL:])}</span>"


def as_medium(shown: Shown) -> Medium:
    """Return a picture as a medium that has nothing besides."""
    return shown if isinstance(shown, Medium) else Medium(shown)


def _figure(shown: Shown) -> str:
    height, width = as_medium(shown).picture.shape[:2]
    return f'<figure style="--shape: {width / height:.4g}">'


def _plate(shown: Shown, alt: str) -> str:
    """Return a picture with its axes, and below it a player of its sound."""
    medium = as_medium(shown)
    plate = _image(medium, alt)
    if medium.axes is not None:
        plate = f'<div class="plate">{plate}{_axes(medium.axes, medium.picture)}</div>'
    if medium.sound:
        plate += f'<audio controls src="{_data("audio/flac", medium.sound)}" aria-label="{escape(alt)}"></audio>'
    return plate


def _axes(axes: Axes, picture: Picture) -> str:
    height, width = picture.shape[:2]
    scale = min(STACKED[0] / width, STACKED[1] / height)
    across = spaced(axes.across, scale, 3 * LINE)
    down = spaced(axes.down, scale, LINE)
    labels = [
        f'<span class="tick x" style="left: {100 * at / width:.2f}%">{escape(word)}</span>' for at, word in across
    ]
    labels += [
        f'<span class="tick y" style="bottom: {100 - 100 * at / height:.2f}%">{escape(word)}</span>'
        for at, word in down
    ]
    return f'<div aria-hidden="true">{"".join(labels)}</div>'


def spaced(ticks: Ticks, scale: float, least: float) -> Ticks:
    """Return ticks without those that would stand less than ``least`` pixels from the one before, enlarged so much."""
    kept: list[tuple[float, str]] = []
    for tick in ticks:
        if not kept or abs(tick[0] - kept[-1][0]) * scale >= least:
            kept.append(tick)
    return kept


def _image(medium: Medium, alt: str) -> str:
    picture = medium.picture
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"a picture is uint8 [h, w, 3], not {picture.dtype} {list(picture.shape)}")
    height, width = picture.shape[:2]
    source = _data("image/webp", medium.film) if medium.film else _data("image/png", _png(picture))
    crisp = ' class="crisp"' if min(height, width) < CRISP_BELOW else ""
    return f'<img{crisp} src="{source}" width="{width}" height="{height}" alt="{escape(alt)}">'


def _png(picture: Picture) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", optimize=True)
    return file.getvalue()


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
