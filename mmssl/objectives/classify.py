"""Supervised classification on a pre-trained encoder: fine-tuning, through the same loop as pre-training."""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmssl.config import ObjectiveConfig
from mmssl.contracts import Batch, EncoderModule, Step
from mmssl.heads.classifier import ClassifierHead, HeadConfig


class ClassifyConfig(ObjectiveConfig):
    """Classification with a linear head on the pooled encoder."""

    name: Literal["classify"] = "classify"
    classes: list[str] = []
    """Class names in the order of the head's outputs; filled from the data's labels."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    head: HeadConfig = HeadConfig()

    def build(self, encoders: Mapping[str, EncoderModule]) -> "Classify":
        """Make the objective around its one encoder."""
        (encoder,) = encoders.values()
        head = self.head.build(encoder.dim, encoder.num_prefix, encoder.pooling, len(self.classes))
        return Classify(encoder, head, self.label_smoothing)


class Classify(nn.Module):
    """Cross-entropy of a head on the encoder, all weights trained."""

    def __init__(self, encoder: EncoderModule, head: ClassifierHead, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.encoder, self.head, self.label_smoothing = encoder, head, label_smoothing

    def encoders(self) -> dict[str, EncoderModule]:
        """Return the encoder, by its modality."""
        return {self.encoder.modality: self.encoder}

    def draw(self) -> None:
        """Nothing is drawn per sample."""

    def logits(self, batch: Batch) -> Tensor:
        """Return class scores [B, classes] of ``signal`` [B, C, *size]."""
        tokenizer, signal = self.encoder.tokenizer, batch["signal"]
        if self.head.layers > 1:
            latents = self.encoder.layers(signal, batch.get("seed"))[-self.head.layers :]
        else:
            grid = tokenizer.grid_of(signal.shape[2:])
            latents = [self.encoder(tokenizer.patches(signal), None, batch.get("seed"), grid)]
        return self.head(latents)  # type: ignore[no-any-return]

    def forward(self, batch: Batch) -> Step:
        """Return the cross-entropy and the accuracy against ``target`` [B]."""
        logits, target = self.logits(batch).float(), batch["target"]
        loss = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)
        return Step(loss, {"accuracy": (logits.detach().argmax(1) == target).float().mean()})
