"""Retrieval across modalities: for each of one, which of all of the other belongs to it (CLIP, arXiv:2103.00020).

Shape legend: q queries, c candidates, p pairs of those that belong together, d the width of the joint space.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from mmssl.data import fragment, inline
from mmssl.data.guard import BrokenFile
from mmssl.data.listing import Listing
from mmssl.data.pairs import list_pairs
from mmssl.errors import UnusableData, UserError, nearest
from mmssl.files import write_json
from modalities.joint import JointEncoder, check_together, joint_encoders, of_modality
from modalities.text_read import Document
from tasks.features import ExtractOptions, extract
from tasks.metrics import Score, score_table, scores_as_dict
from tasks.report import Section, Table, Words, write_report

AT = (1, 5, 10)
"""Recall is measured among so many of the best."""
TIE = 1e-6
"""Cosines that differ by less are equal: it is the rounding of float32."""


class Side(NamedTuple):
    """What there is of one modality, each once, with its vector."""

    tower: JointEncoder
    paths: list[str]
    vectors: Tensor
    """Float32 [n, d]."""

    @property
    def modality(self) -> str:
        """Its name."""
        return self.tower.modality


class Matches(NamedTuple):
    """Two modalities, and which of one belongs to which of the other."""

    a: Side
    b: Side
    pairs: Tensor
    """Int64 [p, 2], each once: places in ``a`` and in ``b``."""

    def turned(self) -> "Matches":
        """Return the same the other way round."""
        return Matches(self.b, self.a, self.pairs.flip(1))

    @property
    def name(self) -> str:
        """Which way is asked."""
        return f"{self.a.modality}_to_{self.b.modality}"


@dataclass(frozen=True)
class Direction:
    """How well one modality finds the other."""

    recall: dict[str, Score]
    """By "recall@k"."""
    median_rank: float
    """Of the first right candidate, from 1."""
    chance: dict[str, float]
    """The recalls of a random order."""
    queries: int
    candidates: int


@dataclass(frozen=True)
class RetrievalResult:
    """How well each modality finds the other, in both directions."""

    directions: dict[str, Direction]
    """By "a_to_b"."""
    skipped: list[tuple[str, str]]
    """(name, reason) of broken files that were left out on request."""
    rows: dict[str, int]
    """By "a_to_b", of how many rows, which are those that have both."""
    listed: int
    """How many rows there are."""
    gallery: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON; scores are fractions."""
        ways = self.directions
        skipped = [{"path": path, "reason": reason} for path, reason in self.skipped]
        return {
            "task": "retrieve",
            **{name: scores_as_dict(way.recall) for name, way in ways.items()},
            "median_rank": {name: way.median_rank for name, way in ways.items()},
            "chance": {name: way.chance for name, way in ways.items()},
            "queries": {name: way.queries for name, way in ways.items()},
            "candidates": {name: way.candidates for name, way in ways.items()},
            "rows": self.rows,
            "skipped": skipped,
        }

    def render(self, console: Console) -> None:
        """Print one table and what a reader must know."""
        rows = {_words(name): way.recall for name, way in self.directions.items()}
        console.print(score_table("retrieval", rows, "queries"))
        for line in self.lines():
            console.print(line, markup=False, soft_wrap=True)

    def lines(self) -> list[str]:
        """Return what a reader must know, in words."""
        found = []
        for name, way in self.directions.items():
            chance = ", ".join(f"{value:.1%}" for value in way.chance.values())
            found.append(
                f"{_words(name)}: {way.queries:,} queries among {way.candidates:,}, median rank {way.median_rank:g}; a "
                f"random order scores {chance}"
            )
            if self.rows[name] < self.listed:
                found[-1] += f" (the {self.rows[name]:,} of {self.listed:,} rows that have both)"
        if self.skipped:
            found.append(f"{len(self.skipped)} broken files left out, with what belongs to them alone")
        return found if self.gallery is None else [*found, f"gallery in {self.gallery}"]

    def report(self, out: Path, name: str, more: Sequence[Section] = ()) -> None:
        """Write the page; ``more`` are sections behind the scores."""
        columns = ["", *next(iter(self.directions.values())).recall]
        rows: list[list[str | Score]] = [
            [_words(way), *found.recall.values()] for way, found in self.directions.items()
        ]
        note = "Share of the queries whose right answer is among so many of the best, with 95 % intervals."
        sections: list[Section] = [Table("Recall", note, columns, rows), *more]
        best = next(iter(self.directions.items()))
        title = f"{best[1].recall['recall@1'].value:.1%} of first answers right, {_words(best[0])}"
        write_report(out, title, name, [*sections, Words("Measured on", "\n\n".join(self.lines()))])


def _words(name: str) -> str:
    return name.replace("_", " ")


