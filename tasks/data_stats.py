"""``mmssl data stats``: mean and deviation of what an encoder normalises, measured on the files it will learn from."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel
from rich.console import Console

from mmssl.config import override, validate
from mmssl.data.listing import list_files
from mmssl.errors import UnusableData, UserError, nearest
from modalities.encoder import DECODE_TIMEOUT, MODALITIES
from tasks.build import EncoderRecipe, load_recipe
from tasks.parallel import each_file


@dataclass(frozen=True)
class StatsResult:
    """What was measured on one path, per channel and over all its files."""

    path: str
    modality: str
    files: int
    mean: list[float]
    std: list[float]
    skipped: list[tuple[str, str]]
    """(name, reason) of broken files that were left out on request."""

    @property
    def settings(self) -> str:
        """What to add to ``mmssl pretrain``, which stores it with the encoder."""
        numbers = {key: [float(f"{value:.4g}") for value in values] for key, values in self._pairs()}
        words = {key: values if len(values) > 1 else values[0] for key, values in numbers.items()}
        return " ".join(f"signal.{key}={json.dumps(value, separators=(',', ':'))}" for key, value in words.items())

    def _pairs(self) -> tuple[tuple[str, list[float]], ...]:
        return ("mean", self.mean), ("std", self.std)

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        skipped = [{"path": path, "reason": reason} for path, reason in self.skipped]
        facts = {"path": self.path, "modality": self.modality, "files": self.files, "mean": self.mean, "std": self.std}
        return {"task": "stats", **facts, "settings": self.settings, "skipped": skipped}

    def render(self, console: Console) -> None:
        """Print what a person wants to know."""
        text = f"{self.path}: {self.files} {self.modality} files"
        if self.skipped:
            text += f"; {len(self.skipped)} broken files left out"
        for line in (text, self.settings):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def stats(
    path: str | Path,
    modality: str = "audio",
    recipe: str | None = None,
    settings: Mapping[str, Any] | None = None,
    split: str | None = None,
    workers: int | None = None,
    skip_broken: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> StatsResult:
    """Measure the files of ``modality``, or of that of ``recipe``, under ``path``.

    ``settings`` are dotted keys such as ``signal.mels``, over the recipe's or the modality's own; ``split`` is another
    split. ``workers`` processes decode, one per core if None; ``progress`` is called with (files done, files in all).
    Raises UserError for what does not fit together, UnusableData for a broken file unless ``skip_broken``.
    """
    signal = _signal(modality, settings or {}) if recipe is None else None
    if recipe is not None:
        resolved = load_recipe(recipe, settings)
        if not isinstance(resolved, EncoderRecipe):
            raise UserError(f"{recipe} has several modalities, each measured by itself: leave --recipe out")
        modality, signal = resolved.modality, resolved.signal
    kind = MODALITIES[modality]
    listing = list_files(path, kind.source(signal), split=split, default_split="train")
    total, skipped = np.zeros(()), []
    measure = partial(_moments, kind.moments, signal)
    for i, outcome in enumerate(each_file(measure, listing.paths, workers, DECODE_TIMEOUT)):
        if outcome.value is not None:
            total = total + outcome.value
        elif skip_broken:
            skipped.append((listing.name(i), str(outcome.reason)))
        else:
            raise UnusableData(f"{listing.paths[i]}: {outcome.reason}; --skip-broken leaves such files out")
        if progress is not None:
            progress(i + 1, len(listing))
    if not total.ndim:
        raise UnusableData(f"{listing.root}: none of the {len(listing)} files can be read")
    mean, std = _mean_and_std(total)
    if not (np.isfinite(mean).all() and np.isfinite(std).all()):
        raise UnusableData(f"{listing.root}: what the files hold has no finite mean and deviation")
    return StatsResult(str(path), modality, len(listing) - len(skipped), mean.tolist(), std.tolist(), skipped)


def _mean_and_std(total: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    count, sums, squares = total.T
    with np.errstate(all="ignore"):  # what is no number is reported in a sentence
        mean = sums / count
        return mean, np.sqrt(np.maximum(squares / count - mean**2, 0))


def _moments(measure: Callable[[str, Any], Any], signal: Any, path: str) -> Any:
    return measure(path, signal)


def _signal(modality: str, settings: Mapping[str, Any]) -> BaseModel:
    if modality not in MODALITIES:
        raise UserError(f"'{modality}' is not a modality{nearest(modality, MODALITIES)}")
    for key in settings:
        if not key.startswith("signal."):
            raise UserError(f"{key}: only keys of signal matter here, such as signal.mean, or give --recipe")
    nested = override({}, settings).get("signal", {})
    return validate(MODALITIES[modality].signal_type, nested, "data stats")
