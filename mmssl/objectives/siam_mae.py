"""Siamese masked autoencoding (Gupta et al., arXiv:2305.14344): predict a masked look at a scene from a past one.

The past look is seen whole, or at least more of it; of the later one next to nothing. What fills it in is knowing where
things went, so that the encoder's tokens learn to correspond. Which looks make a pair (two frames of a video, two crops
of a picture) is the modality's to say.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mmssl.config import ObjectiveConfig
from mmssl.contracts import Batch, EncoderModule, Grid, Reconstruction
from mmssl.heads.pair_decoder import PairDecoderConfig
from mmssl.masking import MASKS, Indices, Mask, MaskKind
from mmssl.objectives.mae import MAE, check_maskable


class SiamMAEConfig(ObjectiveConfig):
    """Siamese masked autoencoding: what is hidden of either look, and who predicts it."""

    name: Literal["siam_mae"] = "siam_mae"
    mask: MaskKind = "random"
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Fraction of the later look's tokens that the encoder never sees (0.95 in the paper)."""
    past_mask_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The same of the past look, of which nothing is predicted. 0 is the paper's asymmetric masking, as much as
    ``mask_ratio`` the symmetric one of its ablation."""
    decoder: PairDecoderConfig = PairDecoderConfig()

    @property
    def title(self) -> str:
        """What people call it."""
        return "SiamMAE"

    def build(self, encoders: Mapping[str, EncoderModule]) -> "SiamMAE":
        """Make the objective around its one encoder; ValueError for a mask that does not suit the encoder's grid."""
        (encoder,) = encoders.values()
        check_maskable(encoder)
        tokenizer = encoder.tokenizer
        decoder = self.decoder.build(encoder.dim, tokenizer.patch_dim, tokenizer.grid, tokenizer.extend)
        mask, past = MASKS[self.mask](self.mask_ratio), self.past_mask_ratio
        return SiamMAE(encoder, decoder, PairMask(mask, MASKS[self.mask](past)) if past else mask)


class PairMask:
    """A mask for each of two looks, drawn one after the other; that of the past one is ``past_keep``."""

    def __init__(self, mask: Mask, past: Mask) -> None:
        self.mask, self.past = mask, past

    def kept(self, grid: Grid) -> int:
        """Return how many tokens of the later look stay visible; ValueError for a grid that a mask does not suit."""
        self.past.kept(grid)
        return self.mask.kept(grid)

    def __call__(self, rng: np.random.Generator, grid: Grid) -> Indices:
        """Draw the masks of one pair on the token grid of its looks."""
        drawn = self.mask(rng, grid)
        return drawn | {"past_keep": self.past(rng, grid)["keep"]}


class SiamMAE(MAE):
    """A MAE whose one encoder also sees a past look, to which its decoder attends."""

    inputs = ("signal", "past")

    def _predict(self, patches: Tensor, pad: Tensor | None, batch: Batch) -> Tensor:
        tokenizer, keep, seeds = self.encoder.tokenizer, batch["keep"], batch.get("seed")
        grid, past_keep = tokenizer.grid_of(batch["signal"].shape[2:]), batch.get("past_keep")
        latent = self.encoder(patches, keep, seeds, grid, pad)
        past = self.encoder(tokenizer.patches(_past(batch)), past_keep, seeds, grid, tokenizer.pad(_past(batch)))
        return self.decoder(latent, keep, batch["drop"], past, past_keep, grid)  # type: ignore[no-any-return]

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Reconstruction:
        """Return what ``MAE.reconstruct`` does, and what was seen of the past look."""
        tokenizer, past_keep = self.encoder.tokenizer, batch.get("past_keep")
        past = tokenizer.patches(_past(batch))
        if past_keep is not None:
            index = past_keep.unsqueeze(-1).expand(-1, -1, past.shape[-1])
            past = torch.zeros_like(past).scatter(1, index, past.gather(1, index))
        seen = tokenizer.unpatch(past, tokenizer.grid_of(batch["past"].shape[2:]))
        return super().reconstruct(batch)._replace(past=seen)


def _past(batch: Batch) -> Batch:
    return {**batch, "signal": batch["past"]}
