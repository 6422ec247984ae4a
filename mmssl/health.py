"""What an encoder's vectors look like while it trains: whether they still differ from each other, and in how many ways.

A joint embedding can satisfy its loss by saying the same of everything, or nearly; the loss alone does not show it. The
numbers are those of the vectors that the encoders made anyway in a step's forward pass.

Shape legend: n samples, D width of a vector, B samples of a micro-batch, K tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.contracts import Batch, EncoderModule, Objective
from mmssl.distributed import Council, World

MOST = 256
"""Samples that are looked at: the first of the whole batch, on whatever ranks they are, so that the numbers are those
of one process."""
NOISE = 1e-6
"""Singular values below this share of all vectors' length are rounding."""


def effective_rank(vectors: Tensor) -> float:
    """Return in how many directions vectors [n, D] spread: at most min(n - 1, D), and 0 where all are equal.

    It is the exponential of the entropy of the normalised singular values (Roy and Vetterli, EUSIPCO 2007), here of
    what differs from the mean. RankMe (arXiv:2210.02885) found that it goes with how well a frozen encoder does.
    """
    x = vectors.double()
    centred = x - x.mean(0)
    gram = centred @ centred.T if len(x) < x.shape[1] else centred.T @ centred
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    values = values[values > NOISE * x.norm()]
    share = values / values.sum()
    return float(torch.exp(-(share * share.log()).sum())) if len(values) else 0.0


def deviation(vectors: Tensor) -> float:
    """Return how much vectors [n, D] of length 1 differ: the mean of their values' deviations, times D ** 0.5.

    About 1 where directions are even, and 0 where all are the same (SimSiam, arXiv:2011.10566, section 4.1).
    """
    unit = F.normalize(vectors.double(), dim=1)
    return float(unit.std(0, correction=0).mean() * vectors.shape[1] ** 0.5)


class Features:
    """Catches the encoders' vectors in the forward passes of the steps that a line of metrics is written after.

    It hangs on modules, so it sees what is computed under every engine, ZeRO stage and with activation checkpointing.
    In other steps it does nothing.
    """

    def __init__(self, objective: nn.Module, me: World, council: Council, due: Callable[[int], bool]) -> None:
        """``due`` tells whether a line follows after so many steps."""
        self.me, self.council, self.due = me, council, due
        self.armed = False
        self.metrics: dict[str, float] = {}
        """Of the last step that was looked at."""
        self._wanted: list[int] = []
        """Samples of each micro-batch so far that are among the first of the whole batch."""
        self._seen: list[dict[str, list[Tensor]]] = []
        objective.register_forward_pre_hook(self._begin)
        self.encoders = cast(Objective, objective).encoders()
        for name, encoder in self.encoders.items():
            self._attach(name, encoder)

    def _attach(self, name: str, encoder: EncoderModule) -> None:
        # Objectives may call an encoder's parts instead of itself. What it gives comes out of its backbone, or where it
        # gives embedded patches, goes into it or comes from the encoder.
        backbone = cast(nn.Module, encoder.backbone)

        def made(_module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            self._note(name, output, args[1] if len(args) > 1 else kwargs.get("pad"))

        def read(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self._note(name, args[0], args[1] if len(args) > 1 else kwargs.get("pad"))

        def given(_module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            self._note(name, output, args[4] if len(args) > 4 else kwargs.get("pad"))

        if encoder.output == "context":
            backbone.register_forward_hook(made, with_kwargs=True)
        else:
            backbone.register_forward_pre_hook(read, with_kwargs=True)
            cast(nn.Module, encoder).register_forward_hook(given, with_kwargs=True)

    def before(self, step: int) -> None:
        """Get ready for a step, after this many."""
        self.armed = self.due(step + 1)
        self._wanted, self._seen = [], []

    def _begin(self, _module: nn.Module, args: tuple[Batch, ...]) -> None:
        if self.armed:
            count = len(args[0]["index"])
            first = (len(self._wanted) * self.me.size + self.me.rank) * count
            self._wanted.append(max(0, min(count, MOST - first)))
            self._seen.append({name: [] for name in self.encoders})

    def _note(self, name: str, tokens: Tensor, pad: Tensor | None) -> None:
        if not self.armed or not self._seen:
            return
        parts = self._seen[-1][name]
        # Further looks at the same samples (a past frame, checkpointing in the backward pass) find all rows there.
        missing = self._wanted[-1] - sum(map(len, parts))
        if missing > 0:
            encoder = self.encoders[name]
            pad = None if pad is None else pad[:, encoder.num_prefix :]
            with torch.no_grad():
                parts.append(encoder.pool(tokens.detach(), pad)[:missing].float())

    def after(self, _step: int, micros: Sequence[Batch]) -> None:
        """Measure what was seen in the step that these micro-batches made. A collective where it was armed."""
        if not self.armed:
            return
        mine = {name: self._vectors(name, micros) for name in self.encoders}
        found = self.council.gather(mine)
        self.metrics = {}
        for name in self.encoders:
            parts = [part[name] for part in found if part[name] is not None]
            self.metrics |= measured(torch.cat(parts), "" if len(self.encoders) == 1 else f"{name}.") if parts else {}
        self.armed, self._wanted, self._seen = False, [], []

    def _vectors(self, name: str, micros: Sequence[Batch]) -> Tensor | None:
        rows = []
        for batch, seen in zip(micros, self._seen, strict=True):
            if seen[name]:
                vectors = torch.cat(seen[name])
                present = batch.get(f"{name}.present")
                rows.append(vectors if present is None else vectors[present[: len(vectors)]])
        return torch.cat(rows).cpu() if rows else None


def measured(vectors: Tensor, prefix: str = "") -> Mapping[str, float]:
    """Return the metrics of vectors [n, D]; none of fewer than two."""
    if len(vectors) < 2:
        return {}
    return {f"{prefix}health.rank": effective_rank(vectors), f"{prefix}health.std": deviation(vectors)}
