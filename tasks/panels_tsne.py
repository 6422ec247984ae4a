"""A map of the vectors that ``mmssl embed`` wrote: t-SNE (van der Maaten and Hinton, JMLR 9, 2008), coloured."""

from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.path import Path as MarkerPath
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from mmssl.errors import UnusableData, UserError, nearest
from mmssl.files import legible
from tasks.panels import Block, Line, Panel, Shot
from tasks.panels_page import DPI, INK, SOFT, rasterize
from tasks.writer import say

HUES = (
    "#0092ff", "#ff5b00", "#009224", "#c82492", "#6d37db", "#002492", "#00ed6d", "#ff80ff", "#6d005b", "#494900",
)  # fmt: skip
"""Far apart from each other and from the greys, also for those who confuse red and green, at the size of a point."""
MARKERS = "o^s"
"""Groups beyond the hues have these again, as another shape."""
SHOWN = len(HUES) * len(MARKERS)
"""As many groups are told apart; the smaller ones beyond share a grey."""
FEWEST = 4
"""A map of fewer points shows nothing."""
MANY = 2000
"""A map of more vectors takes so long that a person is told."""
PER_MINUTE = 5000
"""About as many vectors are placed in a minute."""
PERPLEXITY = 30.0
MAP, LEGEND, ENTRY = 9.0, 3.0, 0.3
"""Width of the map and of the legend beside it, and height of a legend's entry, in inches of ``DPI`` pixels."""
OTHERS, UNLABELLED = "#9aa3ad", "#d4d8dd"


class Entry(NamedTuple):
    """How a group is drawn and what the legend says of it."""

    words: str
    colour: str
    marker: str = MARKERS[0]


def tsne_panel(path: Path, color_by: str, most: int, seed: int) -> tuple[Panel, dict[str, Any]]:
    """Return the map of a parquet file's vectors, coloured by its column ``label`` or ``split``, and facts.

    The same file and seed give the same picture. Of more than ``most`` vectors, so many are drawn by lot. Raises
    UserError for a file that ``mmssl embed`` did not write, and UnusableData for vectors that are not finite.
    """
    vectors, groups, total = read_vectors(path, color_by, most, seed)
    count = len(vectors)
    if count > MANY:
        minutes = max(1, round(count / PER_MINUTE))
        say(f"t-SNE of {count:,} vectors takes about {'a minute' if minutes == 1 else f'{minutes:,} minutes'}; "
            "--most draws fewer")  # fmt: skip
    perplexity = min(PERPLEXITY, (count - 1) / 3)
    model = TSNE(2, perplexity=perplexity, init="pca", random_state=seed)
    # Normalised, as k-NN and retrieval compare them: by angle.
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-30)
    with threadpool_limits(1):  # sums over threads differ in their last bits, and t-SNE makes much of these
        places = model.fit_transform(directions)
    which = f"{count:,} of {total:,} vectors, drawn by lot with seed {seed}" if count < total else f"{count:,} vectors"
    note = (
        f"{which}, coloured by {color_by}; normalised, perplexity {perplexity:.3g}, started from PCA, seed {seed}. "
        "Neighbours are near each other; distances between groups and their sizes mean little."
    )
    what = "row" if "start" in pq.read_schema(path).names else "file"  # of pieces and moments, a file has many
    shot = Shot(f"one point per {what}, coloured by {color_by}", rasterize(_scatter(places, groups)))
    block = Block(legible(path.name), [Line("", [shot])])
    panel = Panel("t-SNE", note, [block], side=max(shot.picture.shape))
    facts = {"vectors": total, "shown": count, "perplexity": perplexity, "color_by": color_by, "seed": seed}
    return panel, facts


