"""Losses of pairs among all pairs of a batch and of all ranks, in memory linear in the batch.

[B, d] are the vectors of this rank's B pairs, [N, d] those of all ranks. The logits of a rank's rows against all
columns would be B x N numbers; they are made a tile at a time, always in the same memory, once going forward and once
more going back. What passes between the ranks, and its gradient, is ``mmssl.distributed.all_gather``'s: where engines
average the ranks' losses and gradients, both are those of one process with the whole batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mmssl.distributed import all_gather, rank
from mmssl.losses.info_nce import chosen
from mmssl.uncompiled import uncompiled

TILE = {"cpu": 512}
"""Rows and columns of a tile, by device: two of them stay in a core's share of the cache."""
TILE_ELSEWHERE = 4096
"""On accelerators, where a tile must be worth the launch of a dozen kernels."""
NOTHING = -1e30
"""The log-sum-exp of no logits: as good as -inf, but a difference of two of them is a number."""
_planning: ContextVar[bool] = ContextVar("planning", default=False)


@contextmanager
def one_tile() -> Iterator[None]:
    """Compute a single tile inside the block: to plan the memory of a batch, of which all tiles take the same."""
    token = _planning.set(True)
    try:
        yield
    finally:
        _planning.reset(token)


def planning() -> bool:
    """Whether this is inside ``one_tile``: what repeats in the same memory need not be computed more than once."""
    return _planning.get()


class PairLoss(NamedTuple):
    """What is known of each pair [a_i, b_i]."""

    losses: Tensor
    """float32 [B]; 0 where a pair is not present."""
    found: Tensor
    """bool [B, 2]: whether b_i is the best match of a_i among all ranks' b, and a_i that of b_i among all ranks' a."""


@uncompiled
def symmetric_info_nce(
    a: Tensor, b: Tensor, scale: Tensor, present: Tensor | None = None, tile: int | None = None
) -> PairLoss:
    """Return CLIP's loss of pairs (arXiv:2103.00020, figure 3): the mean of two cross-entropies, over b and over a.

    ``a``, ``b`` [B, d] are unit vectors, of as many pairs on every rank; logits are ``scale`` (a scalar) times their
    products, in fp32 at least. Pairs that are not ``present`` [B] are no candidates, and lose and learn nothing. A
    match that is a tie up to rounding is none (see ``info_nce.chosen``). A collective, and so is its backward pass.
    """
    with torch.autocast(a.device.type, enabled=False):
        logits = Logits.of(a, b, scale, None, present, tile)
        positive, rows, columns, best_rows, best_columns = _LogSumExps.apply(logits, *logits.differentiable)  # type: ignore[no-untyped-call]
        columns = all_gather(columns.unsqueeze(0)).logsumexp(0)[logits.own]
        losses = (_softplus(rows - positive) + _softplus(columns - positive)) / 2
        return logits.result(losses, positive, best_rows, best_columns)


@uncompiled
def pairwise_sigmoid(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, present: Tensor | None = None, tile: int | None = None
) -> PairLoss:
    """Return SigLIP's loss of pairs (arXiv:2303.15343, equation 1): each a_i with each b_j is a match or is none.

    losses_i = sum_j softplus(-z_ij (scale a_i . b_j + bias)), where z_ij is 1 for i = j and else -1; ``bias`` is a
    scalar. All else is as in ``symmetric_info_nce``.
    """
    with torch.autocast(a.device.type, enabled=False):
        logits = Logits.of(a, b, scale, bias, present, tile)
        positive, rows, best_rows, best_columns = _SumsOfSoftplus.apply(logits, *logits.differentiable)  # type: ignore[no-untyped-call]
        return logits.result(rows + _softplus(-positive), positive, best_rows, best_columns)


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=40)  # beyond it is x in any precision


