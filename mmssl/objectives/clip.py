"""Contrastive learning across modalities (CLIP, Radford et al., arXiv:2103.00020): what belongs together lies together.

Every modality has a tower: an encoder, and a projection of its pooled vector into a space that all share. The first one
is the centre, and each of the others is bound to it by the pairs that there are (ImageBind, arXiv:2305.05665), so that
they are bound to each other too. With two it is CLIP, or with the other loss SigLIP (arXiv:2303.15343).

Shape legend: B samples, d the width of the joint space.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmssl.config import ObjectiveConfig
from mmssl.contracts import Batch, Draw, EncoderModule, Kept, Step
from mmssl.distributed import all_gather, all_reduce, rank, ranks
from mmssl.errors import nearest
from mmssl.losses.contrastive import PairLoss, pairwise_sigmoid, planning, symmetric_info_nce

MAX_SCALE = 100.0
"""What similarities are multiplied with at most (section 2.5)."""
Loss = Literal["softmax", "sigmoid"]
TEMPERATURES: dict[Loss, float] = {"softmax": 0.07, "sigmoid": 0.1}
"""At the beginning: CLIP's, and SigLIP's (section 3.2)."""
SIGMOID_BIAS = -10.0
"""At the beginning, where nearly all pairs are none (SigLIP, section 3.2)."""
CHUNKS_PLANNED = 2
"""The second adds to gradients that are there already, and so do all that follow."""
_STRIDE = 0x5851F42D4C957F2D
"""Keeps the towers' seeds apart: an odd number of 63 bits that no counter makes."""


class CLIPConfig(ObjectiveConfig):
    """Contrastive learning of a joint space."""

    name: Literal["clip"] = "clip"
    dim: Annotated[int, Field(gt=0)] | None = 512
    """Width of the joint space; null is that of the first tower, which then is not projected, as in LiT."""
    loss: Loss = "softmax"
    """softmax: which of all is the partner, both ways (CLIP); sigmoid: of each two by themselves, whether they are
    partners (SigLIP)."""
    temperature: Annotated[float, Field(ge=1 / MAX_SCALE, le=100)] | None = None
    """At the beginning; it is learned, and never falls below 0.01. null is 0.07, and 0.1 with the loss sigmoid."""
    locked: tuple[str, ...] = ()
    """Towers that keep the weights they start from, as that of pictures in LiT (arXiv:2111.07991)."""
    chunk: Annotated[int, Field(gt=0)] | None = None
    """Samples that are embedded at a time: memory for the activations of so many, whatever the batch, and the same
    gradient, for a third more time; null embeds all at once. Unlike train.accumulate it leaves each sample the whole
    batch to be told from."""

    @property
    def title(self) -> str:
        """What people call it."""
        return "CLIP" if self.loss == "softmax" else "SigLIP"

    @property
    def several(self) -> bool:
        """It binds modalities together."""
        return True

    def build(self, encoders: Mapping[str, EncoderModule]) -> "CLIP":
        """Make the objective around two or more encoders; ValueError for a locked tower that is none of them."""
        for name in self.locked:
            if name not in encoders:
                raise ValueError(f"objective.locked: '{name}' is not one of the towers{nearest(name, encoders)}")
        centre = next(iter(encoders.values()))
        temperature = self.temperature or TEMPERATURES[self.loss]
        return CLIP(encoders, self.dim or centre.dim, self.dim is None, self.loss, temperature, self.locked, self.chunk)


