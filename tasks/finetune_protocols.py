"""How fine-tuning is done: named, pinned settings, and the recipe that they make for an encoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmssl.config import flat, override
from mmssl.distributed import world
from mmssl.errors import UserError, nearest
from modalities.encoder import Encoder
from tasks.build import Recipe, parse_recipe

PLAIN: dict[str, Any] = {
    "objective.label_smoothing": 0.1,
    "optim.base_lr": 5e-4,
    "optim.betas": [0.9, 0.999],
    "optim.weight_decay": 0.05,
    "optim.layer_decay": 0.65,
    "optim.warmup": 0.05,
    "train.epochs": 100,
    "train.batch_size": 256,
}
"""For few labels and small data: MAE's fine-tuning of ViT-B where it does not depend on ImageNet's size."""

MAE: dict[str, Any] = {
    "signal.crop_scale": [0.08, 1.0],
    "signal.augment.randaugment": {"ops": 2, "magnitude": 9, "magnitude_std": 0.5},
    "signal.augment.erase": {"probability": 0.25},
    "objective.label_smoothing": 0.1,
    "objective.mix": {"mixup": 0.8, "cutmix": 1.0},
    "optim.betas": [0.9, 0.999],
    "optim.weight_decay": 0.05,
    "optim.min_lr": 1e-6,
    "optim.warmup": "5ep",
    "train.batch_size": 1024,
}
"""MAE's fine-tuning on ImageNet (arXiv:2111.06377, table 9; erasing, the least rate and drop path as in the authors'
code). Unlike there, the pooled tokens are normalised before their mean and not after it."""

VIDEO_MAE: dict[str, Any] = {
    "signal.views": [5, 3],
    "signal.augment.randaugment": {"ops": 4, "magnitude": 7, "magnitude_std": 0.5},
    "signal.augment.erase": {"probability": 0.25},
    "objective.label_smoothing": 0.1,
    "objective.mix": {"mixup": 0.8, "cutmix": 1.0},
    "optim.betas": [0.9, 0.999],
    "optim.weight_decay": 0.05,
    "optim.layer_decay": 0.75,
    "optim.min_lr": 1e-6,
    "optim.warmup": "5ep",
    "train.batch_size": 384,
}
"""VideoMAE's fine-tuning on Kinetics-400 (arXiv:2203.12602, appendix; rates and epochs as in the authors' scripts).

It is tested on 5 clips x 3 crops. Unlike there a file gives one clip per epoch, not two: ours mixes neighbours."""

AUDIO_MAE: dict[str, Any] = {
    "signal.spec_mask": {"time": 192, "frequency": 48},
    "objective.mix": {"mixup": 10.0, "probability": 0.5},
    "model.backbone.drop_path": 0.1,
    "optim.base_lr": 1e-3,
    "optim.betas": [0.9, 0.95],
    "optim.weight_decay": 1e-4,
    "optim.layer_decay": 0.75,
    "optim.warmup": "4ep",
    "train.epochs": 60,
    "train.batch_size": 32,
}
"""Audio-MAE's fine-tuning on AudioSet-20K (arXiv:2207.06405, appendix): SpecAugment, and waveforms mixed with weights
from Beta(10, 10) for every other pair. Its masking of patches and its changes of volume are not there."""


@dataclass(frozen=True)
class Published:
    """A protocol as a paper has it: for which modality, and what depends on the model's size."""

    modality: str
    settings: Mapping[str, Any]
    by_width: tuple[tuple[int, str, Mapping[str, Any]], ...] = ()
    """Up to such a width of the encoder: the column of the paper's table, and its settings."""


def _size(base_lr: float, layer_decay: float, epochs: int, drop_path: float) -> dict[str, Any]:
    backbone = {"model.backbone.drop_path": drop_path}
    return {"optim.base_lr": base_lr, "optim.layer_decay": layer_decay, "train.epochs": epochs, **backbone}


PUBLISHED = {
    "mae": Published(
        "image",
        MAE,
        (
            (768, "B", _size(5e-4, 0.65, 100, 0.1)),
            (1024, "L", _size(1e-3, 0.75, 50, 0.2)),
            (1 << 30, "H", _size(1e-3, 0.75, 50, 0.3)),
        ),
    ),
    "videomae": Published(
        "video",
        VIDEO_MAE,
        (
            (384, "S", _size(5e-4, 0.75, 150, 0.1)),
            (768, "B", _size(5e-4, 0.75, 75, 0.1)),
            (1024, "L", _size(2e-3, 0.75, 35, 0.1)),
            (1 << 30, "H", _size(1e-3, 0.75, 50, 0.2)),
        ),
    ),
    "audiomae": Published("audio", AUDIO_MAE),
}
PROTOCOLS = ("plain", *PUBLISHED)

