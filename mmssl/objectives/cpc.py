"""Contrastive predictive coding (van den Oord et al., arXiv:1807.03748): tell what comes next from what does not.

An encoder's tokenizer embeds what there is at each moment (z), its backbone makes a context of all up to it (c), and
from the context the z of later moments are to be picked out among others. Sequences go along time, or for pictures down
their rows, and in more directions with contexts of their own (v2, Henaff et al., arXiv:1905.09272).

Shape legend: B samples, N tokens on a grid of T steps and L lines along a direction, Dz and Dc widths of z and c.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from mmssl.backbones.pixelcnn import PixelCNN
from mmssl.config import ObjectiveConfig
from mmssl.contracts import Batch, Draw, EncoderModule, Grid, Step, Streams
from mmssl.heads.prediction import ContrastivePrediction, NegativesConfig
from mmssl.masking import gather

Direction = Literal["forward", "backward", "right", "left"]
SATURATED = 0.95
"""Share of log N from which on the bound says little: it could not be much higher if there were more to know."""


class CPCConfig(ObjectiveConfig):
    """Contrastive predictive coding: how far ahead, and among what."""

    name: Literal["cpc"] = "cpc"
    steps: Annotated[int, Field(gt=0)] = 12
    """How many steps ahead are predicted, each by its own predictor (12 for sound in the paper, 5 for pictures)."""
    skip: Annotated[int, Field(ge=0)] = 0
    """Nearest steps that are left out, for patches that overlap share what they see."""
    predictor: Literal["linear", "transformer"] = "linear"
    """A matrix for each step, or a causal Transformer layer over the contexts."""
    negatives: NegativesConfig = NegativesConfig()
    directions: tuple[Direction, ...] = ("forward",)
    """forward: on in time, or down the rows of a picture; backward: the other way; right and left: over its columns.
    Every direction but the first has a context network of its own that is not kept."""

    @field_validator("directions")
    @classmethod
    def _different(cls, value: tuple[Direction, ...]) -> tuple[Direction, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError(f"needs at least one direction and none twice, but got {list(value)}")
        return value

    @property
    def together(self) -> str | None:
        """The column in which the samples of a batch agree: that of the speaker, where negatives are of one speaker."""
        return self.negatives.column if self.negatives.source == "speaker" else None

    def build(self, encoders: Mapping[str, EncoderModule]) -> "CPC":
        """Make the objective around its one encoder; ValueError for one whose tokens make no sequence."""
        (encoder,) = encoders.values()
        heads = [
            ContrastivePrediction(
                encoder.tokenizer.dim, encoder.backbone.dim, self.steps, self.skip, self.predictor, self.negatives
            )
            for _ in self.directions
        ]
        return CPC(encoder, heads, self.directions)


class CPC(nn.Module):
    """An encoder whose contexts predict its own later tokens; the mean over the directions."""

    inputs: tuple[str, ...] = ("signal",)

    def __init__(
        self, encoder: EncoderModule, heads: list[ContrastivePrediction], directions: tuple[Direction, ...]
    ) -> None:
        super().__init__()
        self.encoder, self.heads, self.directions = encoder, nn.ModuleList(heads), directions
        # The encoder's own backbone is the context of the first direction.
        self.contexts = nn.ModuleList(_module(encoder.new_backbone()) for _ in directions[1:])
        self._check()

    def _check(self) -> None:
        tokenizer = self.encoder.tokenizer
        if tokenizer.placed:
            raise ValueError(
                "objective.name 'cpc' predicts what comes next, which positions in the tokens would give away: take a "
                "model.tokenizer.name without them, such as 'wave' for sounds or 'crops' for pictures"
            )
        context = self.encoder.backbone
        if not isinstance(context, Streams | PixelCNN):
            raise ValueError(
                "objective.name 'cpc' predicts what its backbone has not seen, but this one looks at all tokens: set "
                "model.backbone.name to gru, lstm or causal, or for pictures to pixelcnn"
            )
        if isinstance(context, PixelCNN) and len(tokenizer.grid) == 1:
            raise ValueError(
                "model.backbone.name 'pixelcnn' needs rows and columns, but tokens are a sequence: take gru, lstm or "
                "causal"
            )
        for direction in self.directions:
            steps, head = _shape(tokenizer.grid, direction)[0], self.heads[0]
            assert isinstance(head, ContrastivePrediction)
            reach, edge = head.skip + head.steps, tokenizer.edge
            if steps <= reach:
                raise ValueError(
                    f"objective.steps {head.steps} and skip {head.skip} reach {reach} ahead, but the "
                    f"token grid {list(tokenizer.grid)} has {steps} in direction '{direction}'"
                )
            # Turned round, the tokens that see the edge are the last ones.
            if steps <= (reach + edge if direction == "backward" else max(reach, edge)):
                raise ValueError(
                    f"nothing can be predicted {reach} ahead (objective.steps and skip) in direction '{direction}': of "
                    f"the {steps} tokens the first {edge} see zeros before the signal and are not predicted; raise "
                    "signal.seconds, or for texts signal.bytes"
                )

    def encoders(self) -> dict[str, EncoderModule]:
        """Return the encoder, by its modality."""
        return {self.encoder.modality: self.encoder}

    def draw(self) -> Draw | None:
        """Return None: negatives are drawn from the samples' seeds, once it is known what there is."""
        return None

    def forward(self, batch: Batch) -> Step:
        """Return the loss on ``signal`` [B, C, *size], and per step ahead the accuracy and the bound, as the head's."""
        tokenizer, seeds = self.encoder.tokenizer, batch.get("seed")
        grid, pad = tokenizer.grid_of(batch["signal"].shape[2:]), tokenizer.pad(batch)
        z = tokenizer.embed(tokenizer.patches(batch), None, grid)
        contexts, present = [self.encoder.backbone, *self.contexts], self._present(z, pad)
        steps = []
        for direction, context, head in zip(self.directions, contexts, self.heads, strict=True):
            turned, shape = turn(z, grid, direction, pad), _shape(grid, direction)
            c = context(turned, pad, seeds, shape)
            there = lines(turn(present.unsqueeze(-1), grid, direction, pad), shape).squeeze(-1)
            steps.append(head(lines(turned, shape), lines(c, shape), seeds, there, batch.get("index")))
        loss = sum(step.loss for step in steps) / len(steps)
        names = steps[0].metrics
        return Step(loss, {name: sum(step.metrics[name] for step in steps) / len(steps) for name in names})

    def _present(self, z: Tensor, pad: Tensor | None) -> Tensor:
        # What may be predicted, and be confused with it: bool [B, N]. Not padding; nor tokens that see the zeros before
        # a signal, which are never the truth far from it, so that telling them apart would be all that is learned.
        present = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device) if pad is None else ~pad
        late = torch.arange(z.shape[1], device=z.device) >= self.encoder.tokenizer.edge
        return present & late

    def warning(self, line: Mapping[str, float]) -> str | None:
        """Return a sentence where the bound has come close to the most that it can be."""
        bound, most = line["bound"], line["log_n"]
        if most == 0:
            return (
                "there is nothing from which to tell the true moments, so nothing is learned: raise the batch, or set "
                "objective.negatives.current=true"
            )
        if bound < SATURATED * most:
            return None
        return (
            f"the bound of mutual information, {bound:.2f} nats, is close to log N = {most:.2f}, the most it can be: "
            "the task has become easy; raise objective.negatives.count, objective.steps, objective.skip or the batch"
        )


