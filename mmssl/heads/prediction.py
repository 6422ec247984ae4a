"""Predicting what comes next by telling it from what does not (CPC, van den Oord et al., arXiv:1807.03748, section 2).

It attaches to any two sequences of vectors: what is seen at a moment, and what a causal model made of all it had seen.

Shape legend: B samples, L lines per sample (columns of a picture; else 1), T moments, Dz and Dc widths of what is seen
and of contexts, K steps ahead, M candidates.
"""

from collections.abc import Sequence
from math import gcd
from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmssl.backbones.blocks import uniform
from mmssl.backbones.causal import CausalTransformer
from mmssl.config import Piece
from mmssl.contracts import Step
from mmssl.distributed import all_gather, all_reduce, rank, ranks
from mmssl.losses.info_nce import chosen, info_nce
from mmssl.masking import gather

Source = Literal["mixed", "speaker", "sequence"]


class NegativesConfig(Piece):
    """Where the candidates come from among which the true one is to be found (the paper's table 2, right)."""

    source: Source = "mixed"
    """mixed: all sequences of the batch, over all ranks. speaker: the same, of batches in which all samples agree in
    ``column``. sequence: the one that is predicted in."""
    count: Annotated[int, Field(gt=0)] | None = 128
    """How many are drawn for each sequence, none of them twice; null takes all there are. N is one more."""
    current: bool = True
    """mixed and speaker: whether the sequence that is predicted in may be among them (the paper's "excl." is false);
    false also leaves out the batch's other looks at the same file (``data.repeats``)."""
    column: str = "speaker"
    """speaker: which column of the manifest tells."""

    @model_validator(mode="after")
    def _something_left(self) -> Self:
        if self.source == "sequence" and not self.current:
            raise ValueError("source 'sequence' takes the current sequence alone, so current must be true")
        return self


