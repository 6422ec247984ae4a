"""Zero-shot classification (CLIP, arXiv:2103.00020, section 3.1): classes are whatever names a person gives.

A file is of the class whose prompts its vector is nearest to, in the space that the towers of a run share.

Shape legend: n files, C classes, T templates, d the width of the joint space.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from mmssl.data import inline
from mmssl.data.guard import BrokenFile
from mmssl.data.listing import Listing
from mmssl.errors import UserError
from mmssl.objectives.clip import unit
from modalities.classifier import Prediction
from modalities.heads import OnEncoder
from modalities.joint import JointEncoder, check_together, joint_encoders, of_modality
from tasks.features import CacheFolder, extract
from tasks.predict import no_url
from tasks.templates import chosen, fill, texts

TEXT = "text"
Classes = Iterable[str] | Mapping[str, str | Iterable[str]]
"""Names, or for each name the words that stand for it in prompts."""
COLDEST, HOTTEST = 1e-6, 1e6
"""Temperatures between which scores are numbers."""


class ZeroShotClassifier(OnEncoder):
    """Scores files by class names alone, with the towers of a run that learned from pairs with texts."""

    def __init__(
        self,
        encoder: str | Path | Mapping[str, JointEncoder],
        classes: Classes,
        templates: str | Iterable[str] | None = None,
        *,
        modality: str | None = None,
        temperature: float | None = None,
        threshold: float | None = None,
        cache: CacheFolder = "auto",
    ) -> None:
        """Load it, on the CPU; ``encoder`` is a run folder, or the towers that ``joint_encoders`` returns.

        ``classes`` are names, or names with the words that stand for each in prompts. ``templates`` are sentences with
        one ``{}`` where the words go, or the name of a set in ``tasks.templates``; by default the words are all there
        is. ``modality`` is that of the inputs, needed where more than one tower is none of texts. ``temperature``
        replaces the learned one. Where the best score is below ``threshold``, the answer is that it is none of the
        classes. The vectors of the prompts are kept in ``cache``. Raises UserError, one sentence, for what is unusable.
        """
        towers = joint_encoders(encoder) if isinstance(encoder, str | Path) else encoder
        check_together(towers, "the encoder")
        where = encoder if isinstance(encoder, str | Path) else "the encoder"
        self.words = _words(classes)
        self.classes = list(self.words)
        self.templates = chosen(templates)
        self.reader: JointEncoder = reader(towers, where, modality)
        self.text = of_modality(towers, TEXT, where)
        self.threshold, self._cache = threshold, cache
        _check_number("threshold", threshold, 0, 1)
        _check_number("temperature", temperature, COLDEST, HOTTEST)
        self.scale = self.reader.temperature.scale().item() if temperature is None else 1 / temperature
        bias = self.reader.temperature.bias
        self.bias = None if bias is None else bias.item()
        if len(self.classes) == 1 and self.bias is None:
            raise UserError(
                f"'{self.classes[0]}' is the only class, and of one class scores are always 1; name what it is to be "
                "told from"
            )
        self._prompts = self._told_apart()

    @property
    def modality(self) -> str:
        """The modality of the inputs."""
        return self.reader.modality

    def to(self, device: torch.device) -> "ZeroShotClassifier":
        """Move its towers to a device."""
        self.reader.to(device)
        self.text.to(device)
        return self

    def __call__(self, inputs: Any, top: int | None = None) -> list[Prediction] | list[list[Prediction]]:
        """As ``classify``."""
        return self.classify(inputs, top)

    def classify(self, inputs: Any, top: int | None = None) -> list[Prediction] | list[list[Prediction]]:
        """Return [{"label", "score"}, ...] of one input, best first, or a list of those for a list of inputs.

        An input is a path, a PIL picture, an array uint8 [h, w, 3], another decoded signal or a preprocessed float
        tensor [C, *size]; ``top`` keeps so many classes. Scores add up to 1, or with the loss sigmoid each is a
        probability by itself. What is below the threshold has one entry, {"label": None, "score": that of the best}.
        Raises UnusableData naming the first file that is broken, and UserError for a URL.
        """
        several = isinstance(inputs, list | tuple) or (
            isinstance(inputs, Tensor | np.ndarray) and inputs.ndim > self._axes(inputs)
        )
        predictions = self.ranked(self.similarities(inputs), top)
        return predictions if several else predictions[0]

    def scores(self, inputs: Any, batch_size: int | None = None) -> Tensor:
        """Return the score of every class, float32 [n, C] on the CPU, for inputs as ``classify`` takes them."""
        return self.probabilities(self.similarities(inputs, batch_size))

    def similarities(self, inputs: Any, batch_size: int | None = None) -> Tensor:
        """Return the cosine similarity with every class, float32 [n, C] on the CPU; inputs as ``classify``."""
        return self.reader.embed(self._prepared(inputs), batch_size) @ self.class_vectors.T

    def probabilities(self, similarities: Tensor) -> Tensor:
        """Turn cosine similarities [n, C] into scores, by the learned temperature."""
        logits = self.scale * similarities
        return logits.softmax(1) if self.bias is None else (logits + self.bias).sigmoid()

    def ranked(self, similarities: Tensor, top: int | None = None) -> list[list[Prediction]]:
        """Return for each row [n, C] the ``top`` predictions, best first; equal ones by class order."""
        if top is not None and top < 1:
            raise ValueError(f"top must be at least 1, but got {top}")
        order = similarities.argsort(dim=1, descending=True, stable=True)[:, :top].tolist()
        found = []
        for row, best in zip(self.probabilities(similarities), order, strict=True):
            one = [{"label": self.classes[i], "score": float(row[i])} for i in best]
            rejected = self.threshold is not None and one[0]["score"] < self.threshold
            found.append([{"label": None, "score": one[0]["score"]}] if rejected else one)
        return found

    @cached_property
    def prompt_vectors(self) -> list[Tensor]:
        """Unit vectors of each class's prompts, float32 [T, words of the class, d]."""
        listing = Listing(Path("the prompts"), [path for paths in self._prompts.values() for path in paths])
        vectors = extract(self.text, listing, workers=0, cache=self._cache).vectors
        parts = vectors.split([len(paths) for paths in self._prompts.values()])
        return [part.unflatten(0, (len(self.templates), -1)) for part in parts]

    @cached_property
    def class_vectors(self) -> Tensor:
        """One unit vector per class, float32 [C, d]: the mean of all its prompts' (section 3.1.4), normalised."""
        return unit(torch.stack([part.flatten(0, 1).mean(0) for part in self.prompt_vectors]))

    def of_template(self, place: int) -> Tensor:
        """Return what ``class_vectors`` are with the template at ``place`` alone."""
        return unit(torch.stack([part[place].mean(0) for part in self.prompt_vectors]))

    # What ``tasks.features.extract`` needs, so that files are read in worker processes.

    def features(self, signal: Tensor) -> Tensor:
        """Return cosine similarities float32 [B, C] on the CPU for preprocessed signals [B, C, *size]."""
        return self.reader.features(signal).cpu() @ self.class_vectors.T

    def fingerprint(self) -> str:
        """Return a text that changes whenever similarities would."""
        return f"{self.reader.fingerprint()} {self.text.fingerprint()} {self.words} {self.templates}"

    def _told_apart(self) -> dict[str, list[str]]:
        """Return every class's prompts, as paths; raises UserError where the prompts of two classes read alike."""
        found: dict[str, list[str]] = {}
        known: dict[frozenset[bytes], str] = {}
        for name, words in self.words.items():
            prompts = [fill(template, word) for template in self.templates for word in words]
            found[name] = [inline.join(prompt) for prompt in prompts]
            other = known.setdefault(frozenset(map(self._seen, prompts)), name)
            if other != name:
                raise UserError(
                    f"'{other}' and '{name}' read alike to this encoder: in the templates, what is left of them is the "
                    "same; name them otherwise, or leave one out"
                )
        return found

    def _seen(self, prompt: str) -> bytes:
        """Return what the text's tower reads of a prompt; raises UserError for what is no text."""
        try:
            return self.text.seen(inline.join(prompt))
        except BrokenFile as error:
            raise UserError(f"the prompt {prompt!r} cannot be used: {error.reason}") from None

    def _axes(self, inputs: Any) -> int:
        """Return how many axes one input has: a picture [h, w, 3], or a signal [C, *size]."""
        return 3 if isinstance(inputs, np.ndarray) else 1 + self.reader.encoder.axes

    def _prepared(self, inputs: Any) -> Any:
        if isinstance(inputs, list | tuple):
            return [self._one(item) for item in inputs]
        if isinstance(inputs, np.ndarray) and inputs.ndim == 4:
            return [self._one(item) for item in inputs]
        return self._one(inputs)

    def _one(self, item: Any) -> Any:
        if isinstance(item, str | Path):
            no_url(item)
        if isinstance(item, np.ndarray):
            if self.modality != "image" or item.dtype != np.uint8 or item.ndim != 3 or item.shape[2] != 3:
                raise UserError(
                    f"an array is taken for a picture, uint8 [h, w, 3], but got {item.dtype} {list(item.shape)} for "
                    f"modality {self.modality}"
                )
            return PIL.Image.fromarray(item)
        return item