def turn(tokens: Tensor, grid: Grid, direction: Direction, pad: Tensor | None = None) -> Tensor:
    """Return tokens [B, N, D] of a grid in the row-major order in which ``direction`` leads down the rows.

    Of a sequence, padding [B, N] stays where it is, behind the others. Raises ValueError for padding in rows.
    """
    if pad is not None and direction != "forward":
        if len(grid) > 1:
            raise ValueError(f"objective.directions '{direction}' is for signals of one size, without padding")
        place = torch.arange(grid[0], device=pad.device)
        return gather(tokens, torch.where(pad, place, (~pad).sum(1, keepdim=True) - 1 - place))
    x: Tensor = tokens.unflatten(1, (grid[0], -1))
    if direction in ("right", "left"):
        x = x.transpose(1, 2)
    return (x.flip(1) if direction in ("backward", "left") else x).flatten(1, 2)


def lines(tokens: Tensor, shape: Grid) -> Tensor:
    """Return tokens [B, N, D] of T rows and L columns as lines: [B, L, T, D]."""
    rows: Tensor = tokens.unflatten(1, (shape[0], -1))
    return rows.transpose(1, 2)


def _shape(grid: Grid, direction: Direction) -> Grid:
    if len(grid) > 2:
        raise ValueError(f"objective.name 'cpc' takes sequences and pictures, but the token grid is {list(grid)}")
    if len(grid) == 1 and direction in ("right", "left"):
        raise ValueError(f"objective.directions '{direction}' needs rows and columns, but tokens are a sequence")
    return grid[::-1] if direction in ("right", "left") else grid


def _module(backbone: object) -> nn.Module:
    assert isinstance(backbone, nn.Module)
    return backbone
