"""Masked autoencoding (He et al., arXiv:2111.06377): predict the masked patches from the visible ones.

Which patches exist, how they are normalised and what a grid is belong to the tokenizer; this file serves every
modality.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmssl.backbones.pixelcnn import PixelCNN
from mmssl.config import ObjectiveConfig
from mmssl.contracts import Batch, Draw, EncoderModule, Reconstruction, Step, Streams
from mmssl.heads.decoder import DecoderConfig
from mmssl.losses.reconstruction import constant_mse, patch_mse
from mmssl.masking import MASKS, Mask, MaskKind, RunningCell, gather


class MAEConfig(ObjectiveConfig):
    """Masked autoencoding: what is hidden, and who predicts it."""

    name: Literal["mae"] = "mae"
    mask: MaskKind = "random"
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Fraction of the tokens that the encoder never sees (0.75 in the paper)."""
    decode_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the hidden tokens that the decoder predicts, chosen by running cells; below 1 it costs less
    (VideoMAE V2, arXiv:2303.16727, section 3.2, which has 0.5)."""
    decoder: DecoderConfig = DecoderConfig()

    def build(self, encoders: Mapping[str, EncoderModule]) -> "MAE":
        """Make the objective around its one encoder; ValueError for a mask that does not suit the encoder's grid."""
        (encoder,) = encoders.values()
        check_maskable(encoder)
        tokenizer = encoder.tokenizer
        decoder = self.decoder.build(encoder.dim, tokenizer.patch_dim, tokenizer.grid, tokenizer.extend)
        mask = MASKS[self.mask](self.mask_ratio)
        return MAE(encoder, decoder, mask if self.decode_ratio == 1 else RunningCell(mask, self.decode_ratio))


def check_maskable(encoder: EncoderModule) -> None:
    """Raise ValueError, one sentence, for an encoder that cannot see a few patches and tell of those around them."""
    if encoder.tokenizer.overlaps:
        raise ValueError(
            "masked autoencoding needs patches that do not overlap, or what is masked shows in its neighbours: "
            "take another model.tokenizer.name"
        )
    if isinstance(encoder.backbone, Streams | PixelCNN):
        raise ValueError(
            "masked autoencoding needs a backbone that looks at all tokens, but this one reads them in their order: "
            "set model.backbone.name to vit"
        )
    if encoder.output == "latent":
        raise ValueError(
            "masked autoencoding trains what the backbone makes of patches, which an encoder with model.output "
            "'latent' leaves out: set model.output=context"
        )
    if not encoder.tokenizer.placed:
        raise ValueError(
            "masked autoencoding cannot use tokens that do not tell where they are, for what is masked is known by its "
            "place alone: take another model.tokenizer.name"
        )
    if encoder.tokenizer.symbols:
        raise ValueError(
            f"masked autoencoding predicts values, but those of modality {encoder.modality} are symbols, between which "
            "there is no distance"
        )


class MAE(nn.Module):
    """An encoder that sees the kept patches only, and a decoder that predicts only the dropped ones."""

    inputs: tuple[str, ...] = ("signal",)

    def __init__(self, encoder: EncoderModule, decoder: nn.Module, mask: Mask) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        mask.kept(encoder.tokenizer.grid)  # a grid that cannot be masked is told now, not in a worker
        self._draw = mask

    def encoders(self) -> dict[str, EncoderModule]:
        """Return the encoder, by its modality."""
        return {self.encoder.modality: self.encoder}

    def draw(self) -> Draw:
        """Return the mask that the data workers draw for each sample."""
        return self._draw

    def forward(self, batch: Batch) -> Step:
        """Return the mean squared error over the masked patches of ``signal`` [B, C, *size].

        ``trivial`` is that of the best constant prediction: the loss without having learned anything. A collective.
        """
        tokenizer = self.encoder.tokenizer
        patches, pad, drop = tokenizer.patches(batch), tokenizer.pad(batch), batch["drop"]
        prediction = self._predict(patches, pad, batch)
        scored = None if pad is None else ~pad.gather(1, drop)
        target = tokenizer.target(gather(patches, drop))
        return Step(patch_mse(prediction, target, scored).mean(), {"trivial": constant_mse(target, scored)})

    def _predict(self, patches: Tensor, pad: Tensor | None, batch: Batch) -> Tensor:
        grid = self.encoder.tokenizer.grid_of(batch["signal"].shape[2:])
        latent = self.encoder(patches, batch["keep"], batch.get("seed"), grid, pad)
        return self.decoder(latent, batch["keep"], batch["drop"], grid, pad)  # type: ignore[no-any-return]

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Reconstruction:
        """Return what there is, what is predicted and what was hidden, as the tokenizer cuts it: [B, C, *size] each.

        Predictions are put back to the signal's scale with the mean and deviation of the true patches, which a person
        looking at the picture must be told.
        """
        tokenizer = self.encoder.tokenizer
        patches, drop = tokenizer.patches(batch), batch["drop"]
        grid = tokenizer.grid_of(batch["signal"].shape[2:])
        prediction = self._predict(patches, tokenizer.pad(batch), batch).float()

        def at(index: Tensor) -> Tensor:
            return index.unsqueeze(-1).expand(-1, -1, patches.shape[-1])

        hidden = torch.ones_like(patches).scatter(1, at(batch["keep"]), 0.0)
        filled = (patches * (1 - hidden)).scatter(1, at(drop), tokenizer.untarget(prediction, gather(patches, drop)))
        return Reconstruction(*(tokenizer.unpatch(x, grid) for x in (patches, filled, hidden)))