def reader(
    towers: Mapping[str, JointEncoder],
    where: str | Path,
    modality: str | None = None,
    paths: Sequence[str | Path] = (),
) -> JointEncoder:
    """Return the tower that reads the inputs: that of ``modality``, else the one that is none of texts.

    Of several it is the one whose files have the suffixes of ``paths``. Raises UserError where that is not one.
    """
    if modality is not None:
        return of_modality(towers, modality, where)
    others = {name: tower for name, tower in towers.items() if name != TEXT}
    if len(others) > 1 and paths:
        suffixes = {Path(path).suffix.lower() for path in paths}
        others = {name: one for name, one in others.items() if suffixes <= one.encoder.kind.suffixes} or others
    if len(others) != 1:
        raise UserError(
            f"{where} reads {' and '.join(others)}; say which by modality (--modality {next(iter(others))})"
        )
    return next(iter(others.values()))


def _words(classes: Classes) -> dict[str, list[str]]:
    """Return the words of every class; raises UserError for classes that are none, blank or there twice."""
    if isinstance(classes, str):
        raise UserError(f"classes are a list of names, but got the text '{classes}'")
    names = texts("classes are", classes)
    if not names:
        raise UserError("no class is given, so that there is nothing to tell apart")
    of = classes if isinstance(classes, Mapping) else {}
    found = {name: texts(f"the words of class '{name}' are", of.get(name, name)) for name in names}
    for name, words in found.items():
        if not words or not all(word.strip() for word in (name, *words)):
            raise UserError(f"the class {name!r} is blank, or has no words; give each a name")
    if len(found) < len(names):
        raise UserError(f"the class '{Counter(names).most_common(1)[0][0]}' is given twice")
    return found


def _check_number(what: str, value: object, low: float, high: float) -> None:
    if value is not None and not (isinstance(value, Real) and low <= float(value) <= high):
        raise UserError(f"{what} {value}: give a number from {low:g} to {high:g}")
