"""Panels: captioned pictures of files, laid out as one PNG or as a report page.

What is shown is data, so that every panel and modality is drawn by the same few functions.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from PIL import Image
from torch import Tensor

from mmssl.data.guard import BrokenFile, guarded
from mmssl.errors import UnusableData
from mmssl.files import replacing_file
from modalities.encoder import DECODE_TIMEOUT, MODALITIES, EncoderConfig
from tasks.report import Picture, Strip, write_report

WIDTH = 1800
"""Pixels that a page may be wide before pictures shrink and blocks go to the next line."""
LEAST_WIDTH = 640
"""Pixels that a page is wide at least, so that its sentences have room."""
LARGEST, SMALLEST = 192, 96
"""Longer side in pixels of a picture in a PNG: at most, and at least where many stand side by side."""
MARGIN, BETWEEN, GAP = 24, 28, 6
"""Pixels around the page, between blocks (half of it between lines) and between pictures."""
DPI = 100
INK, SOFT = "#1b1f24", "#5b6470"
RULE = 218
"""Grey of the line around a picture."""


@dataclass(frozen=True)
class Shot:
    """One picture, uint8 [h, w, 3], and what is written above it; a line break starts a second line."""

    caption: str
    picture: Picture


@dataclass(frozen=True)
class Line:
    """Pictures side by side, and what they have in common (may be empty)."""

    label: str
    shots: Sequence[Shot | None]
    """None leaves its place free."""


@dataclass(frozen=True)
class Block:
    """What there is to see of one file."""

    name: str
    lines: Sequence[Line]


@dataclass(frozen=True)
class Panel:
    """Everything that one call shows; ``note`` says what a reader must know."""

    title: str
    note: str
    blocks: Sequence[Block]
    side: int | None = None
    """Longer side of the pictures in pixels; by default whatever fits ``WIDTH``."""


def write_panel(path: Path, panel: Panel) -> None:
    """Write a panel to ``path``, a PNG or an HTML page by its suffix, aside first and then renamed."""
    if path.suffix.lower() == ".png":
        with replacing_file(path) as aside:
            Image.fromarray(draw(panel)).save(aside, "PNG")
        return
    write_report(path, panel.title, panel.note, [_strip(block) for block in panel.blocks])


def _strip(block: Block) -> Strip:
    """Return a block with the shots of its lines, where there are several, below each other."""
    columns = zip_longest(*(line.shots for line in block.lines))
    stacks = [[(shot.caption, shot.picture) for shot in column if shot is not None] for column in columns]
    note = ", below: ".join(line.label for line in block.lines if line.label)
    return Strip(block.name, note[:1].upper() + note[1:], stacks)


# Files


class Files(NamedTuple):
    """The files that are shown, and what they are called there."""

    paths: list[str]
    names: list[str]


def read_signal(config: EncoderConfig, path: str) -> Tensor:
    """Return a file as an encoder of this configuration sees it, [C, *size]; raises UnusableData naming it."""
    kind = MODALITIES[config.modality]
    try:
        decoded = guarded(kind.decode, path, DECODE_TIMEOUT)
    except BrokenFile as error:
        raise UnusableData(f"{path}: {error.reason}") from None
    return kind.eval_transform(config.signal)(decoded)


# Layout


class Layout(NamedTuple):
    """Sizes in pixels of what repeats on a page."""

    cell: tuple[int, int]
    """Height and width of the room for one picture."""
    block: tuple[int, int]
    """Height and width of a block."""
    across: int
    """Blocks side by side."""
    width: int
    """Width of the page."""


class Style(NamedTuple):
    """One kind of text: its size in points, its line height in pixels, its colour and weight."""

    size: float
    leading: int
    colour: str = INK
    weight: str = "normal"


TITLE, NOTE = Style(13, 26, INK, "bold"), Style(9, 18, SOFT)
NAME, LABEL, CAPTION = Style(9.5, 22, INK, "bold"), Style(8.5, 18, SOFT), Style(8, 15, SOFT)


def draw(panel: Panel) -> Picture:
    """Return a panel as one picture, the same pixels for the same panel."""
    side = panel.side or min(LARGEST, max(SMALLEST, (WIDTH - 2 * MARGIN) // _columns(panel) - GAP))
    fitted = [[[_fitted(shot, side) for shot in line.shots] for line in block.lines] for block in panel.blocks]
    layout = _layout(panel, [shot.picture for block in fitted for line in block for shot in line if shot is not None])
    note = wrap(panel.note, layout.width - 2 * MARGIN, NOTE)
    top = MARGIN + TITLE.leading + len(note) * NOTE.leading + BETWEEN // 2
    rows = -(-len(panel.blocks) // layout.across)
    page = Page(top + rows * (layout.block[0] + BETWEEN) - BETWEEN + MARGIN, layout.width)
    page.write(MARGIN, MARGIN, panel.title, TITLE, layout.width - 2 * MARGIN)
    for i, sentence in enumerate(note):
        page.write(MARGIN + TITLE.leading + i * NOTE.leading, MARGIN, sentence, NOTE, layout.width)
    for i, (block, lines) in enumerate(zip(panel.blocks, fitted, strict=True)):
        row, column = divmod(i, layout.across)
        y, x = top + row * (layout.block[0] + BETWEEN), MARGIN + column * (layout.block[1] + BETWEEN)
        _draw_block(page, block, lines, layout, y, x)
    return page.render()


def _fitted(shot: Shot | None, side: int) -> Shot | None:
    return None if shot is None else Shot(shot.caption, fit(shot.picture, side))


def _columns(panel: Panel) -> int:
    return max(len(line.shots) for block in panel.blocks for line in block.lines)


def _layout(panel: Panel, pictures: Sequence[Picture]) -> Layout:
    cell = max(p.shape[0] for p in pictures), max(p.shape[1] for p in pictures)
    columns = _columns(panel)
    width = columns * cell[1] + (columns - 1) * GAP
    height = max(
        NAME.leading * bool(block.name)
        + sum(_words(line) + cell[0] for line in block.lines)
        + BETWEEN // 2 * (len(block.lines) - 1)
        for block in panel.blocks
    )
    across = min(len(panel.blocks), max(1, (WIDTH - 2 * MARGIN + BETWEEN) // (width + BETWEEN)))
    page = max(LEAST_WIDTH, 2 * MARGIN + across * (width + BETWEEN) - BETWEEN)
    return Layout(cell, (height, width), across, page)


def _words(line: Line) -> int:
    """Return the height of what is written above the pictures of a line."""
    rows = max(shot.caption.count("\n") + 1 if shot is not None and shot.caption else 0 for shot in line.shots)
    return LABEL.leading * bool(line.label) + CAPTION.leading * rows


def _draw_block(
    page: "Page", block: Block, lines: Sequence[Sequence[Shot | None]], layout: Layout, y: int, x: int
) -> None:
    width = layout.block[1]
    if block.name:
        page.write(y, x, block.name, NAME, width)
        y += NAME.leading
    for line, shots in zip(block.lines, lines, strict=True):
        page.write(y, x, line.label, LABEL, width)
        y += _words(line)
        for i, shot in enumerate(shots):
            if shot is None:
                continue
            left = x + i * (layout.cell[1] + GAP)
            for j, words in enumerate(reversed(shot.caption.split("\n")), start=1):
                page.write(y - j * CAPTION.leading, left, words, CAPTION, layout.cell[1])
            page.paste(y, left, shot.picture)
        y += layout.cell[0] + BETWEEN // 2


class Page:
    """A white page [height, width] on which texts and pictures are placed by the pixel, from its upper left corner."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
        self.pictures: list[tuple[int, int, Picture]] = []

    def write(self, y: int, x: int, text: str, style: Style, room: int) -> None:
        """Write one line of text, shortened in its middle to ``room`` pixels."""
        self.figure.text(
            x / self.width, 1 - y / self.height, shorten(text, room, style), va="top", ha="left", color=style.colour,
            fontproperties=_font(style), parse_math=False,
        )  # fmt: skip

    def paste(self, y: int, x: int, picture: Picture) -> None:
        """Place a picture, pixel by pixel."""
        self.pictures.append((y, x, picture))

    def render(self) -> Picture:
        """Return the page, uint8 [height, width, 3]."""
        page = rasterize(self.figure)
        for y, x, picture in self.pictures:
            height, width = picture.shape[:2]
            page[y - 1 : y + height + 1, x - 1 : x + width + 1] = RULE  # white pictures end somewhere too
            page[y : y + height, x : x + width] = picture
        return page


