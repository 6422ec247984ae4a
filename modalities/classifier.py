"""The classifier: an encoder folder with a head beside it. Files in, class names and scores out."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from mmssl.config import validate
from mmssl.errors import UserError
from mmssl.files import digest
from mmssl.objectives.classify import Classify, ClassifyConfig
from modalities.encoder import Encoder, encoder_folder, load
from modalities.heads import OnEncoder, has_head, read_head, write_head
from modalities.views import in_groups, over_views

NAME = "classifier"

Prediction = dict[str, Any]
"""{"label": a class's name, "score": its probability}."""


class Classifier(OnEncoder):
    """Scores files with what fine-tuning left in an encoder folder or a run folder."""

    def __init__(self, path: str | Path, signal: Mapping[str, Any] | None = None) -> None:
        """Load it, on the CPU, as ``mmssl.load`` does; raises UserError, one sentence, where there is no classifier."""
        folder = encoder_folder(Path(path))
        encoder = load(folder, signal)
        if not has_head(folder, NAME):
            raise UserError(
                f"{path} holds an encoder without a classifier; fine-tune it first: "
                f"mmssl finetune {path} --train LABELLED --test LABELLED"
            )
        stored, tensors = read_head(folder, NAME)
        config = validate(ClassifyConfig, {"name": "classify", **stored}, str(folder / f"{NAME}.json"))
        try:
            objective = config.build({encoder.modality: encoder})
            objective.head.load_state_dict(tensors)
        except (ValueError, RuntimeError) as error:
            words = str(error).splitlines()[-1].strip()
            raise UserError(f"{folder}: the classifier does not fit its configuration ({words})") from None
        self._take(objective, config.classes)

    @classmethod
    def of(cls, objective: Classify, classes: list[str]) -> Self:
        """Return a classifier of the very modules of an objective that is still trained."""
        self = cls.__new__(cls)
        self._take(objective, classes)
        return self

    def _take(self, objective: Classify, classes: list[str]) -> None:
        assert isinstance(objective.encoder, Encoder)
        self.objective, self.classes = objective.eval(), list(classes)
        self.reader = self.encoder = objective.encoder
        self.multi_label = objective.multi_label

    def to(self, device: torch.device) -> Self:
        """Move it to a device."""
        self.objective.to(device)
        return self

    def __call__(self, inputs: Any, top: int | None = None) -> list[Prediction] | list[list[Prediction]]:
        """As ``classify``."""
        return self.classify(inputs, top)

    def classify(self, inputs: Any, top: int | None = None) -> list[Prediction] | list[list[Prediction]]:
        """Return [{"label", "score"}, ...] of one input, best first, or a list of those for a list of inputs.

        An input is a path, a decoded signal (a PIL picture) or a preprocessed float tensor [C, *size]; ``top`` keeps so
        many classes. Scores add up to 1, or with several labels per file each is a probability by itself.
        Raises UnusableData naming the first file that is broken.
        """
        predictions = self.ranked(self._logits(inputs), top)
        several = isinstance(inputs, list | tuple) or (
            isinstance(inputs, Tensor) and inputs.ndim > 1 + self.encoder.axes
        )
        return predictions if several else predictions[0]

    def scores(self, inputs: Any, batch_size: int | None = None) -> Tensor:
        """Return the probability of every class, float32 [n, C] on the CPU, for inputs as ``classify`` takes them."""
        return self.probabilities(self._logits(inputs, batch_size))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turn class scores [n, C] of ``features`` into probabilities."""
        return logits.sigmoid() if self.multi_label else logits.softmax(1)

    def ranked(self, logits: Tensor, top: int | None = None) -> list[list[Prediction]]:
        """Return for each row of class scores [n, C] the ``top`` predictions, best first; equal ones by class order."""
        if top is not None and top < 1:
            raise ValueError(f"top must be at least 1, but got {top}")
        probabilities = self.probabilities(logits)
        order = logits.argsort(dim=1, descending=True, stable=True)[:, :top]
        return [
            [{"label": self.classes[i], "score": float(row[i])} for i in best]
            for row, best in zip(probabilities, order.tolist(), strict=True)
        ]

    def _logits(self, inputs: Any, batch_size: int | None = None) -> Tensor:
        rows: list[Tensor] = []
        for signals in self.encoder.batches(inputs, batch_size):
            rows += in_groups(signals, lambda batch: self.features(batch).cpu())
        return torch.stack(rows) if rows else torch.empty(0, len(self.classes))

    @torch.no_grad()
    def features(self, signal: Tensor) -> Tensor:
        """Return class scores before softmax or sigmoid, float32 [B, C], for preprocessed signals [B, C, *size].

        Of several views, [B, V, C, *size], the probabilities are averaged, as VideoMAE's public code does.
        """

        def logits(x: Tensor) -> Tensor:
            return self.objective.logits({"signal": x.to(self.encoder.device, torch.float32)}).float()

        scores = over_views(logits, signal, self.encoder.axes, self.encoder.most_signals)
        if scores.ndim == 2:
            return scores
        if self.multi_label:
            return scores.sigmoid().mean(1).logit()
        return scores.log_softmax(2).logsumexp(1) - math.log(scores.shape[1])

    def fingerprint(self) -> str:
        """Return a SHA-256 over encoder, head and classes."""
        return digest(self.objective.head.state_dict(), f"{self.encoder.fingerprint()} {json.dumps(self.classes)}")


def save_classifier(folder: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a head's tensors and ``facts`` (see ``Keeps.kept``) into an encoder folder."""
    write_head(
        folder,
        NAME,
        facts,
        tensors,
        f"a classifier of {len(facts['classes'])} classes",
        "`mmssl predict this/folder FILE...`, or\n\n"
        '```python\nfrom mmssl import Classifier\nclassify = Classifier("this/folder")\n'
        'classify("a-file")  # [{"label": ..., "score": ...}, ...], best first\n```',
    )