class ContrastivePrediction(nn.Module):
    """One prediction per step ahead, each scored against candidates by InfoNCE.

    ``skip`` steps are left out before the first that is predicted; the predictor is one matrix W_k per step, or a
    causal Transformer layer per step that looks over the contexts (Riviere et al., arXiv:2002.02848, section 3).
    """

    def __init__(
        self,
        latent_dim: int,
        context_dim: int,
        steps: int = 12,
        skip: int = 0,
        predictor: Literal["linear", "transformer"] = "linear",
        negatives: NegativesConfig | None = None,
    ) -> None:
        super().__init__()
        self.latent_dim, self.context_dim = latent_dim, context_dim
        self.steps, self.skip, self.negatives = steps, skip, negatives or NegativesConfig()
        self.predictor: nn.Module
        if predictor == "linear":
            self.predictor = LinearSteps(latent_dim, context_dim, steps)
        else:
            self.predictor = TransformerSteps(latent_dim, context_dim, steps)

    def forward(
        self,
        z: Tensor,
        c: Tensor,
        seeds: Tensor | None = None,
        present: Tensor | None = None,
        files: Tensor | None = None,
    ) -> Step:
        """Return the loss for z [B, T, Dz] and contexts c [B, T, Dc], or with lines [B, L, T, ...]; and how good it is.

        ``seeds`` int64 [B] draw the candidates, the same ones every time where there are none; ``present`` bool [B, T]
        or [B, L, T] tells what is no padding; ``files`` int64 [B] are equal for looks at one file, none where left out.
        Of every step k ahead, counted from 1, there is ``accuracy_k`` and ``bound_k``, in nats (log N - loss);
        ``bound`` is their mean, and ``log_n`` what it can be at most; ``trivial`` is the loss of guessing. A sample's
        loss is the mean over its steps of the means over moments; samples without anything to score have no part in the
        mean over samples. Raises ValueError for a sequence too short, and for z and c that do not go together.
        """
        self._check(z, c)
        if z.ndim == 3:
            z, c = z.unsqueeze(1), c.unsqueeze(1)
            present = None if present is None else present.unsqueeze(1)
        if z.shape[2] <= self.skip + self.steps:
            raise ValueError(f"{z.shape[2]} moments are too few to predict {self.skip + self.steps} ahead of the first")
        present = torch.ones(z.shape[:3], dtype=torch.bool, device=z.device) if present is None else present
        seeds = torch.zeros(len(z), dtype=torch.int64, device=z.device) if seeds is None else seeds
        with torch.autocast(z.device.type, enabled=False):
            z, rows = z.float(), []
            candidates = draw_candidates(z, present, seeds, self.negatives, files)
            for k, prediction in enumerate(self.predictor(c.float()), self.skip + 1):
                rows.append(score(prediction[:, :, :-k], z[:, :, k:], k, present, candidates))
            losses, hits, counted = (torch.stack(column, 1) for column in zip(*rows, strict=True))
        return self._step(losses, hits, counted, (candidates.most + 1.0).log())

    def _check(self, z: Tensor, c: Tensor) -> None:
        if z.ndim not in (3, 4) or z.shape[:-1] != c.shape[:-1]:
            raise ValueError(
                f"z {list(z.shape)} and c {list(c.shape)} do not go together: both need axes [B, T, width] or "
                "[B, L, T, width], equal but for the width"
            )
        if (z.shape[-1], c.shape[-1]) != (self.latent_dim, self.context_dim):
            raise ValueError(
                f"z and c have widths {z.shape[-1]} and {c.shape[-1]}, but the head was made for {self.latent_dim} and "
                f"{self.context_dim}"
            )

    def _step(self, losses: Tensor, hits: Tensor, counted: Tensor, log_n: Tensor) -> Step:
        # All [B, K] but log_n [B]. Padding and a want of candidates may leave a sample without a step.
        loss = (losses * counted).sum(1) / counted.sum(1).clamp(min=1)
        # Of every step, and at last of any, how many samples there are on a rank, on average.
        counts = torch.cat([counted, counted.any(1, keepdim=True)], 1).sum(0).float()
        samples = (all_reduce(counts) / ranks()).clamp(min=1 / ranks())
        share = counted.float() / samples[:-1]
        bounds, accuracies = ((log_n.unsqueeze(1) - losses) * share).sum(0).detach(), (hits * share).sum(0)
        most = (log_n.unsqueeze(1) * share).sum(0)  # samples of unequal length may have unequally many candidates
        steps = range(self.skip + 1, self.skip + self.steps + 1)
        metrics = {f"accuracy_{k}": value for k, value in zip(steps, accuracies, strict=True)}
        metrics |= {f"bound_{k}": value for k, value in zip(steps, bounds, strict=True)}
        trivial = (log_n * counted.any(1)).sum() / samples[-1]
        metrics |= {"bound": bounds.mean(), "log_n": most.mean(), "trivial": trivial}
        return Step(loss.sum() / samples[-1], metrics)