def read_vectors(
    path: Path, color_by: str, most: int, seed: int
) -> tuple[np.ndarray[Any, np.dtype[np.float32]], list[str | None], int]:
    """Return at most ``most`` vectors float32 [n, dim], their groups, and how many there are in all."""
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise _unreadable(path, error) from None
    schema, total = file.schema_arrow, file.metadata.num_rows
    names = schema.names
    if "vector" not in names or not pa.types.is_fixed_size_list(schema.field("vector").type):
        raise UserError(f"{path} holds no vectors; write it with mmssl embed")
    if color_by not in names:
        raise UserError(f"{path} has no column '{color_by}' to colour by{nearest(color_by, set(names) - {'vector'})}")
    if total < FEWEST:
        raise UserError(f"{path} holds {total} vectors, and a map takes at least {FEWEST}")
    rows = np.arange(total)
    if total > most:
        rows = np.sort(np.random.default_rng(seed).choice(total, most, replace=False))
    try:
        table = _take(file, ["vector", color_by], rows)
    except pa.ArrowException as error:
        raise _unreadable(path, error) from None
    vectors = np.stack(table.column("vector").to_numpy()).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(bad):
        raise UnusableData(f"{path}: the vector of row {rows[bad[0]] + 1} is NaN or infinite")
    groups = [None if value is None else str(value) for value in table.column(color_by).to_pylist()]
    return vectors, groups, total


def _unreadable(path: Path, error: pa.ArrowException) -> UserError:
    return UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})")


def _take(file: pq.ParquetFile, columns: list[str], rows: np.ndarray[Any, np.dtype[np.int64]]) -> pa.Table:
    """Return the rows with these sorted numbers, with one row group in memory at a time."""
    parts, start = [], 0
    for group in range(file.num_row_groups):
        stop = start + file.metadata.row_group(group).num_rows
        inside = rows[(start <= rows) & (rows < stop)] - start
        if len(inside):
            parts.append(file.read_row_group(group, columns=columns).take(inside))
        start = stop
    return pa.concat_tables(parts)


def _scatter(places: np.ndarray[Any, Any], groups: Sequence[str | None]) -> Figure:
    legend = _legend(groups)
    entries = list(dict.fromkeys(legend.values()))
    centre, extent = (places.max(0) + places.min(0)) / 2, np.maximum(1.06 * np.ptp(places, axis=0), 1e-9)
    height = max(float(np.clip(MAP * extent[1] / extent[0], 4, 1.2 * MAP)), ENTRY * (len(entries) + 1))
    width, scale = MAP + LEGEND, float((extent / (MAP, height)).max())
    (left, right), (bottom, top) = (
        (middle - scale * inches / 2, middle + scale * inches / 2)
        for middle, inches in zip(centre.tolist(), (MAP, height), strict=True)
    )
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, MAP / width, 1), xlim=(left, right), ylim=(bottom, top))
    axes.set_axis_off()
    size = float(np.clip(20000 / len(places), 6, 60))
    # In the order of the file, not of the groups: no group lies on top of all others.
    drawn = [legend[group] for group in groups]
    colours = [entry.colour for entry in drawn]
    points = axes.scatter(places[:, 0], places[:, 1], s=size, c=colours, linewidths=0, alpha=0.8)
    points.set_paths([_outline(entry.marker) for entry in drawn])
    _draw_legend(figure.add_axes((MAP / width, 0, LEGEND / width, 1), xlim=(0, LEGEND), ylim=(height, 0)), entries)
    return figure


def _outline(marker: str) -> MarkerPath:
    style = MarkerStyle(marker)
    return style.get_path().transformed(style.get_transform())


def _draw_legend(axes: Axes, entries: Sequence[Entry]) -> None:
    axes.set_axis_off()
    for i, (words, colour, marker) in enumerate(entries, start=1):
        axes.scatter([0.15], [ENTRY * i], s=60, c=[colour], marker=marker, linewidths=0)
        ink = SOFT if colour in (OTHERS, UNLABELLED) else INK
        axes.text(0.3, ENTRY * i, words, va="center", size=9, color=ink, parse_math=False)


def _legend(groups: Sequence[str | None]) -> dict[str | None, Entry]:
    """Return each group's entry of the legend, in the order of their words."""
    counts = Counter(group for group in groups if group is not None)
    common = sorted(sorted(counts, key=lambda group: (-counts[group], group))[:SHOWN])
    legend: dict[str | None, Entry] = {}
    for group, (marker, hue) in zip(common, product(MARKERS, HUES), strict=False):
        name = legible(group)
        words = f"{name if len(name) <= 24 else name[:23] + '…'}  {counts[group]:,}"
        legend[group] = Entry(words, hue, marker)
    rest = set(counts) - set(common)
    words = f"{len(rest)} more  {sum(counts[group] for group in rest):,}"
    legend |= dict.fromkeys(sorted(rest), Entry(words, OTHERS))
    if None in groups:
        legend[None] = Entry(f"none  {sum(group is None for group in groups):,}", UNLABELLED)
    return legend
