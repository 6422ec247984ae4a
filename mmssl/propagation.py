"""Label propagation: the labels of a video's first frame, carried on by the similarity of features alone.

Every token of a new frame takes the mean label of the tokens most similar to it near the same place in the first frame
and in the last few ones, as in the evaluations of CRW (arXiv:2006.14613, section 3) and DINO (arXiv:2104.14294, section
4.2.2). Nothing is learned. N tokens of a grid (rows, columns) are in reading order, D channels, C labels, F context
frames, k neighbours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BAND_TOKENS = 180
"""Query tokens compared at once. More of them see more that is too far from each, fewer make slow matrix products. On a
CPU, at 30 x 54 tokens of 384 channels, 90 to 180 are equally fast within the noise, and the threads of few bands wait
for each other less often."""
ROOM = 8
"""For so many frames there is room from the start; it doubles as more come, so that a long context costs what it uses.
"""
TINY = 2.0**-52
"""The unit in which float64 keys prefer near tokens. On a grid of h x w tokens it is taken less than 4 h w times: 2^-36
on 90 x 160 tokens, and below 2^-25, half of what fp32 similarities differ by next to 1, up to 2^25 tokens."""


class Neighbours(NamedTuple):
    """The most similar tokens of each query token, best first; ``k`` is at most the number of all source tokens."""

    values: Tensor
    """Cosine similarities, fp32 [N, k]; -inf where a window holds fewer than k tokens."""
    frame: Tensor
    """The index of the source frame, int64 [N, k]."""
    token: Tensor
    """The token in that frame, int64 [N, k]."""


class Window:
    """Which tokens may be neighbours: those at most ``radius`` rows and ``radius`` columns away; 0 allows all.

    It is a table of penalties by offset, for places in the longer axis' order. Inside it is a token's rank, tiny, and
    outside -inf, so that equal similarities are told apart: the nearest place comes first, then the first one in
    reading order.
    """

    def __init__(self, grid: tuple[int, int], radius: int, device: torch.device | str = "cpu") -> None:
        self.radius = _reach(grid, radius)
        down, across = (torch.arange(1 - length, length, device=device) for length in grid)
        outside = (down.abs() > self.radius)[:, None] | (across.abs() > self.radius)
        squares = down[:, None] ** 2 + across**2
        # Sorted by distance; the sort is stable, and offsets are in reading order.
        order = squares.masked_fill(outside, squares.max() + 1).flatten().argsort(stable=True)
        ranks = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
        penalties = (-TINY * ranks.double()).view_as(squares).masked_fill(outside, -torch.inf)
        self._penalties = penalties.T.contiguous() if _is_wide(grid) else penalties
        self.length = min(grid)

    def penalties(self, band: "_Band") -> Tensor:
        """Return those of a band's query tokens (rows) and source tokens, float64 [T, M]."""
        lines, near = (len(self._penalties) + 1) // 2, band.near_last - band.near_first
        first = band.near_first - band.last + lines
        table = self._penalties[first : first + band.last - band.first + near - 1]
        # Windows of the table begin with the last query token's.
        return table.unfold(0, near, 1).unfold(1, self.length, 1).flip(0, 1).reshape(-1, near * self.length)


