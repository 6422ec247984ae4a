"""Weighted k-nearest neighbours on frozen features (Wu et al., arXiv:1805.01978, section 3.4; used so by DINO)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from mmssl.data.listing import Listing
from mmssl.errors import UserError
from tasks.features import ExtractOptions, Extractor, Samples, labelled_features
from tasks.metrics import Score, classification_scores, score_table, scores_as_dict

_LOW_BITS = 2**32 - 1


def neighbours(train: Tensor, test: Tensor, k: int, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Return the largest dot products of each row of ``test`` [m, d] with those of ``train`` [n, d], float32, exactly.

    (similarities float32 [m, k], training indices int64 [m, k]), best first, equal ones by the lower training index.
    Never holds more than ``chunk`` x ``chunk`` similarities. Raises ValueError if k is larger than n.
    """
    if not 1 <= k <= len(train):
        raise ValueError(f"k is {k}, but there are {len(train)} training samples")
    best = []
    for queries in test.split(chunk):
        keys = torch.empty(len(queries), 0, dtype=torch.int64, device=test.device)
        for first in range(0, len(train), chunk):
            fresh = _keys(queries @ train[first : first + chunk].T, first)
            keys = torch.cat([keys, fresh], dim=1)
            keys = keys.topk(min(k, keys.shape[1])).values
        best.append(keys)
    keys = torch.cat(best)
    return _bits((keys >> 32).int()).view(torch.float32), _LOW_BITS - (keys & _LOW_BITS)


def _keys(similarity: Tensor, first: int) -> Tensor:
    # topk breaks ties as it likes. An integer that has the similarity above and the training index below makes every
    # candidate different, so that its choice is the same for any chunk size and device.
    index = torch.arange(first, first + similarity.shape[1], device=similarity.device)
    ordered = _bits((similarity + 0.0).view(torch.int32))  # + 0.0 makes -0.0 equal to 0.0
    return (ordered.long() << 32) | (_LOW_BITS - index)


def _bits(number: Tensor) -> Tensor:
    # Float bits compare as integers once all but the sign of the negative ones are flipped; it undoes itself.
    return number ^ ((number >> 31) & 0x7FFFFFFF)


def knn_scores(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    num_classes: int,
    k: Sequence[int],
    temperature: float = 0.07,
    chunk: int = 1024,
) -> dict[int, Tensor]:
    """Return for each k the class probabilities float32 [m, C] of ``test`` [m, d] by votes of its neighbours.

    A neighbour in ``train`` [n, d] votes for its label (int64 [n]) with exp(cosine similarity / temperature). Raises
    ValueError if a k is larger than n.
    """
    train, test = F.normalize(train.float(), dim=1), F.normalize(test.float(), dim=1)
    similarity, index = neighbours(train, test, max(k), chunk)
    labels = train_labels[index]
    # Relative to the best neighbour, so that a small temperature cannot overflow.
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    scores = {}
    for count in k:
        votes = torch.zeros(len(test), num_classes, device=test.device)
        votes.scatter_add_(1, labels[:, :count], weight[:, :count])
        scores[count] = votes / votes.sum(1, keepdim=True)
    return scores


@dataclass(frozen=True)
class KnnResult:
    """Scores for each k."""

    scores: dict[int, dict[str, Score]]
    temperature: float
    samples: Samples
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON; scores are fractions."""
        return {
            "task": "knn",
            "scores": {str(k): scores_as_dict(scores) for k, scores in self.scores.items()},
            "protocol": {"k": list(self.scores), "temperature": self.temperature, "similarity": "cosine"},
            **self.samples.as_dict(),
            "notes": self.notes,
        }

    def render(self, console: Console) -> None:
        """Print one table and what a reader must know."""
        console.print(score_table("k nearest neighbours", {f"k = {k}": scores for k, scores in self.scores.items()}))
        for line in [str(self.samples), *self.notes]:
            console.print(line, markup=False)


def knn(
    encoder: Extractor,
    train: Listing,
    test: Listing,
    label_column: str = "label",
    k: Sequence[int] = (10, 20, 100),
    temperature: float = 0.07,
    seed: int = 0,
    **options: Unpack[ExtractOptions],
) -> KnnResult:
    """Classify the test files by their nearest training files; ``seed`` is that of the intervals.

    A k larger than the training set is left out, and the result says so. Raises UserError for a k or a temperature that
    is not positive, and as ``labelled_features``.
    """
    if not k or min(k) < 1 or not 0 < temperature < math.inf:
        raise UserError(
            f"knn: every k and the temperature must be positive, but k is {list(k)}, temperature {temperature}"
        )
    known, queries, samples = labelled_features(encoder, train, test, label_column, **options)
    fitting, notes = _fitting(sorted(set(k)), samples.train)
    scores = knn_scores(
        known.vectors, known.targets, queries.vectors, len(samples.classes), fitting, temperature=temperature
    )
    measured = {count: classification_scores(votes, queries.targets, seed) for count, votes in scores.items()}
    return KnnResult(measured, temperature, samples, notes)


def _fitting(k: Sequence[int], train: int) -> tuple[list[int], list[str]]:
    fitting = [count for count in k if count <= train]
    too_large = ", ".join(str(count) for count in k if count > train)
    notes = [f"left out k = {too_large}: there are {train} training samples"] if too_large else []
    if not fitting:
        return [train], [*notes, f"used k = {train}, all of them"]
    return fitting, notes