UNSEEN = ("checkpoint.", "data.workers", "train.engine", "train.log_every", "train.seed")
"""Keys that leave the expected score as it is: changing them is no deviation from a protocol."""

FIXED = {
    "train.init_from": "fine-tuning starts from ENCODER, or with --scratch from random weights",
    "objective.name": "fine-tuning classifies",
    "objective.classes": "the classes are the sorted training labels",
    "objective.multi_label": "give --multi-label",
}


@dataclass(frozen=True)
class Protocol:
    """Pinned settings by dotted key, and what was changed in them."""

    name: str
    settings: dict[str, Any]
    overrides: dict[str, Any]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"name": self.name, "settings": self.settings, "overrides": self.overrides, "notes": list(self.notes)}

    def __str__(self) -> str:
        text = f"protocol {self.name}: {listed(self.settings)}"
        if self.overrides:
            text += f"; but {listed(self.overrides)}"
        return "; ".join([text, *self.notes])


def listed(settings: Mapping[str, Any]) -> str:
    """Return settings as words: ``train.epochs=100, ...``."""
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def pinned(name: str, encoder: Encoder) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a protocol's settings for an encoder, and what must be known about them; UserError for an unknown name."""
    if name not in PROTOCOLS:
        raise UserError(f"--protocol '{name}' is not a protocol{nearest(name, PROTOCOLS)}")
    if name == "plain":
        return PLAIN, ()
    published, width = PUBLISHED[name], encoder.dim
    if encoder.modality != published.modality:
        wanted, given = published.modality, encoder.modality
        raise UserError(f"--protocol {name} is for modality {wanted}, and this encoder is of modality {given}")
    prefix, backbone = "model.backbone.", encoder.config.model.backbone
    sizes = {**published.settings, **(published.by_width[0][2] if published.by_width else {})}
    if not all(hasattr(backbone, key.removeprefix(prefix)) for key in sizes if key.startswith(prefix)):
        raise UserError(f"--protocol {name} is for ViT encoders, and this encoder's backbone is '{backbone.name}'")
    for most, column, settings in published.by_width:
        if width <= most:
            notes = (f"the encoder is {width} wide, so the settings are the paper's for ViT-{column}",)
            return {**published.settings, **settings}, notes
    settings = dict(published.settings)
    if name == "audiomae":
        signal = encoder.config.signal
        hidden = {"time": signal.frames * 192 // 1024, "frequency": signal.mels * 48 // 128}  # type: ignore[attr-defined]
        settings["signal.spec_mask"] = hidden
        if hidden != published.settings["signal.spec_mask"]:
            return settings, (f"SpecAugment hides the paper's share of this encoder's spectrogram, up to {hidden}",)
    return settings, ()


def finetune_recipe(
    encoder: Encoder,
    classes: list[str],
    overrides: Mapping[str, Any],
    samples: int,
    protocol: str = "plain",
    multi_label: bool = False,
) -> tuple[Recipe, Protocol]:
    """Return the recipe of a fine-tuning run (the encoder's own settings, the protocol's, ``overrides``), and how it
    came to be.

    A protocol's batch is cut to the ``samples`` there are, so that an epoch has at least one step, and to what divides
    into even shares of the ranks and micro-steps. Raises UserError for what cannot be set here.
    """
    overrides = flat(overrides)
    for key, reason in FIXED.items():
        if key in overrides:
            raise UserError(f"{key} cannot be set here: {reason}")
    settings, notes = pinned(protocol, encoder)
    base = encoder.config.model_dump(mode="json", include={"modality", "signal", "model"})
    base["objective"] = {"name": "classify", "classes": classes, "multi_label": multi_label}
    # One sample per micro-batch is valid whatever else is set: it stands in until the real batch is known.
    pinned_keys = {key: value for key, value in settings.items() if key != "train.batch_size"}
    accumulate = overrides.get("train.accumulate", 1)
    draft = override(base, {**pinned_keys, "train.batch_size": accumulate if isinstance(accumulate, int) else 1})
    recipe = parse_recipe(override(draft, overrides), "finetune")
    if "train.batch_size" not in overrides:
        share = world().size * recipe.train.accumulate * recipe.objective.micro_batch_multiple
        batch = max(share, min(settings["train.batch_size"], samples) // share * share)
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_size": batch})})
        if batch != settings["train.batch_size"]:
            notes = (*notes, f"train.batch_size is {batch}, because there are {samples} training files")
    changes = {key: value for key, value in overrides.items() if not key.startswith(UNSEEN)}
    return recipe, Protocol(protocol, settings, changes, notes)
