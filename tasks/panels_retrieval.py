"""A gallery of retrieval: queries with the best answers to them, framed where they are right."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from mmssl.files import legible
from modalities.abilities import Moves, Sounds
from modalities.joint import JointEncoder
from tasks.knn import neighbours
from tasks.panels import Block, Line, Panel, Shot, read_signal
from tasks.panels_media import view_of
from tasks.panels_page import Page, Style, fit, shorten, wrap
from tasks.report import Picture, Section, Strip
from tasks.retrieve import Matches, Side, text_of

QUERIES, ANSWERS = 5, 5
"""So many queries each way, evenly spaced over all and not chosen by what comes out; so many answers to each."""
SIDE, FRAME, MARGIN = 160, 6, 8
"""Pixels: of a picture's or a text's longer side, of its frame, and between a text and its frame."""
LONGEST = 600
"""Letters of a text that are looked at: more than fit on a card."""
WORDS, PIECE, NARROWEST = Style(8.5, 16), 10, 3
"""How texts are written; letters of a piece of a word that is too long, which fit however wide they are; pixels of the
narrowest letter."""
RIGHT, PLAIN = (0, 146, 36), (255, 255, 255)
"""Colours of frames."""


def gallery_panel(ways: Sequence[Matches]) -> Panel:
    """Return the gallery, a block for each way."""
    note = (
        "First the query, then the best answers to it with their cosine similarity; those that belong to it are framed "
        "and marked. The queries are evenly spaced over all of them."
    )
    blocks = [_block(way) for way in ways]
    return Panel("Retrieval", note, blocks, side=SIDE + 2 * FRAME)


def gallery_sections(panel: Panel) -> list[Section]:
    """Return the gallery's blocks for a report page: a group of queries with their answers below each other."""
    return [
        Strip(
            block.name,
            panel.note if i == 0 else "",
            [[(shot.caption, shot.shown) for shot in line.shots if shot is not None] for line in block.lines],
        )
        for i, block in enumerate(panel.blocks)
    ]


def _block(way: Matches) -> Block:
    queries = np.linspace(0, len(way.a.paths) - 1, min(QUERIES, len(way.a.paths))).round().astype(int).tolist()
    count = min(ANSWERS, len(way.b.paths))
    similarity, index = neighbours(way.b.vectors, way.a.vectors[queries], count)
    pairs = set(map(tuple, way.pairs.tolist()))
    lines = []
    for query, values, places in zip(queries, similarity.tolist(), index.tolist(), strict=True):
        shots = [Shot("query", _framed(_card(way.a, query), PLAIN))]
        for value, place in zip(values, places, strict=True):
            right = (query, place) in pairs
            caption = f"{value:.3f}, right" if right else f"{value:.3f}"
            shots.append(Shot(caption, _framed(_card(way.b, place), RIGHT if right else PLAIN)))
        lines.append(Line("", shots))
    words = f"{way.a.modality} to {way.b.modality}, among {len(way.b.paths):,}"
    return Block(words, lines)


def _framed(picture: Picture, colour: tuple[int, int, int]) -> Picture:
    high, wide = picture.shape[:2]
    framed = np.full((high + 2 * FRAME, wide + 2 * FRAME, 3), colour, np.uint8)
    framed[FRAME:-FRAME, FRAME:-FRAME] = picture
    return framed


def _card(side: Side, place: int) -> Picture:
    if side.modality == "text":
        return written(text_of(side.tower, side.paths[place]))
    return _thumbnail(side.tower, side.paths[place])


def _thumbnail(tower: JointEncoder, path: str) -> Picture:
    """Return a file as its tower sees it: of a video the middle frame, of a sound a square spectrogram."""
    view = view_of(tower.encoder, read_signal(tower.encoder.config, path))
    if isinstance(view.kind, Moves):
        frames = view.kind.motion(view.x, view.signal)
        return fit(frames[len(frames) // 2], SIDE, SIDE)
    if isinstance(view.kind, Sounds):
        return np.asarray(Image.fromarray(view.picture).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    return fit(view.picture, SIDE, SIDE)


@lru_cache(maxsize=256)
def written(text: str) -> Picture:
    """Return a text as a card; what does not fit on it is left out, and an ellipsis says so."""
    room = SIDE - 2 * MARGIN
    words = (_broken(word, room) for word in legible(" ".join(text[:LONGEST].split())).split(" "))
    lines, most = wrap(" ".join(words), room, WORDS), room // WORDS.leading
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1].rpartition(' ')[0]} …".strip()]
    page = Page(SIDE, SIDE)
    for i, line in enumerate(lines):
        page.write(MARGIN + i * WORDS.leading, MARGIN, line, WORDS, room)
    return page.render()


def _broken(word: str, room: int) -> str:
    """Return a word that is wider than ``room`` with spaces in it, as those of a language without any are."""
    fits = len(word) <= PIECE or (len(word) <= room // NARROWEST and shorten(word, room, WORDS) == word)
    return word if fits else " ".join(word[i : i + PIECE] for i in range(0, len(word), PIECE))
