"""Masks as index tensors: which tokens an encoder sees (``keep``) and which it must predict (``drop``).

Masks are drawn per sample in the data workers from the sample's own generator, never inside the model: the same sample
has the same mask on any device, world size, worker count or after a resume.
"""

from collections.abc import Callable, Mapping
from math import ceil, floor, prod
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from torch import Tensor

from mmssl.contracts import Grid

MaskKind = Literal["random", "tube", "time", "frequency", "time_frequency"]

Indices: TypeAlias = dict[str, np.ndarray[Any, Any]]
"""``{"keep": int64 [K], "drop": int64 [M]}``, both sorted: the order of tokens means nothing to a Transformer, and
sorted gathers touch memory in order. K and M depend on the grid alone."""

Lattice: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
"""True where a token is kept; any shape that broadcasts to the grid."""


class Mask(Protocol):
    """A way to draw masks. Every mask keeps at least one token and hides at least one."""

    def kept(self, grid: Grid) -> int:
        """Return how many tokens of a grid stay visible; raises ValueError for a grid that the mask does not suit."""
        ...

    def __call__(self, rng: np.random.Generator, grid: Grid) -> Indices:
        """Draw the mask of one sample on its token grid; raises ValueError as ``kept`` does."""
        ...


class RandomMask:
    """Uniformly random masking without replacement (MAE, arXiv:2111.06377, section 3)."""

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio

    def kept(self, grid: Grid) -> int:
        """Return how many tokens stay visible; ValueError for a grid of one token."""
        return _kept(prod(grid), self.ratio, grid, "tokens")

    def __call__(self, rng: np.random.Generator, grid: Grid) -> Indices:
        """Draw the mask of one sample on its token grid."""
        return _split(_choose(rng, grid, self.kept(grid)), grid)


class TubeMask:
    """One random mask of a frame for all frames (VideoMAE, arXiv:2203.12602, section 3.3).

    What is hidden is hidden at all times, so nothing of it can be copied from the frames before and after.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio

    def kept(self, grid: Grid) -> int:
        """Return how many tokens stay visible, the same number in every frame; ValueError unless ``grid`` is 3-D."""
        time, height, width = _axes(grid, "tube", "(time, height, width)", 3)
        return time * _kept(height * width, self.ratio, grid, "places in a frame")

    def __call__(self, rng: np.random.Generator, grid: Grid) -> Indices:
        """Draw the mask of one clip on its grid (time, height, width)."""
        return _split(_choose(rng, grid[1:], self.kept(grid) // grid[0]), grid)


class TimeMask:
    """Random columns of a spectrogram, each hidden from top to bottom (Audio-MAE, arXiv:2207.06405, section 3)."""

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio

    def kept(self, grid: Grid) -> int:
        """Return how many tokens stay visible; ValueError unless ``grid`` is 2-D."""
        frequency, time = _axes(grid, "time", "(frequency, time)", 2)
        return frequency * _kept(time, self.ratio, grid, "steps of time")

    def __call__(self, rng: np.random.Generator, grid: Grid) -> Indices:
        """Draw the mask of one sound on its grid (frequency, time)."""
        return _split(_choose(rng, (1, grid[-1]), self.kept(grid) // grid[0]), grid)


class FrequencyMask:
    """Random rows of a spectrogram, each hidden from start to end (Audio-MAE, arXiv:2207.06405, section 3)."""

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio

    def kept(self, grid: Grid) -> int:
        """Return how many tokens stay visible; ValueError unless ``grid`` is 2-D."""
        frequency, time = _axes(grid, "frequency", "(frequency, time)", 2)
        return time * _kept(frequency, self.ratio, grid, "bands of frequency")

    def __call__(self, rng: np.random.Generator, grid: Grid) -> Indices:
        """Draw the mask of one sound on its grid (frequency, time)."""
        return _split(_choose(rng, (grid[0], 1), self.kept(grid) // grid[-1]), grid)


class TimeFrequencyMask:
    """Random rows and random columns of a spectrogram, hidden both (Audio-MAE, arXiv:2207.06405, section 3).

    Either axis keeps about the share ``(1 - ratio) ** 0.5`` and never all, so that ``ratio`` is the share of hidden
    tokens, as in every other mask; the paper gives each axis a ratio of its own.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio

    def kept(self, grid: Grid) -> int:
        """Return how many tokens stay visible; ValueError unless ``grid`` is 2-D and has at least 2 tokens."""
        return prod(self._sides(grid))

    def __call__(self, rng: np.random.Generator, grid: Grid) -> Indices:
        """Draw the mask of one sound on its grid (frequency, time)."""
        rows, columns = self._sides(grid)
        return _split(_choose(rng, (grid[0], 1), rows) & _choose(rng, (1, grid[1]), columns), grid)

    def _sides(self, grid: Grid) -> tuple[int, int]:
        # One side is its share rounded down or up, the other makes up for it: of these four the nearest count, then the
        # most even shares.
        frequency, time = _axes(grid, "time_frequency", "(frequency, time)", 2)
        wanted, share = _kept(prod(grid), self.ratio, grid, "tokens"), (1 - self.ratio) ** 0.5
        rows = [_part(rounded(frequency * share), frequency) for rounded in (floor, ceil)]
        columns = [_part(rounded(time * share), time) for rounded in (floor, ceil)]
        sides = [(r, _part(round(wanted / r), time)) for r in rows]
        sides += [(_part(round(wanted / c), frequency), c) for c in columns]
        return min(sides, key=lambda side: (abs(prod(side) - wanted), abs(side[0] / frequency - side[1] / time)))