class LinearSteps(nn.Module):
    """A matrix W_k for each step (the paper's eq. 3), as one product.

    It starts at zero, so that the loss starts at log N and vectors learn nothing before their matrix knows which way.
    From random scores, what lowers the loss first is that all vectors become alike, and from that it is slow to return.
    """

    def __init__(self, latent_dim: int, context_dim: int, steps: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.project = nn.Linear(context_dim, steps * latent_dim, bias=False)
        nn.init.zeros_(self.project.weight)

    def forward(self, c: Tensor) -> Sequence[Tensor]:
        """Map contexts [B, L, T, Dc] to a prediction [B, L, T, Dz] per step."""
        return self.project(c).split(self.latent_dim, -1)  # type: ignore[no-any-return]


class TransformerSteps(nn.Module):
    """A causal Transformer layer for each step, over the contexts of a line so far."""

    def __init__(self, latent_dim: int, context_dim: int, steps: int) -> None:
        super().__init__()
        if context_dim % 2:
            raise ValueError(f"predictor 'transformer' needs contexts of an even width, but theirs is {context_dim}")
        num_heads = gcd(context_dim // 2, 8)
        self.layers = nn.ModuleList(CausalTransformer(context_dim, context_dim, 1, num_heads) for _ in range(steps))
        self.project = nn.ModuleList(nn.Linear(context_dim, latent_dim, bias=False) for _ in range(steps))
        for weight in self.project.parameters():
            nn.init.zeros_(weight)  # as in LinearSteps

    def forward(self, c: Tensor) -> Sequence[Tensor]:
        """Map contexts [B, L, T, Dc] to a prediction [B, L, T, Dz] per step."""
        pairs = zip(self.layers, self.project, strict=True)
        return [project(layer(c.flatten(0, 1))).unflatten(0, c.shape[:2]) for layer, project in pairs]


class Candidates(NamedTuple):
    """What may be confused with the truth, for each of a rank's samples."""

    vectors: Tensor
    """[B, M, Dz], or [M, Dz] where all samples have the same."""
    places: Tensor
    """Which moment of the whole batch each is, int64 [B, M]."""
    present: Tensor
    """Whether it may be taken, bool [B, M]."""
    spare: int | None
    """The column that only those take who find their own positive among the others; None if there is no such."""
    most: Tensor
    """How many each moment of a sample takes, int64 [B]."""
    own: Tensor
    """Where the moments of each sample begin in the whole batch, int64 [B]."""


def draw_candidates(
    z: Tensor, present: Tensor, seeds: Tensor, settings: NegativesConfig, files: Tensor | None = None
) -> Candidates:
    """Draw from z [B, L, T, Dz] of all ranks, where ``present`` [B, L, T], with a seed per sample, int64 [B].

    Each sample draws the same on any number of ranks. One more is drawn than is asked for, so that without its own
    positive every moment has exactly as many, and each set of that size is equally likely. Where the current sequence
    is not to be taken, neither are those of the same number in ``files`` [B].
    """
    moments, first = z[0, ..., 0].numel(), rank() * len(z)
    own = (first + torch.arange(len(z), device=z.device)) * moments
    if settings.source == "sequence":
        vectors, open_ = z.flatten(1, 2), present.flatten(1)
        places = own.unsqueeze(1) + torch.arange(moments, device=z.device)
    else:
        vectors = all_gather(z).flatten(0, 2)
        places = torch.arange(len(vectors), device=z.device).expand(len(z), -1)
        open_ = all_gather(present.to(torch.uint8)).flatten().bool().expand(len(z), -1)
        if not settings.current:
            files = own if files is None else files
            open_ = open_ & (all_gather(files).repeat_interleave(moments) != files.unsqueeze(1))
    among = int(settings.current)
    most = (open_.sum(1) - among).clamp(min=0)
    if settings.count is None or settings.count + 1 >= places.shape[1]:
        return Candidates(vectors, places, open_, None, most, own)
    lot = uniform(seeds.unsqueeze(1), places).masked_fill(~open_, 2.0)
    drawn = lot.topk(settings.count + 1, largest=False).indices
    chosen_places, still = places.gather(1, drawn), open_.gather(1, drawn)
    return Candidates(gather(vectors, drawn), chosen_places, still, settings.count, most.clamp(max=settings.count), own)


def score(prediction: Tensor, z: Tensor, k: int, present: Tensor, candidates: Candidates) -> tuple[Tensor, ...]:
    """Score predictions of the moments k ahead, [B, L, T - k, Dz], against those, z [B, L, T - k, Dz], and candidates.

    Returns for each sample the mean loss, the share of hits, and whether there was anything to score: all [B].
    """
    length = present.shape[2]
    lines = torch.arange(present.shape[1], device=z.device).unsqueeze(1) * length
    inside = (lines + torch.arange(k, length, device=z.device)).flatten()
    place = candidates.own.unsqueeze(1) + inside  # [B, Q]
    prediction, z = prediction.flatten(1, 2), z.flatten(1, 2)
    positive = (prediction * z).sum(-1)
    negatives = prediction @ candidates.vectors.transpose(-1, -2)  # [B, Q, M]
    same = candidates.places.unsqueeze(1) == place.unsqueeze(2)
    taken = candidates.present.unsqueeze(1) & ~same
    if candidates.spare is not None:
        taken[:, :, candidates.spare] &= same.any(2)
    # Padding comes last: where what is predicted is real, so is what it is predicted from.
    scored = present[:, :, k:].flatten(1) & (candidates.most > 0).unsqueeze(1)
    losses, hits = info_nce(positive, negatives, taken), chosen(positive.detach(), negatives.detach(), taken)
    total = scored.sum(1)
    share = scored / total.clamp(min=1).unsqueeze(1)
    return (losses * share).sum(1), (hits * share).sum(1), total > 0