class Propagator:
    """Carries soft labels from the first frame of a video through all others, one frame at a time.

    A frame's context is the first frame and the ``context`` frames before it, the first one never twice. ``radius`` is
    in tokens (0: everywhere), ``topk`` counts neighbours over all context frames together, and ``temperature`` divides
    cosine similarities; the defaults are those of DINO's evaluation on DAVIS. Computed in fp32 whatever autocast says:
    bf16 similarities swap neighbours.

    Raises ValueError for an empty grid, a negative context or radius, topk below 1, a temperature not above 0.
    """

    def __init__(
        self, grid: tuple[int, int], context: int = 7, radius: int = 12, topk: int = 5, temperature: float = 0.1
    ) -> None:
        _check_window(grid, radius, topk)
        if context < 0:
            raise ValueError(f"context is a number of frames, 0 or more, not {context}")
        if not temperature > 0:
            raise ValueError(f"temperature is above 0, not {temperature}")
        self.grid, self.context, self.radius, self.topk, self.temperature = grid, context, radius, topk, temperature
        # What is kept has the longer axis first, the order in which bands are contiguous.
        self._turned = _is_wide(grid)
        self._window: Window | None = None
        self._frames = 0

    @torch.no_grad()
    def start(self, features: Tensor, labels: Tensor) -> None:
        """Begin a video with the features [N, D] and labels [N, C] of its first frame; what was before is forgotten.

        Raises ValueError where they are not of the grid.
        """
        self._check(features, "features")
        self._check(labels, "labels")
        self._window = Window(self.grid, self.radius, features.device)
        # The first frame, then a ring of the last ones.
        room = min(ROOM, 1 + self.context)
        self._features = features.new_empty(room, *features.shape, dtype=torch.float32)
        self._labels = labels.new_empty(room, *labels.shape, dtype=torch.float32)
        self._frames = 0
        self._keep(self._turn(_normalised(features)), self._turn(labels.float()))

    @torch.no_grad()
    def step(self, features: Tensor) -> Tensor:
        """Return the labels of the next frame, fp32 [N, C], from its features [N, D], and keep them for later frames.

        Raises ValueError before ``start``, and where the features are not of the grid or of another dimension.
        """
        if self._window is None:
            raise ValueError("the first frame's labels are missing: call start before step")
        self._check(features, "features")
        channels = self._features.shape[2]
        if features.shape[1] != channels:
            raise ValueError(f"the first frame's features have {channels} channels, not {features.shape[1]}")
        query, seen = self._turn(_normalised(features)), min(self._frames, 1 + self.context)
        found = _nearest(query, self._features[:seen], self._window, self.topk)
        labels = blend(found, self._labels[:seen], self.temperature)
        self._keep(query, labels)
        return _transposed(labels, self.grid[::-1]) if self._turned else labels

    def _keep(self, features: Tensor, labels: Tensor) -> None:
        if self._frames == 0 or self.context > 0:
            slot = 1 + (self._frames - 1) % self.context if self._frames > 0 else 0
            if slot == len(self._features):
                self._features, self._labels = (self._roomier(kept) for kept in (self._features, self._labels))
            self._features[slot], self._labels[slot] = features, labels
        self._frames += 1

    def _roomier(self, kept: Tensor) -> Tensor:
        return torch.cat((kept, kept.new_empty(min(len(kept), 1 + self.context - len(kept)), *kept.shape[1:])))

    def _turn(self, values: Tensor) -> Tensor:
        return _transposed(values, self.grid) if self._turned else values

    def _check(self, values: Tensor, what: str) -> None:
        rows, columns = self.grid
        if values.ndim != 2 or len(values) != rows * columns:
            raise ValueError(f"{what} are [{rows * columns}, ...] on a grid of {rows} x {columns} tokens, "
                             f"not {list(values.shape)}")  # fmt: skip


@torch.no_grad()
def nearest(query: Tensor, sources: Sequence[Tensor], grid: tuple[int, int], radius: int, topk: int) -> Neighbours:
    """Return the ``topk`` source tokens of largest dot product with each query token [N, D] inside its window.

    Sources are [N, D] each; give normalised features, and the products are cosine similarities. The similarities of
    equal bits are ordered by place (see ``Window``), then by frame; the rest of the choice is as exact as fp32 is.
    Raises ValueError for an empty grid, a negative radius or topk below 1.
    """
    _check_window(grid, radius, topk)
    window, turned = Window(grid, radius, query.device), _is_wide(grid)
    query, seen = query.float(), torch.stack(tuple(sources)).float()
    if not turned:
        return _nearest(query, seen, window, topk)
    turned_seen = torch.stack([_transposed(source, grid) for source in seen])
    found = _nearest(_transposed(query, grid), turned_seen, window, topk)
    rows, columns = grid
    token = found.token % rows * columns + found.token // rows
    return Neighbours(*(_transposed(part, grid[::-1]) for part in (found.values, found.frame, token)))


def blend(neighbours: Neighbours, labels: Tensor, temperature: float) -> Tensor:
    """Return the mean label of each token's neighbours, fp32 [N, C], weighted by softmax(similarity / temperature).

    ``labels`` are [F, N, C], those of all source frames. The weights of missing neighbours are 0.
    """
    weights = (neighbours.values / temperature).softmax(1)
    return (weights.unsqueeze(2) * labels[neighbours.frame, neighbours.token]).sum(1)


def dense_window(grid: tuple[int, int], radius: int, device: torch.device | str = "cpu") -> Tensor:
    """Return which tokens are in which query token's window, bool [N, N]: what ``Window`` does without."""
    rows, columns = grid
    token = torch.arange(rows * columns, device=device)
    row, column = token // columns, token % columns
    reach = _reach(grid, radius)
    return ((row[:, None] - row).abs() <= reach) & ((column[:, None] - column).abs() <= reach)


