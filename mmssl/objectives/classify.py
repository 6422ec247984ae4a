"""Supervised classification on a pre-trained encoder: fine-tuning, through the same loop as pre-training.

Shape legend: B samples, C classes. A target is int64 [B], one class per sample, or float32 [B, C] of 0 and 1.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmssl.config import ObjectiveConfig
from mmssl.contracts import Batch, Draw, EncoderModule, Kept, Step
from mmssl.engine.optim import layer_of
from mmssl.heads.classifier import ClassifierHead, HeadConfig
from mmssl.mixing import MixConfig, MixDraw, mix, partner


class ClassifyConfig(ObjectiveConfig):
    """Classification with a head on the encoder: what is trained, and against what."""

    name: Literal["classify"] = "classify"
    classes: list[str] = []
    """Class names in the order of the head's outputs; filled from the data's labels."""
    multi_label: bool = False
    """A sample has any number of classes: one yes or no per class (sigmoid) instead of one of them (softmax)."""
    train_blocks: Annotated[int, Field(ge=0)] | None = None
    """Train the last so many blocks, the final norm and the head; 0 is the head alone, null is everything."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread over all classes (arXiv:1512.00567, section 7)."""
    class_weights: Literal["balanced"] | list[float] | None = None
    """Weights of the classes in the loss, one per class and taken as they are; "balanced" becomes n / (C x n_c) of the
    training files. The loss is the plain mean of weighted losses, not divided by the batch's sum of weights, so that
    ranks and micro-batches add up; balanced weights have mean 1 over the training files."""
    mix: MixConfig = MixConfig()
    head: HeadConfig = HeadConfig()

    @model_validator(mode="after")
    def _fitting_weights(self) -> Self:
        weights = self.class_weights
        if weights is not None and self.multi_label:
            raise ValueError("class_weights are for one label per file; leave them out where there are several")
        if isinstance(weights, list) and len(weights) != len(self.classes):
            raise ValueError(f"class_weights has {len(weights)} numbers for {len(self.classes)} classes")
        if isinstance(weights, list) and min(weights) <= 0:
            raise ValueError(f"class_weights must all be greater than 0, but got {weights}")
        return self

    @property
    def micro_batch_multiple(self) -> int:
        """Two where samples are mixed in pairs."""
        return 2 if self.mix.active else 1

    def synthetic_targets(self, files: int) -> np.ndarray[Any, Any]:
        """Return classes drawn at random, int64 [files], or any number for each, float32 [files, classes]."""
        rng, classes = np.random.default_rng(0), len(self.classes)
        if self.multi_label:
            return rng.integers(2, size=(files, classes)).astype(np.float32)
        return rng.integers(classes, size=files)

    def build(self, encoders: Mapping[str, EncoderModule]) -> "Classify":
        """Make the objective around its one encoder; ValueError where its settings do not fit the encoder."""
        if self.class_weights == "balanced":
            raise ValueError("objective.class_weights 'balanced' is for fine-tuning, which has the labels to count")
        (encoder,) = encoders.values()
        head = self.head.build(encoder.dim, encoder.num_prefix, encoder.pooling, len(self.classes))
        return Classify(
            encoder,
            head,
            self.label_smoothing,
            self.train_blocks,
            self.class_weights,
            self.mix,
            self.multi_label,
            self.model_dump(mode="json", include={"classes", "multi_label", "head"}),
        )


