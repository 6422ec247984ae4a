"""The engine: one loop, and two ways to take an optimiser step in it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmssl.contracts import Micros
from mmssl.engine.precision import LossScale, Precision
from mmssl.files import Shape


class StepResult(NamedTuple):
    """One optimiser step on this rank: the mean over its micro-batches, all tensors on the device, not yet reduced."""

    loss: Tensor
    metrics: dict[str, Tensor]
    grad_norm: Tensor | None
    """Global L2 norm of the gradient before clipping; None where it is not known, as of a step that was skipped."""


class Engine(Protocol):
    """Takes optimiser steps on an objective; ``torch`` and ``deepspeed`` do it behind the same few methods."""

    objective: nn.Module
    device: torch.device
    precision: Precision
    scale: LossScale | None
    """Of the loss, in fp16; it is restored before ``load``."""

    def step(self, micros: Micros, lr: float) -> StepResult:
        """Take one optimiser step on this rank's micro-batches at learning rate ``lr`` (times each group's scale)."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Return a context in which all parameters are whole on every rank, to be read. A collective."""
        ...

    def layout(self) -> dict[str, Shape]:
        """Return what ``state`` will yield, in its order, without the values."""
        ...

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the training state by name, whole and in fp32 (buffers as they are).

        A collective: every rank iterates over the same names in the same order and receives the same tensors, which are
        valid until the next one is asked for. Names are ``param/X``, ``exp_avg/X``, ``exp_avg_sq/X`` (of SGD and LARS
        ``momentum_buffer/X``), ``ema/X`` and ``buffer/X``, with X the name in ``objective``; they know nothing of
        engines, stages or ranks.
        """
        ...

    def load(self, read: Callable[[str], Tensor], step: int) -> None:
        """Restore the state after ``step`` optimiser steps from ``read(name)``. A collective."""
        ...

    def close(self) -> None:
        """Release what the engine holds."""
        ...