class CLIP(nn.Module):
    """Towers into one space, trained by which of the batch, on all ranks, belong together."""

    def __init__(
        self,
        encoders: Mapping[str, EncoderModule],
        dim: int,
        bare: bool = False,
        loss: Loss = "softmax",
        temperature: float = TEMPERATURES["softmax"],
        locked: Sequence[str] = (),
        chunk: int | None = None,
    ) -> None:
        """``bare``: the first tower has no projection, and ``dim`` is its width."""
        super().__init__()
        self.inputs = tuple(f"{name}.signal" for name in encoders)
        self.modalities, self.locked, self.chunk, self.loss = tuple(encoders), frozenset(locked), chunk, loss
        self._encoders = dict(encoders)
        self.towers = nn.ModuleDict({name: _module(encoder) for name, encoder in encoders.items()})
        self.projections = nn.ModuleDict(
            {
                name: nn.Identity() if bare and not i else projection(encoder.dim, dim)
                for i, (name, encoder) in enumerate(encoders.items())
            }
        )
        self.temperature = Temperature(temperature, SIGMOID_BIAS if loss == "sigmoid" else None)
        self.facts = {"dim": dim, "loss": loss}
        for name, tower in self.towers.items():
            if self._encoders[name].output == "latent":  # of no use here, and engines expect a gradient for what trains
                _module(self._encoders[name].backbone).requires_grad_(False)
            if name in self.locked:
                tower.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in self.towers.parameters()):
            raise ValueError("objective.locked names all towers, so that nothing is left to be learned")
        self.train()

    def train(self, mode: bool = True) -> "CLIP":
        """Switch between training and evaluation, in which locked towers always stay."""
        super().train(mode)
        for name in self.locked:
            self.towers[name].eval()
        return self

    def encoders(self) -> dict[str, EncoderModule]:
        """Return the towers' encoders, by modality."""
        return self._encoders

    def kept(self) -> dict[str, Kept]:
        """Return what leads from each encoder into the joint space, and the temperature."""
        return {
            name: Kept(
                "joint",
                nn.ModuleDict({"projection": self.projections[name], "temperature": self.temperature}),
                {
                    **self.facts,
                    "projected": isinstance(self.projections[name], nn.Linear),
                    "towers": [*self.modalities],
                },
            )
            for name in self.modalities
        }

    def draw(self) -> Draw | None:
        """Return None: nothing is drawn."""
        return None

    def features(self, name: str, batch: Batch) -> Tensor:
        """Return the unit vectors of a batch's samples of one modality, float32 [B, d]."""
        part = {key.removeprefix(f"{name}."): value for key, value in batch.items() if key.startswith(f"{name}.")}
        # What is dropped in one tower must not tell what is dropped in another.
        part["seed"] = batch["seed"] ^ (self.modalities.index(name) * _STRIDE % 2**63)
        count = len(part["seed"])
        if self.chunk is None or self.chunk >= count:
            return self._embed(name, part)
        rows = zip(*(value.split(self.chunk) for value in part.values()), strict=True)
        chunks = [dict(zip(part, row, strict=True)) for row in rows]
        # Whatever is drawn comes from the samples' seeds, so there is no generator state to put back.
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        planned = chunks[:CHUNKS_PLANNED] if planning() else chunks
        vectors = [again(self._embed, name, chunk) for chunk in planned]
        # Chunks give their memory to the next, so that of those that are only planned vectors alone remain.
        rest = count - sum(map(len, vectors))
        return torch.cat([*vectors, *([vectors[0].new_empty(rest, vectors[0].shape[1])] if rest else [])])

    def _embed(self, name: str, part: Batch) -> Tensor:
        encoder = self._encoders[name]
        with torch.set_grad_enabled(torch.is_grad_enabled() and name not in self.locked):
            tokenizer = encoder.tokenizer
            grid, pad = tokenizer.grid_of(part["signal"].shape[2:]), tokenizer.pad(part)
            latent = self.towers[name](tokenizer.patches(part), None, part["seed"], grid, pad)
            vector = encoder.pool(latent, pad)
        return unit(self.projections[name](vector))

    def forward(self, batch: Batch) -> Step:
        """Return the mean over the pairs of modalities of the mean loss over the pairs of samples on all ranks.

        A sample that is there more than once, on whatever ranks, counts once: it is no mismatch of itself.
        ``accuracy_A_to_B`` is how often the best of all B for an A is its own, ``trivial`` the loss of guessing, and
        ``scale_most`` what ``scale`` is kept below.
        """
        once = first(batch["index"])
        vectors = {name: self.features(name, batch) for name in self.modalities}
        centre, *others = self.modalities
        losses, guesses = [], []
        scale = self.temperature.scale().detach()
        metrics = {"scale": scale, "scale_most": torch.full_like(scale, MAX_SCALE)}
        for other in others:
            present = once
            for name in (centre, other):
                present = present & batch.get(f"{name}.present", once)
            found = self._compare(vectors[centre], vectors[other], present)
            here = present.to(found.losses.dtype)
            count = all_reduce(here.sum()).clamp(min=1)
            share = here * (ranks() / count)  # such that the mean over ranks of the sums is the mean over all pairs
            losses.append((found.losses * share).sum())
            guesses.append(guessing(count, self.loss))
            hits = (found.found * share.unsqueeze(1)).sum(0)
            metrics |= {f"accuracy_{centre}_to_{other}": hits[0], f"accuracy_{other}_to_{centre}": hits[1]}
            if len(others) > 1:
                metrics[f"loss_{centre}_{other}"] = losses[-1].detach()
        return Step(torch.stack(losses).mean(), metrics | {"trivial": torch.stack(guesses).mean()})

    def _compare(self, a: Tensor, b: Tensor, present: Tensor) -> PairLoss:
        scale, bias = self.temperature.scale(), self.temperature.bias
        if bias is None:
            return symmetric_info_nce(a, b, scale, present)
        return pairwise_sigmoid(a, b, scale, bias, present)