class RunningCell:
    """Decoder masking (VideoMAE V2, arXiv:2303.16727, section 3.2): of what ``mask`` hides, a share is predicted.

    Every cell of 2 x 2 places goes through its four in turn, one further with each step of time, so that a place is
    predicted equally often as any other over time: with ``ratio`` 0.5 at two of four successive times. Each sample
    starts anywhere in the turn. Pictures and spectrograms have no steps and keep where they start, and tokens in a line
    make cells of four. Where a grid does not hold equally much of all four, chance trims or fills to the same count.
    """

    def __init__(self, mask: Mask, ratio: float) -> None:
        self.mask, self.ratio = mask, ratio

    def kept(self, grid: Grid) -> int:
        """Return how many tokens stay visible: as many as ``mask`` keeps."""
        return self.mask.kept(grid)

    def __call__(self, rng: np.random.Generator, grid: Grid) -> Indices:
        """Draw the mask of one sample; ``drop`` holds at least one token, and never one that is visible."""
        drawn = self.mask(rng, grid)
        hidden = drawn["drop"]
        turn = (_turns(grid).ravel()[hidden] + rng.integers(4)) % 4
        order = np.lexsort((rng.random(len(hidden)), turn))
        count = max(1, int(len(hidden) * self.ratio + 1e-6))
        return drawn | {"drop": np.sort(hidden[order[:count]])}


MASKS: Mapping[MaskKind, Callable[[float], Mask]] = {
    "random": RandomMask,
    "tube": TubeMask,
    "time": TimeMask,
    "frequency": FrequencyMask,
    "time_frequency": TimeFrequencyMask,
}


def gather(tokens: Tensor, index: Tensor) -> Tensor:
    """Pick tokens by index: [B, N, D] at [B, K] -> [B, K, D]; a table [N, D] is picked from for every row alike."""
    if tokens.ndim == 2:
        return tokens[index]
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _kept(count: int, ratio: float, grid: Grid, what: str) -> int:
    # MAE keeps int(N * (1 - ratio)); the small addend keeps 10 * (1 - 0.9) = 0.99999... from becoming 0.
    if count < 2:
        raise ValueError(f"masking needs at least 2 {what}, but the grid {tuple(grid)} has {count}")
    return min(max(int(count * (1 - ratio) + 1e-6), 1), count - 1)


def _part(count: int, length: int) -> int:
    # Something of either axis is hidden, but of one that is a single step.
    return max(1, min(count, length - 1))


def _axes(grid: Grid, name: str, axes: str, count: int) -> Grid:
    if len(grid) != count:
        raise ValueError(f"the {name} mask is for a grid {axes}, but this one is {tuple(grid)}; 'random' suits any")
    return grid


def _choose(rng: np.random.Generator, shape: tuple[int, ...], count: int) -> Lattice:
    chosen = np.zeros(prod(shape), dtype=np.bool_)
    chosen[rng.permutation(len(chosen))[:count]] = True
    return chosen.reshape(shape)


def _split(keep: Lattice, grid: Grid) -> Indices:
    lattice = np.broadcast_to(keep, grid)
    return {"keep": np.flatnonzero(lattice), "drop": np.flatnonzero(~lattice)}


def _turns(grid: Grid) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the place of every token in its cell's turn, counted on with each step of time: int64, of grid's shape."""
    if len(grid) == 1:
        return np.arange(grid[0])
    *times, row, column = np.indices(grid)
    turns: np.ndarray[Any, np.dtype[np.int64]] = sum(times, 2 * (row % 2) + column % 2)
    return turns
