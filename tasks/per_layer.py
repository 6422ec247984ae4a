"""The linear probe on every block of a frozen encoder: where in the network the classes become separable.

Layers are numbered from 1, the first block, to the last, which is the encoder's own output; each is put through the
encoder's final norm, where there is one, and pooled as the encoder pools. There is no layer 0: a class token that has
not met a block is the same vector for every picture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from rich.console import Console
from torch import Tensor

from mmssl.data.listing import Listing
from modalities.encoder import Encoder
from modalities.views import over_views
from tasks.features import ExtractOptions, Labelled, labelled_features
from tasks.linear_probe import ProbeResult, probe_features
from tasks.metrics import Score, score_table, scores_as_dict
from tasks.report import Curve, Section, Table, Words, write_report


class Layers:
    """Stands in for an encoder where features are extracted: the pooled outputs of all blocks, behind each other.

    So each file is read and encoded once for all layers, and they are cached together.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder.eval()
        self.decode: Callable[[str], Any] = encoder.decode
        self.transform: Callable[[Any], Tensor] = encoder.transform
        self.batch_size = encoder.batch_size

    @torch.no_grad()
    def features(self, signal: Tensor) -> Tensor:
        """Return float32 [B, layers * dim] for signals [B, C, *size]."""
        encoder = self._encoder

        def layers(x: Tensor) -> Tensor:
            batch = {"signal": x.to(encoder.device, torch.float32)}
            pad = encoder.tokenizer.pad(batch)
            return torch.cat([encoder.pool(output, pad).float() for output in encoder.layers(batch)], dim=1)

        vectors = over_views(layers, signal, encoder.axes, encoder.most_signals)
        return vectors.mean(1) if vectors.ndim == 3 else vectors

    def fingerprint(self) -> str:
        """Return a text that depends on the encoder, and is not the encoder's own."""
        return f"layers {self._encoder.fingerprint()}"


@dataclass(frozen=True)
class PerLayerResult:
    """The result of every layer, the first block's first."""

    layers: list[ProbeResult]
    normed: bool = True
    """Whether the encoder has a final norm, through which every layer went."""

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON; scores are fractions."""
        rows = [
            {"layer": i, "scores": scores_as_dict(result.scores), **result.outcome(), "notes": result.notes}
            for i, result in enumerate(self.layers, 1)
        ]
        last = self.layers[-1]
        return {
            "task": "linear-probe",
            "protocol": {**last.settings(), "per_layer": True},
            "layers": rows,
            **last.samples.as_dict(),
        }

    def render(self, console: Console) -> None:
        """Print one table with a row per layer and what a reader must know."""
        rows = {self._name(i): result.scores for i, result in enumerate(self.layers, 1)}
        console.print(score_table("Linear probe by layer, protocol logistic", rows))
        for line in self._lines():
            console.print(line, markup=False, highlight=False)

    def write(self, path: Path) -> None:
        """Write an HTML page with the accuracy by layer as a curve and as a table."""
        metrics = list(self.layers[-1].scores)
        numbers = list(range(1, len(self.layers) + 1))
        series: dict[str, tuple[Sequence[float], Sequence[float]]] = {
            metric.replace("_", " "): (numbers, [result.scores[metric].value for result in self.layers])
            for metric in metrics
        }
        rows: list[list[str | Score]] = [
            [self._name(i), *(result.scores[metric] for metric in metrics)] for i, result in enumerate(self.layers, 1)
        ]
        note = f"On {self.layers[-1].samples.test} test files, with 95 % bootstrap intervals."
        sections: list[Section] = [
            Curve("Accuracy by layer", "layer", "accuracy", series, percent=True),
            Table("Scores", note, ["layer", *series], rows),
            Words("Protocol", "\n\n".join(self._lines())),
        ]
        first, last = (result.scores["top1"].value for result in (self.layers[0], self.layers[-1]))
        title = f"Linear probe by layer: {first:.1%} after the first block, {last:.1%} after the last"
        write_report(path, title, str(self.layers[-1].samples), sections)

    def _name(self, layer: int) -> str:
        return f"{layer} (the encoder's output)" if layer == len(self.layers) else str(layer)

    def _lines(self) -> list[str]:
        last = self.layers[-1]
        norm = "goes through the encoder's final norm and " if self.normed else ""
        how = f"every layer {norm}is pooled as the encoder pools"
        notes = [f"layer {i}: {note}" for i, result in enumerate(self.layers, 1) for note in result.notes]
        return [str(last.samples), last.describe(), how, *notes]


def per_layer_probe(
    encoder: Encoder,
    train: Listing,
    test: Listing,
    label_column: str = "label",
    seed: int = 0,
    **options: Unpack[ExtractOptions],
) -> PerLayerResult:
    """Fit a linear classifier on each block's pooled output, and score it on the test files.

    One pass over the files computes all of them. Arguments and errors are those of ``linear_probe``.
    """
    known, queries, samples = labelled_features(Layers(encoder), train, test, label_column, **options)
    pairs = zip(known.vectors.split(encoder.dim, 1), queries.vectors.split(encoder.dim, 1), strict=True)
    return PerLayerResult(
        [
            probe_features(Labelled(fit, known.targets), Labelled(score, queries.targets), samples, seed)
            for fit, score in pairs
        ],
        normed=encoder.output != "latent" and hasattr(encoder.backbone, "norm"),
    )