@torch.no_grad()
def dense_propagate(
    query: Tensor, sources: Sequence[Tensor], labels: Sequence[Tensor], inside: Tensor, topk: int, temperature: float
) -> Tensor:
    """Return the labels [N, C] of normalised query features [N, D]: the slow twin of ``nearest`` and ``blend``.

    All N x F N similarities at once, masked by ``inside`` (``dense_window``), the topk of them all, and a product of
    N x F N weights with the labels. Which of two equal similarities is taken is up to ``torch.topk``.
    """
    with torch.autocast(query.device.type, enabled=False):
        similarity = query @ torch.cat(tuple(sources)).T
        similarity = similarity.masked_fill(~inside.repeat(1, len(sources)), -torch.inf)
        values, index = similarity.topk(min(topk, similarity.shape[1]))
        weights = torch.zeros_like(similarity).scatter_(1, index, (values / temperature).softmax(1))
        return weights @ torch.cat(tuple(labels))


@dataclass(frozen=True)
class _Band:
    # Lines of the longer axis: query lines first to last, and the source lines that are near any of them.
    first: int
    last: int
    near_first: int
    near_last: int


def _bands(lines: int, length: int, radius: int) -> Iterator[_Band]:
    size = max(1, BAND_TOKENS // length)
    for first in range(0, lines, size):
        last = min(first + size, lines)
        yield _Band(first, last, max(0, first - radius), min(lines, last + radius))


def _nearest(query: Tensor, sources: Tensor, window: Window, topk: int) -> Neighbours:
    # Both have the longer axis first: bands of its lines are then slices, and nothing is copied for a product.
    frames, tokens, length = len(sources), len(query), window.length
    bands = list(_bands(tokens // length, length, window.radius))
    # One buffer for all bands: fresh pages cost as much as what is written to them.
    most = max((band.last - band.first) * (band.near_last - band.near_first) for band in bands) * length**2
    buffer = query.new_empty(frames * most)
    place = query.new_zeros(2, tokens, min(topk, frames * tokens), dtype=torch.int64)
    out = Neighbours(query.new_full(place.shape[1:], -torch.inf), *place)
    with torch.autocast(query.device.type, enabled=False):
        for band in bands:
            mine = slice(band.first * length, band.last * length)
            near = slice(band.near_first * length, band.near_last * length)
            shape = frames, mine.stop - mine.start, near.stop - near.start
            similarity = buffer[: prod(shape)].view(shape)
            # One call for all frames: threads meet once in it, which is slow where others use the cores too.
            torch.bmm(query[mine].expand(frames, -1, -1), sources[:, near].transpose(1, 2), out=similarity)
            found = _best(similarity, window.penalties(band), topk)
            count = found.values.shape[1]
            out.values[mine, :count], out.frame[mine, :count] = found.values, found.frame
            out.token[mine, :count] = found.token + near.start
    return out


def _best(similarity: Tensor, penalty: Tensor, topk: int) -> Neighbours:
    """Return the topk of similarities [F, T, M] over frames and places; the penalties [T, M] of places settle ties.

    Each of the topk lies at one of the topk places that are best in any frame, so that only these few are looked at.
    """
    best = similarity.amax(0)
    keys, place = (penalty + best).topk(min(topk, len(best[0])))
    candidates = similarity.gather(2, place.expand(len(similarity), -1, -1)).transpose(0, 1)
    # What was taken off the best of a place is taken off the others there. The sort is stable, so that the earliest
    # frame comes first where place and similarity are the same.
    keys = (candidates + (keys - best.gather(1, place)).unsqueeze(1)).flatten(1)
    keys, order = torch.sort(keys, dim=1, descending=True, stable=True)
    keys, order = keys[:, :topk], order[:, :topk]
    values = candidates.flatten(1).gather(1, order).masked_fill(keys.isinf(), -torch.inf)
    return Neighbours(values, order // place.shape[1], place.gather(1, order % place.shape[1]))


def _normalised(features: Tensor) -> Tensor:
    # A vector of zeros stays one: it is equally unlike everything, and the nearest tokens win.
    return F.normalize(features.float(), dim=1)


def _reach(grid: tuple[int, int], radius: int) -> int:
    # Beyond the longer axis nothing is, whatever number was given.
    return min(radius, max(grid)) if radius > 0 else max(grid)


def _is_wide(grid: tuple[int, int]) -> bool:
    return grid[1] > grid[0]


def _transposed(values: Tensor, grid: tuple[int, int]) -> Tensor:
    # [N, ...] in reading order of ``grid`` to that of the grid turned over.
    return values.view(*grid, -1).transpose(0, 1).reshape(len(values), -1)


def _check_window(grid: tuple[int, int], radius: int, topk: int) -> None:
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"a frame's grid is (rows, columns), both 1 or more, not {tuple(grid)}")
    if radius < 0:
        raise ValueError(f"radius is a number of tokens, or 0 for everywhere, not {radius}")
    if topk < 1:
        raise ValueError(f"topk is a number of neighbours, 1 or more, not {topk}")