def retrieve(
    encoder: str | Path | Mapping[str, JointEncoder],
    data: str | Path,
    split: str | None = None,
    between: Sequence[str] | None = None,
    gallery: str | Path | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    **options: Unpack[ExtractOptions],
) -> RetrievalResult:
    """Measure how well the modalities of ``data`` find each other by the vectors of a run's towers, both ways.

    ``encoder`` is a run folder, or the towers that ``joint_encoders`` returns. Of several towers the centre is measured
    with each other, or the two in ``between``. ``gallery`` is a PNG of queries with their best answers; ``out`` a
    folder for ``retrieve.json``, ``gallery.png`` and ``report.html``. A file that stands in several rows, or a text, is
    one, and all that belongs to it is right. Of several towers, two are measured on the rows that have both. ``seed``
    is that of the intervals. Raises UserError for a mistake before anything is computed, and UnusableData for a broken
    file unless ``skip_broken``.
    """
    towers = joint_encoders(encoder) if isinstance(encoder, str | Path) else encoder
    where = encoder if isinstance(encoder, str | Path) else "the encoder"
    check_together(towers, where)
    ways = _asked(towers, between, where)
    if gallery is not None and Path(gallery).suffix.lower() != ".png":
        raise UserError(f"{gallery}: the gallery is a picture, so the name must end in .png")
    out = None if out is None else Path(out)
    png = out and out / "gallery.png" if gallery is None else Path(gallery)
    kinds = [towers[name].encoder.kind for name in dict.fromkeys(name for way in ways for name in way)]
    listing = list_pairs(data, kinds, split, "test", strict=len(towers) == 2)
    rows = {way: len(_with_both(listing, *way)) for way in ways}
    for folder in filter(None, (out, png and png.parent)):
        folder.mkdir(parents=True, exist_ok=True)
    found: list[Matches] = []
    skipped: dict[str, str] = {}
    for a, b in ways:
        match, broken = matches(towers[a], towers[b], listing, **options)
        found.append(match)
        skipped |= dict(broken)
    directions = {one.name: direction(one, seed) for match in found for one in (match, match.turned())}
    counts = {f"{a}_to_{b}": n for way, n in rows.items() for a, b in (way, way[::-1])}
    result = RetrievalResult(directions, list(skipped.items()), counts, len(listing), png)
    if png is not None:
        _written(result, found, png, out, str(data))
    return result


def _written(result: RetrievalResult, found: Sequence[Matches], png: Path, out: Path | None, name: str) -> None:
    from tasks.panels_page import write_panel
    from tasks.panels_retrieval import gallery_panel, gallery_sections

    panel = gallery_panel([one for match in found for one in (match.turned(), match)])
    write_panel(png, panel)
    if out is not None:
        write_json(out / "retrieve.json", result.as_dict())
        result.report(out / "report.html", name, gallery_sections(panel))


def _asked(
    towers: Mapping[str, JointEncoder], between: Sequence[str] | None, where: str | Path
) -> list[tuple[str, str]]:
    """Return which two modalities are compared, the pairs of the centre by default."""
    if between is None:
        centre, *others = towers
        return [(centre, other) for other in others]
    if len(between) != 2 or between[0] == between[1]:
        raise UserError(f"between {','.join(between)}: name two modalities{nearest('', towers)}")
    for name in between:
        of_modality(towers, name, where)
    return [(between[0], between[1])]


# What belongs together


def matches(
    a: JointEncoder, b: JointEncoder, listing: Listing, **options: Unpack[ExtractOptions]
) -> tuple[Matches, list[tuple[str, str]]]:
    """Return the vectors of two modalities and their pairs, and (name, reason) of broken files that were left out.

    Files are told apart by what their paths lead to, texts by what their tower gets to see of them. Raises UserError
    where no row has both, and as ``extract``.
    """
    rows = _with_both(listing, a.modality, b.modality)
    sides, places, skipped = [], [], []
    for tower, column in zip((a, b), zip(*rows, strict=True), strict=True):
        keys = [_identity(tower, path) for path in column]
        unique = dict(zip(reversed(keys), reversed(column), strict=True))  # the first path of each
        order = list(dict.fromkeys(keys))
        files = Listing(listing.root, [unique[key] for key in order])
        features = extract(tower, files, **options)
        sides.append(Side(tower, files.select(features.kept).paths, features.vectors))
        place = {order[kept]: i for i, kept in enumerate(features.kept)}
        places.append([place.get(key) for key in keys])
        skipped += features.skipped
    whole = sorted({(i, j) for i, j in zip(*places, strict=True) if i is not None and j is not None})
    if not whole:
        raise UnusableData(f"{listing.root}: no row is left of which both files can be read")
    return _connected(Matches(sides[0], sides[1], torch.tensor(whole))), skipped


