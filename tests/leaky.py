"""An objective for tests with all that ranks can get wrong in it: negatives, statistics, a teacher and a queue.

``objective.mistake`` plants one of the mistakes that people make. Importing this registers it, also in ranks that are
started with its ``references`` and ``compare``.
"""

from collections.abc import Mapping
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.config import ObjectiveConfig
from mmssl.contracts import Batch, EncoderModule, Progress, Step
from mmssl.data.dataset import Plan
from mmssl.distributed import all_gather, all_reduce, ranks
from mmssl.objectives import OBJECTIVES
from tasks import verify_ranks

DIM, QUEUE, MOMENTUM = 6, 24, 0.8

Mistake = Literal["none", "negatives", "statistics", "summed", "teacher", "queue"]


class LeakyConfig(ObjectiveConfig):
    """Its settings."""

    name: Literal["leaky"] = "leaky"
    mistake: Mistake = "none"

    def build(self, encoders: Mapping[str, EncoderModule]) -> "Leaky":
        """Make the objective around its one encoder."""
        (encoder,) = encoders.values()
        return Leaky(encoder, self.mistake)


OBJECTIVES["leaky"] = LeakyConfig


class Leaky(nn.Module):
    """A student is told from the other samples, and those of the queue, by what its teacher says of them."""

    inputs = ("signal",)

    def __init__(self, encoder: EncoderModule, mistake: Mistake) -> None:
        super().__init__()
        self.encoder, self.mistake = encoder, mistake
        self.head = nn.Linear(encoder.dim, DIM)
        self.register_buffer("teacher", self.head.weight.detach().clone())
        self.register_buffer("centre", torch.zeros(encoder.dim))
        self.register_buffer("queue", F.normalize(torch.randn(QUEUE, DIM), dim=1))
        self._seen: list[tuple[Tensor, Tensor]] = []

    def encoders(self) -> dict[str, EncoderModule]:
        """Return the encoder."""
        return {self.encoder.modality: self.encoder}

    def draw(self) -> None:
        """Return None: nothing is drawn."""

    def forward(self, batch: Batch) -> Step:
        """Return the loss of telling each row's own key from the others."""
        tokenizer = self.encoder.tokenizer
        pooled = self.encoder.pool(self.encoder(tokenizer.patches(batch), None, batch["seed"])).float()
        mine = len(pooled)
        everyone = 1 if self.mistake == "statistics" else ranks()
        total = (lambda x: x) if self.mistake == "statistics" else all_reduce
        mean = total(pooled.sum(0)) / (mine * everyone)
        spread = total((pooled - mean).square().sum(0)) / (mine * everyone)
        whitened = (pooled - mean) / (spread + 1e-3).sqrt()
        query = F.normalize(self.head(whitened), dim=1)
        with torch.no_grad():
            own = F.normalize((whitened - self.centre) @ self.teacher.T, dim=1)
            keys = own if self.mistake == "negatives" else all_gather(own)
            first = (batch["index"][:, None] == self._indices(batch)).int().argmax(1)
        logits = query @ torch.cat([keys, self.queue]).T / 0.2
        loss = F.cross_entropy(logits, first)
        if self.mistake == "summed":
            loss = loss * ranks() - (loss * (ranks() - 1)).detach()
        self._seen.append((whitened.detach(), own))
        return Step(loss, {})

    def _indices(self, batch: Batch) -> Tensor:
        return batch["index"] if self.mistake == "negatives" else all_gather(batch["index"])

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Move the teacher along, and remember the rows of this step: those of all ranks."""
        whitened, keys = (
            torch.cat([rows if self.mistake == "queue" else all_gather(rows) for rows in one])
            for one in zip(*self._seen, strict=True)
        )
        if self.mistake == "teacher":
            whitened = torch.cat([rows for rows, _ in self._seen])
        self.centre.lerp_(whitened.square().mean(0), 1 - MOMENTUM)
        self.teacher.lerp_(self.head.weight, 1 - MOMENTUM)
        self.queue.copy_(torch.cat([keys, self.queue])[:QUEUE])
        self._seen.clear()


def references(jobs: Any) -> Any:
    """Take the steps in this process, in which the objective is known."""
    return verify_ranks.references(jobs)


def compare(jobs: Any, found: Any, systems: Any) -> Any:
    """Take them on these ranks."""
    return verify_ranks.compare(jobs, found, systems)


def compare_same_samples(jobs: Any, found: Any, systems: Any) -> Any:
    """Take them on ranks that all read what the first one should."""
    make = Plan.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Plan, "__init__", lambda self, s, b, a, world, *more: make(self, s, b, a, world._replace(rank=0), *more)
        )
        return verify_ranks.compare(jobs, found, systems)