class Logits(NamedTuple):
    """The logits of this rank's rows against all ranks' columns, which are never there at once."""

    a: Tensor
    """[B, d]; rows that are not present are 0."""
    b: Tensor
    """[N, d] of all ranks."""
    scale: Tensor
    bias: Tensor
    present: Tensor
    """bool [B]."""
    gone_rows: Tensor | None
    """[B]: 0, or -inf where a pair is not present; None where all are."""
    gone_columns: Tensor
    """[N]: the same of all ranks."""
    own: slice
    """Where this rank's pairs are among the columns."""
    tile: int

    @classmethod
    def of(
        cls, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None, present: Tensor | None, tile: int | None
    ) -> Self:
        """Gather what the columns need; a collective."""
        exact = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        a, b, gone = a.to(exact), b.to(exact), torch.zeros(len(a), dtype=exact, device=a.device)
        if present is not None:
            gone.masked_fill_(~present, -torch.inf)
            # Whatever is there instead of an absent vector, NaN included, must not be multiplied with.
            a, b = (x.masked_fill(~present.unsqueeze(1), 0) for x in (a, b))
        return cls(
            a=a,
            b=all_gather(b),
            scale=scale.to(exact),
            bias=torch.zeros_like(scale, dtype=exact) if bias is None else bias.to(exact),
            present=torch.ones(len(a), dtype=torch.bool, device=a.device) if present is None else present,
            gone_rows=None if present is None else gone,
            gone_columns=all_gather(gone),
            own=slice(rank() * len(a), (rank() + 1) * len(a)),
            tile=tile or TILE.get(a.device.type, TILE_ELSEWHERE),
        )

    @property
    def differentiable(self) -> tuple[Tensor, ...]:
        """What has gradients."""
        return self.a, self.b, self.scale, self.bias

    def result(self, losses: Tensor, positive: Tensor, best_rows: Tensor, best_columns: Tensor) -> PairLoss:
        """Mask the losses [B] and say which matches were found; a collective."""
        best_columns = all_gather(best_columns.unsqueeze(0)).amax(0)[self.own]
        found = [chosen(positive.detach(), best.unsqueeze(1)) for best in (best_rows, best_columns)]
        present = self.present
        return PairLoss(losses.where(present, 0), torch.stack(found, 1) & present.unsqueeze(1))

    def positives(self) -> Tensor:
        """Return the logits [B] of the pairs themselves."""
        products: Tensor = torch.linalg.vecdot(self.a, self.b[self.own])
        return products.mul_(self.scale).add_(self.bias)

    def buffer(self) -> Tensor:
        """Return memory for one tile."""
        return self.a.new_empty(min(self.tile, len(self.a)) * min(self.tile, len(self.b)))

    def tiles(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Yield (rows, columns, scale * a[rows], logits of rows and columns), the last two until the next is asked for.

        The pairs themselves are -inf, as are those that are not present: logits are of mismatches.
        """
        memory, offsets = self.buffer(), self.gone_columns + self.bias
        scaled = self.a.new_empty(min(self.tile, len(self.a)), self.a.shape[1])
        for rows in _pieces(len(self.a), self.tile):
            a = torch.mul(self.a[rows], self.scale, out=scaled[: rows.stop - rows.start])
            for columns in _pieces(len(self.b), self.tile):
                logits = _shaped(memory, len(a), columns.stop - columns.start)
                torch.addmm(offsets[columns], a, self.b[columns].T, out=logits)
                logits.diagonal(self.own.start + rows.start - columns.start).fill_(-torch.inf)
                if self.gone_rows is not None:
                    logits.add_(self.gone_rows[rows].unsqueeze(1))
                yield rows, columns, a, logits
                if planning():
                    return

    def gradients(self, positives: Tensor, slopes: Callable[[slice, slice, Tensor], Tensor]) -> tuple[Tensor, ...]:
        """Return the gradients of a, b, scale and bias.

        ``positives`` [B] are the derivatives by the logits of pairs; ``slopes(rows, columns, logits)`` turns a tile
        into those by the logits of mismatches, in memory of its own choice.
        """
        grad_a = self.b[self.own] * positives.unsqueeze(1)  # by scale * a, until the end
        grad_b = torch.zeros_like(self.b)
        torch.mul(self.a, (self.scale * positives).unsqueeze(1), out=grad_b[self.own])
        grad_bias = positives.sum()
        for rows, columns, a, logits in self.tiles():
            slope = slopes(rows, columns, logits)
            grad_a[rows].addmm_(slope, self.b[columns])
            grad_b[columns].addmm_(slope.T, a)
            grad_bias += slope.sum()
        with torch.autocast(self.a.device.type, enabled=False):  # backward passes may be inside, too
            grad_scale = torch.linalg.vecdot(self.a, grad_a).sum()
        return grad_a.mul_(self.scale), grad_b, grad_scale, grad_bias


class _LogSumExps(torch.autograd.Function):
    # Positives [B]; of the mismatches, log-sum-exps of the rows [B] and, over these rows, of the columns [N], and the
    # highest of each. The differences to the positives, which the losses are made of, stay exact where they are great.
    @staticmethod
    def forward(ctx: Any, logits: Logits, *differentiable: Tensor) -> tuple[Tensor, ...]:
        ctx.logits = logits
        sides = [_Online(logits.gone_columns.new_empty(n)) for n in (len(logits.a), len(logits.b))]
        spare = logits.buffer()
        for rows, columns, _, tile in logits.tiles():
            sides[0].include(rows, tile, 1, _shaped(spare, *tile.shape))
            sides[1].include(columns, tile, 0, tile)
        row_sums, column_sums = (side.logsumexp() for side in sides)
        ctx.save_for_backward(row_sums, column_sums, *differentiable)
        bests = [side.best for side in sides]
        ctx.mark_non_differentiable(*bests)
        return logits.positives(), row_sums, column_sums, *bests

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, positive: Tensor, rows: Tensor, columns: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        row_sums, column_sums, *_ = ctx.saved_tensors
        spare = ctx.logits.buffer()

        def slopes(r: slice, c: slice, tile: Tensor) -> Tensor:
            slope = torch.sub(tile, row_sums[r].unsqueeze(1), out=_shaped(spare, *tile.shape)).exp_()
            slope.mul_(rows[r].unsqueeze(1))
            return slope.addcmul_(tile.sub_(column_sums[c]).exp_(), columns[c])

        return None, *ctx.logits.gradients(positive, slopes)


class _Online:
    # Log-sum-exps of logits that come tile by tile (Milakov and Gimelshein, arXiv:1805.02867).
    def __init__(self, best: Tensor) -> None:
        self.best, self.sum = best.fill_(NOTHING), torch.zeros_like(best)

    def include(self, where: slice, logits: Tensor, dim: int, out: Tensor) -> None:
        best, total = self.best[where], self.sum[where]
        higher = torch.maximum(best, logits.amax(dim))
        terms = torch.sub(logits, higher.unsqueeze(dim), out=out).exp_()
        total.mul_((best - higher).exp_()).add_(terms.sum(dim))
        best.copy_(higher)

    def logsumexp(self) -> Tensor:
        return (self.best + self.sum.log()).clamp(min=NOTHING)


class _SumsOfSoftplus(torch.autograd.Function):
    # Positives [B]; of the mismatches, sums of softplus over the rows [B], and the highest of the rows and columns.
    @staticmethod
    def forward(ctx: Any, logits: Logits, *differentiable: Tensor) -> tuple[Tensor, ...]:
        ctx.logits = logits
        sums = torch.zeros_like(logits.gone_columns[logits.own])
        best_rows, best_columns = torch.full_like(sums, NOTHING), torch.full_like(logits.gone_columns, NOTHING)
        zero, spare = sums.new_zeros(()), logits.buffer()
        for rows, columns, _, tile in logits.tiles():
            for best, dim in ((best_rows[rows], 1), (best_columns[columns], 0)):
                torch.maximum(best, tile.amax(dim), out=best)
            sums[rows] += torch.logaddexp(tile, zero, out=_shaped(spare, *tile.shape)).sum(1)
        ctx.mark_non_differentiable(best_rows, best_columns)
        return logits.positives(), sums, best_rows, best_columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, positive: Tensor, rows: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        def slopes(r: slice, _: slice, tile: Tensor) -> Tensor:
            return tile.sigmoid_().mul_(rows[r].unsqueeze(1))

        return None, *ctx.logits.gradients(positive, slopes)


def _pieces(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _shaped(memory: Tensor, rows: int, columns: int) -> Tensor:
    return memory[: rows * columns].view(rows, columns)
