"""The page of a panel: its pictures, scaled pixel by pixel, and texts in their places; as one PNG or as HTML."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from PIL import Image

from mmssl.files import replacing_file
from tasks.panels import Block, Line, Panel, Shot, pictures_of
from tasks.report import LINE, Axes, Medium, Picture, Strip, as_medium, is_wide, spaced, write_report

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
AXES = 20, 52
"""Pixels below and to the left of a picture in which its axes are written."""
RULE = 218
"""Grey of the line around a picture."""
TICK = np.full((4, 1, 3), 128, np.uint8)


def write_panel(path: Path, panel: Panel) -> None:
    """Write a panel to ``path``, a PNG or an HTML page by its suffix, aside first and then renamed."""
    if path.suffix.lower() == ".png":
        with replacing_file(path) as aside:
            Image.fromarray(draw(panel)).save(aside, "PNG")
        return
    write_report(path, panel.title, panel.note, [_strip(block) for block in panel.blocks])


def _strip(block: Block) -> Strip:
    """Return a block with the shots of its lines, where there are several, below each other."""
    if any(map(is_wide, pictures_of([block]))):
        rows = [[(shot.caption, shot.shown) for shot in line.shots if shot is not None] for line in block.lines]
        return Strip(block.name, "", rows, stacked=True)
    columns = zip_longest(*(line.shots for line in block.lines))
    stacks = [[(shot.caption, shot.shown) for shot in column if shot is not None] for column in columns]
    note = ", below: ".join(line.label for line in block.lines if line.label)
    return Strip(block.name, note[:1].upper() + note[1:], stacks)


# Layout


class Layout(NamedTuple):
    """Sizes in pixels of what repeats on a page."""

    cell: tuple[int, int]
    """Height and width of the room for one picture and its axes."""
    inset: int
    """How much of its width the axes take."""
    gap: int
    """Pixels between pictures."""
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
    room = _room(panel)
    fitted = [[[_fitted(shot, room) for shot in line.shots] for line in block.lines] for block in panel.blocks]
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


def _room(panel: Panel) -> tuple[int, int]:
    """Return how high and wide a picture may be."""
    if panel.side is not None:
        return panel.side, panel.side
    width = (WIDTH - 2 * MARGIN) // _columns(panel) - _gap(panel)
    if _stacked(panel):
        return LARGEST, width - _insets(panel)[1]
    return (min(LARGEST, max(SMALLEST, width)),) * 2


def _stacked(panel: Panel) -> bool:
    return any(map(is_wide, pictures_of(panel.blocks)))


def _gap(panel: Panel) -> int:
    """Return the pixels between pictures: more than between the frames of a strip."""
    return BETWEEN if _stacked(panel) else GAP


def _insets(panel: Panel) -> tuple[int, int]:
    """Return what the axes take of a picture's room, below and to the left."""
    return AXES if any(as_medium(shown).axes is not None for shown in pictures_of(panel.blocks)) else (0, 0)


def _fitted(shot: Shot | None, room: tuple[int, int]) -> Shot | None:
    if shot is None:
        return None
    small = fit(shot.picture, *room)
    if shot.axes is None:
        return replace(shot, shown=small)
    scales = (new / old for new, old in zip(small.shape[1::-1], shot.picture.shape[1::-1], strict=True))
    across, down = ([(at * scale, word) for at, word in ticks] for ticks, scale in zip(shot.axes, scales, strict=True))
    return replace(shot, shown=Medium(small, Axes(across, down)))


def _columns(panel: Panel) -> int:
    return max(len(line.shots) for block in panel.blocks for line in block.lines)


def _layout(panel: Panel, pictures: Sequence[Picture]) -> Layout:
    below, inset = _insets(panel)
    cell = max(p.shape[0] for p in pictures) + below, max(p.shape[1] for p in pictures) + inset
    columns, gap = _columns(panel), _gap(panel)
    width = columns * cell[1] + (columns - 1) * gap
    height = max(
        NAME.leading * bool(block.name)
        + sum(_words(line) + cell[0] for line in block.lines)
        + BETWEEN // 2 * (len(block.lines) - 1)
        for block in panel.blocks
    )
    across = min(len(panel.blocks), max(1, (WIDTH - 2 * MARGIN + BETWEEN) // (width + BETWEEN)))
    page = max(LEAST_WIDTH, 2 * MARGIN + across * (width + BETWEEN) - BETWEEN)
    return Layout(cell, inset, gap, (height, width), across, page)


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
            left = x + i * (layout.cell[1] + layout.gap)
            for j, words in enumerate(reversed(shot.caption.split("\n")), start=1):
                page.write(y - j * CAPTION.leading, left + layout.inset, words, CAPTION, layout.cell[1] - layout.inset)
            page.paste(y, left + layout.inset, shot.picture)
            if shot.axes is not None:
                _draw_axes(page, shot.axes, shot.picture.shape[0], y, left + layout.inset)
        y += layout.cell[0] + BETWEEN // 2


def _draw_axes(page: "Page", axes: Axes, height: int, y: int, x: int) -> None:
    """Write the axes of a picture so high, whose upper left corner is at (y, x), with a short line at each label."""
    for at, word in spaced(axes.across, 1, 3 * LINE):
        page.paste(y + height + 1, x + round(at), TICK)
        page.write(y + height + 5, x + round(at), word, CAPTION, AXES[1], "center")
    for at, word in spaced(axes.down, 1, LINE):
        page.paste(y + round(at), x - 5, TICK.swapaxes(0, 1))
        page.write(y + round(at), x - 7, word, CAPTION, AXES[1], "right", "center")


class Page:
    """A white page [height, width] on which texts and pictures are placed by the pixel, from its upper left corner."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
        self.pictures: list[tuple[int, int, Picture]] = []

    def write(
        self, y: int, x: int, text: str, style: Style, room: int,
        across: Literal["left", "center", "right"] = "left", down: Literal["top", "center"] = "top",
    ) -> None:  # fmt: skip
        """Write one line of text, shortened in its middle to ``room`` pixels; (y, x) is its corner, or its middle."""
        self.figure.text(
            x / self.width, 1 - y / self.height, shorten(text, room, style), va=down, ha=across, color=style.colour,
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


def fit(picture: Picture, high: int, wide: int) -> Picture:
    """Scale a picture so that it is at most so high and wide: up by a whole factor, without smoothing, or down."""
    height, width = picture.shape[:2]
    factor = min(high // height, wide // width)
    if factor >= 1:
        return picture.repeat(factor, axis=0).repeat(factor, axis=1)
    scale = min(high / height, wide / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


# Text


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