def rasterize(figure: Figure) -> Picture:
    """Return a figure as pixels, uint8 [h, w, 3]."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that the font has not is drawn as a box
        canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]


def fit(picture: Picture, side: int) -> Picture:
    """Scale a picture so that its longer side is at most ``side``: up by a whole factor, without smoothing, or down."""
    height, width = picture.shape[:2]
    factor = side // max(height, width)
    if factor >= 1:
        return picture.repeat(factor, axis=0).repeat(factor, axis=1)
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


# Text


def legible(text: str) -> str:
    """Return a file's name as something that can be drawn: bytes that are no text, and control characters, escaped."""
    whole = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in whole)


def shorten(text: str, room: int, style: Style) -> str:
    """Return a text that is at most ``room`` pixels wide, if need be with an ellipsis for its middle."""
    measure = _ruler(style)
    if measure(text) <= room:
        return text
    for kept in range(len(text) - 1, 1, -1):
        short = f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"
        if measure(short) <= room:
            return short
    return "…"


def wrap(text: str, room: int, style: Style) -> list[str]:
    """Return the lines of a text that are at most ``room`` pixels wide, broken between words."""
    measure, lines = _ruler(style), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and measure(longer) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    return [line for line in lines if line]


@lru_cache(maxsize=8)
def _font(style: Style) -> FontProperties:
    # The one that comes with matplotlib: the same pixels wherever the page is drawn.
    return FontProperties(family="DejaVu Sans", size=style.size, weight=style.weight)


@lru_cache(maxsize=8)
def _ruler(style: Style) -> Callable[[str], float]:
    renderer, font = FigureCanvasAgg(Figure(dpi=DPI)).get_renderer(), _font(style)  # type: ignore[no-untyped-call]

    @lru_cache(maxsize=4096)
    def measure(text: str) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(renderer.get_text_width_height_descent(text, font, ismath=False)[0])

    return measure