class Classify(nn.Module):
    """Cross-entropy of a head on the encoder; implements ``mmssl.contracts.Keeps``."""

    inputs: tuple[str, ...] = ("signal",)
    weights: Tensor | None

    def __init__(
        self,
        encoder: EncoderModule,
        head: ClassifierHead,
        label_smoothing: float = 0.0,
        train_blocks: int | None = None,
        class_weights: Sequence[float] | None = None,
        mix: MixConfig | None = None,
        multi_label: bool = False,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.label_smoothing, self.mix, self.multi_label = label_smoothing, mix or MixConfig(), multi_label
        self.facts = dict(facts or {})
        self.register_buffer("weights", None if class_weights is None else torch.tensor(class_weights), False)
        assert isinstance(encoder, nn.Module)
        if encoder.output == "latent":  # of no use here, and engines expect a gradient for whatever is trained
            unused = encoder.backbone
            assert isinstance(unused, nn.Module)
            unused.requires_grad_(False)
        self._frozen = freeze(encoder, train_blocks)
        self.head_only = train_blocks == 0
        self.train()

    def train(self, mode: bool = True) -> "Classify":
        """Switch between training and evaluation, in which what is frozen always stays."""
        super().train(mode)
        for module in self._frozen:
            module.training = False
        return self

    def encoders(self) -> dict[str, EncoderModule]:
        """Return the encoder, by its modality."""
        return {self.encoder.modality: self.encoder}

    def kept(self) -> dict[str, Kept]:
        """Return the head, a classifier of the classes whose names are among its facts."""
        return {self.encoder.modality: Kept("classifier", self.head, self.facts)}

    def draw(self) -> Draw | None:
        """Return how the data workers draw the mixing of each sample."""
        return MixDraw(self.mix, len(self.encoder.tokenizer.size)) if self.mix.active else None

    def logits(self, batch: Batch) -> Tensor:
        """Return class scores [B, C] of ``signal`` [B, C, *size]; the larger the likelier, not yet probabilities."""
        tokenizer = self.encoder.tokenizer
        pad = tokenizer.pad(batch)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.head_only):
            if self.head.layers > 1:
                latents = self.encoder.layers(batch)[-self.head.layers :]
            else:
                grid = tokenizer.grid_of(batch["signal"].shape[2:])
                latents = [self.encoder(tokenizer.patches(batch), None, batch.get("seed"), grid, pad)]
        return self.head(latents, pad)  # type: ignore[no-any-return]

    def forward(self, batch: Batch) -> Step:
        """Return the loss against ``target`` and, for one class per sample, the accuracy against the unmixed target."""
        target = batch["target"]
        if self.mix.active and self.training:
            signal, own = mix(batch["signal"], batch["mix_weight"], batch["mix_box"])
            mixed = {**batch, "signal": signal}
            if "length" in batch:  # what either of the two is not padded to
                mixed["length"] = torch.maximum(batch["length"], partner(batch["length"]))
            logits = self.logits(mixed).float()
            losses = own * self.losses(logits, target) + (1 - own) * self.losses(logits, partner(target))
        else:
            logits = self.logits(batch).float()
            losses = self.losses(logits, target)
        metrics = {} if self.multi_label else {"accuracy": (logits.detach().argmax(1) == target).float().mean()}
        return Step(losses.mean(), metrics)

    def losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each sample, fp32 [B], for class scores [B, C]; of several classes the mean."""
        if not self.multi_label:
            return F.cross_entropy(logits, target, self.weights, label_smoothing=self.label_smoothing, reduction="none")
        if target.ndim == 1:  # a class index is a single positive
            target = F.one_hot(target, logits.shape[1])
        soft = target.float() * (1 - self.label_smoothing) + self.label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, soft, reduction="none").mean(1)


def freeze(encoder: nn.Module, train_blocks: int | None) -> list[nn.Module]:
    """Freeze all but the last blocks and the final norm, or with 0 everything; returns the modules that are frozen.

    Raises ValueError for more blocks than there are.
    """
    if train_blocks is None:
        return []
    trainable = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    depth = max((layer_of(name, 0) for name in trainable if ".blocks." in f".{name}"), default=0)
    if train_blocks > depth:
        raise ValueError(f"objective.train_blocks is {train_blocks}, but the encoder has {depth} blocks")
    last = depth + 1 if train_blocks == 0 else depth - train_blocks
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and layer_of(name, depth) > last)
    return [module for name, module in encoder.named_modules() if layer_of(f"{name}.", depth) <= last]