def _with_both(listing: Listing, a: str, b: str) -> list[tuple[str, str]]:
    media = zip(listing.media[a], listing.media[b], strict=True)
    rows = [(one, other) for one, other in media if one is not None and other is not None]
    if not rows:
        raise UserError(f"{listing.root}: no row has both {a} and {b}")
    return rows


def _connected(match: Matches) -> Matches:
    """Leave out what a broken partner has left without one."""
    columns, sides = [], []
    for side, column in zip((match.a, match.b), match.pairs.unbind(1), strict=True):
        there, places = column.unique(return_inverse=True)
        sides.append(Side(side.tower, [side.paths[i] for i in there.tolist()], side.vectors[there]))
        columns.append(places)
    return Matches(sides[0], sides[1], torch.stack(columns, dim=1))


def _identity(tower: JointEncoder, path: str) -> str | bytes | fragment.Span:
    if tower.modality != "text":
        return fragment.real(path)
    try:
        return tower.seen(path)
    except BrokenFile:
        return path  # whoever embeds it will say so


def text_of(tower: JointEncoder, path: str) -> str:
    """Return what a text says, in a file or by itself; raises BrokenFile."""
    text = inline.text(path)
    if text is not None:
        return text
    document = tower.decode(path)
    assert isinstance(document, Document)
    return document.text


# Scores


def direction(match: Matches, seed: int = 0, resamples: int = 1000, confidence: float = 0.95) -> Direction:
    """Return how well ``match.a`` finds ``match.b``.

    Intervals are percentiles of ``resamples`` bootstrap resamples of the queries.
    """
    rank = ranks(match.a.vectors, match.b.vectors, match.pairs)
    count, candidates = len(rank), len(match.b.paths)
    hits = [int((rank < k).sum()) for k in AT]
    # The share of queries that are first right within AT[0], AT[1] ..., or not at all: that is all a resample knows.
    parts = np.diff([0, *hits, count]) / count
    drawn = np.random.default_rng(seed).multinomial(count, parts, size=resamples)[:, :-1].cumsum(1) / count
    tail = (1 - confidence) / 2
    bounds = np.quantile(drawn, [tail, 1 - tail], axis=0)
    recall = {f"recall@{k}": Score(hits[i] / count, *map(float, bounds[:, i])) for i, k in enumerate(AT)}
    right = torch.bincount(match.pairs[:, 0], minlength=count)
    chance = {f"recall@{k}": by_chance(right, candidates, k) for k in AT}
    return Direction(recall, float(rank.double().quantile(0.5)) + 1, chance, count, candidates)


def ranks(queries: Tensor, candidates: Tensor, pairs: Tensor, chunk: int = 1024) -> Tensor:
    """Return for each query [q, d] how many wrong candidates [c, d] are at least as near as its nearest right one.

    Vectors are of length 1; ``pairs`` int64 [p, 2] are query and right candidate, at least one of each query. So int64
    [q], 0 where the best is right: of equal ones the wrong come first. No more than ``chunk`` x ``chunk`` similarities
    are there at a time.
    """
    pairs = pairs[pairs[:, 0].argsort(stable=True)]
    own = torch.cat([(queries[part[:, 0]] * candidates[part[:, 1]]).sum(1) for part in pairs.split(chunk)])
    best = torch.full((len(queries),), -math.inf).scatter_reduce(0, pairs[:, 0], own, "amax")
    assert best.isfinite().all(), "a query without a right candidate"
    found = torch.zeros(len(queries), dtype=torch.int64)
    for top, bottom in pairwise([*range(0, len(queries), chunk), len(queries)]):
        first, last = torch.searchsorted(pairs[:, 0].contiguous(), torch.tensor([top, bottom])).tolist()
        rows, columns = (pairs[first:last] - torch.tensor([top, 0])).unbind(1)
        for left, right in pairwise([*range(0, len(candidates), chunk), len(candidates)]):
            near = queries[top:bottom] @ candidates[left:right].T >= best[top:bottom, None] - TIE
            inside = (columns >= left) & (columns < right)
            near[rows[inside], columns[inside] - left] = False
            found[top:bottom] += near.sum(1)
    return found


def by_chance(right: Tensor, candidates: int, k: int) -> float:
    """Return the recall at ``k`` of a random order, where queries have so many ``right`` of all, int64 [q]."""
    if k >= candidates:
        return 1.0
    # (wrong choose k) / (all choose k): none of the first k is right.
    drawn = torch.arange(k, dtype=torch.float64)
    counts, times = right.unique(return_counts=True)
    missed = ((candidates - counts[:, None] - drawn).clamp(min=0) / (candidates - drawn)).prod(1)
    return float(1 - (missed * times).sum() / len(right))