class Temperature(nn.Module):
    """What similarities are multiplied with, at most 100, and for the sigmoid loss what is added to them; learned."""

    def __init__(self, temperature: float, bias: float | None = None) -> None:
        super().__init__()
        # Vectors of one number: DeepSpeed cannot hand parameters without an axis from rank to rank.
        self.log_scale = nn.Parameter(torch.tensor([-math.log(temperature)]))
        self.offset = None if bias is None else nn.Parameter(torch.tensor([bias]))

    def scale(self) -> Tensor:
        """Return the factor, float32 []."""
        bounded: Tensor = _AtMost.apply(self.log_scale, math.log(MAX_SCALE))  # type: ignore[no-untyped-call]
        return bounded.exp().squeeze()

    @property
    def bias(self) -> Tensor | None:
        """What is added, float32 []; None where nothing is."""
        return None if self.offset is None else self.offset.squeeze()


class _AtMost(torch.autograd.Function):
    # A plain clamp has no gradient beyond the bound, from where the parameter would never come back; clamping the
    # parameter itself after each step is undone by engines that step on a copy of it.
    @staticmethod
    def forward(ctx: Any, x: Tensor, most: float) -> Tensor:
        ctx.save_for_backward(x >= most)
        return x.clamp(max=most)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (beyond,) = ctx.saved_tensors
        return torch.where(beyond, grad.clamp(min=0), grad), None


def projection(width: int, dim: int) -> nn.Linear:
    """Return a linear map into a joint space, initialised as CLIP's (its public code): deviation width ** -0.5."""
    linear = nn.Linear(width, dim, bias=False)
    nn.init.normal_(linear.weight, std=width**-0.5)
    return linear


def unit(vectors: Tensor) -> Tensor:
    """Return vectors [..., d] divided by their lengths, float32; those of no length stay zero."""
    return F.normalize(vectors.float(), dim=-1)


def first(index: Tensor) -> Tensor:
    """Return which of the samples with these indices, int64 [B], are there for the first time on all ranks: bool [B].

    A collective.
    """
    values, order = all_gather(index).sort(stable=True)
    again = F.pad(values[1:] == values[:-1], (1, 0))
    found = torch.empty_like(again).scatter_(0, order, ~again)
    return found[rank() * len(index) : (rank() + 1) * len(index)]


def guessing(count: Tensor, loss: Loss) -> Tensor:
    """Return the least loss of giving all of ``count`` pairs ([]) the same similarity: float32 [].

    With softmax the right one of N is as likely as any. With sigmoid each is thought right once in N times.
    """
    missed = (count - 1) * torch.log(count / (count - 1).clamp(min=1)) if loss == "sigmoid" else torch.zeros_like(count)
    return count.log() + missed


def _module(module: object) -> nn.Module:
    assert isinstance(module, nn.Module)
    return module
