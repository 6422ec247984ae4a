"""Panels: captioned pictures of files, as data that ``panels_page`` lays out as one PNG or as a report page.

So every panel and modality is drawn by the same few functions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import NamedTuple, TypeVar

from torch import Tensor

from mmssl.data.guard import BrokenFile, guarded
from mmssl.errors import UnusableData
from modalities.abilities import Moves
from modalities.encoder import DECODE_TIMEOUT, MODALITIES, EncoderConfig
from tasks.report import Axes, Picture, Shown, as_medium, is_wide

T = TypeVar("T")


@dataclass(frozen=True)
class Shot:
    """One picture and what is written above it; a line break starts a second line."""

    caption: str
    shown: Shown

    @property
    def picture(self) -> Picture:
        """Its pixels, uint8 [h, w, 3]."""
        return as_medium(self.shown).picture

    @property
    def axes(self) -> Axes | None:
        """What is written below and beside it."""
        return as_medium(self.shown).axes


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
    """Longer side of the pictures in pixels; by default whatever fits the page."""


def pictures_of(blocks: Sequence[Block]) -> list[Shown]:
    """Return all that is shown."""
    return [shot.shown for block in blocks for line in block.lines for shot in line.shots if shot is not None]


def arranged(blocks: Sequence[Block]) -> Sequence[Block]:
    """Return blocks whose pictures go below each other, lines becoming columns, if any picture is wide."""
    return [_turned(block) for block in blocks] if any(map(is_wide, pictures_of(blocks))) else blocks


def _turned(block: Block) -> Block:
    # The first line's label stood above all; that of a line which is now a column goes to each of its pictures.
    labels = ["", *(f"{line.label}: " if line.label else "" for line in block.lines[1:])]
    columns = [
        [shot and replace(shot, caption=label + shot.caption.replace("\n", ", ")) for shot in line.shots]
        for label, line in zip(labels, block.lines, strict=True)
    ]
    return Block(block.name, [Line("", shots) for shots in zip_longest(*columns)])


# Files


class Files(NamedTuple):
    """The files that are shown, and what they are called there."""

    paths: list[str]
    names: list[str]


def read_example(config: EncoderConfig, path: str, timeout: float = DECODE_TIMEOUT) -> dict[str, Tensor]:
    """Return a file as an objective of this configuration sees it: its inputs, [C, *size]; UnusableData names it."""
    kind = MODALITIES[config.modality]
    return _unbroken(lambda name: kind.example(name, config.signal, config.model.tokenizer), path, timeout)


def read_signal(config: EncoderConfig, path: str, timeout: float = DECODE_TIMEOUT) -> Tensor:
    """Return a file as an encoder of this configuration sees it, [C, *size]; raises UnusableData naming it."""
    return read_example(config, path, timeout)["signal"]


def read_rate(config: EncoderConfig, path: str, timeout: float = DECODE_TIMEOUT) -> float:
    """Return how many frames of a file's signal pass in a second, 0 of what does not move; raises UnusableData."""
    kind = MODALITIES[config.modality]
    return _unbroken(lambda name: kind.pace(name, config.signal), path, timeout) if isinstance(kind, Moves) else 0.0


def _unbroken(function: Callable[[str], T], path: str, timeout: float) -> T:
    try:
        return guarded(function, path, timeout)
    except BrokenFile as error:
        raise UnusableData(f"{path}: {error.reason}") from None
