"""Masked autoencoding (He et al., arXiv:2111.06377): predict the masked patches from the visible ones.

Which patches exist, how they are normalised and what a grid is belong to the tokenizer; this file serves every
modality.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmssl.config import ObjectiveConfig
from mmssl.contracts import Batch, Draw, EncoderModule, Step
from mmssl.heads.decoder import DecoderConfig, MaskedDecoder
from mmssl.losses.reconstruction import patch_mse
from mmssl.masking import MASKS, MaskKind, gather, kept_tokens


class MAEConfig(ObjectiveConfig):
    """Masked autoencoding: what is hidden, and who predicts it."""

    name: Literal["mae"] = "mae"
    mask: MaskKind = "random"
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Fraction of the tokens that the encoder never sees (0.75 in the paper)."""
    decoder: DecoderConfig = DecoderConfig()

    def build(self, encoders: Mapping[str, EncoderModule]) -> "MAE":
        """Make the objective around its one encoder."""
        (encoder,) = encoders.values()
        tokenizer = encoder.tokenizer
        decoder = MaskedDecoder(encoder.dim, tokenizer.patch_dim, tokenizer.grid, **self.decoder.model_dump())
        return MAE(encoder, decoder, self.mask_ratio, self.mask)


class MAE(nn.Module):
    """An encoder that sees the kept patches only, and a decoder that predicts only the dropped ones."""

    def __init__(
        self, encoder: EncoderModule, decoder: MaskedDecoder, mask_ratio: float = 0.75, mask: MaskKind = "random"
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        kept_tokens(encoder.tokenizer.grid, mask_ratio)  # a grid that cannot be masked is told now, not in a worker
        self._draw = MASKS[mask](mask_ratio)

    def encoders(self) -> dict[str, EncoderModule]:
        """Return the encoder, by its modality."""
        return {self.encoder.modality: self.encoder}

    def draw(self) -> Draw:
        """Return the mask that the data workers draw for each sample."""
        return self._draw

    def forward(self, batch: Batch) -> Step:
        """Return the mean squared error over the masked patches of ``signal`` [B, C, *size]."""
        tokenizer = self.encoder.tokenizer
        patches = tokenizer.patches(batch["signal"])
        prediction = self._predict(patches, batch)
        target = tokenizer.target(gather(patches, batch["drop"]))
        return Step(patch_mse(prediction, target).mean(), {})

    def _predict(self, patches: Tensor, batch: Batch) -> Tensor:
        grid = self.encoder.tokenizer.grid_of(batch["signal"].shape[2:])
        latent = self.encoder(patches, batch["keep"], batch.get("seed"), grid)
        return self.decoder(latent, batch["keep"], batch["drop"], grid)  # type: ignore[no-any-return]

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (signal with the masked patches predicted, 0/1 mask of what was hidden), both [B, C, *size].

        Predictions are put back to the signal's scale with the mean and deviation of the true patches, which a person
        looking at the picture must be told.
        """
        tokenizer = self.encoder.tokenizer
        patches, drop = tokenizer.patches(batch["signal"]), batch["drop"]
        grid = tokenizer.grid_of(batch["signal"].shape[2:])
        prediction = tokenizer.untarget(self._predict(patches, batch).float(), gather(patches, drop))
        index = drop.unsqueeze(-1).expand(-1, -1, patches.shape[-1])
        filled = patches.scatter(1, index, prediction)
        hidden = torch.zeros_like(patches).scatter(1, index, 1.0)
        return tokenizer.unpatch(filled, grid), tokenizer.unpatch(hidden, grid)
