"""An exponential moving average of the weights."""

from collections.abc import Sequence

import torch
from torch import Tensor


class EMA:
    """Averages of tensors that are updated in place: ``average <- decay * average + (1 - decay) * tensor``.

    Each average is linear in the weights, so an engine may average whatever part of them lives on its rank.
    """

    def __init__(self, tensors: Sequence[Tensor], decay: float) -> None:
        self.tensors, self.decay = list(tensors), decay
        self.averages = [tensor.detach().clone() for tensor in tensors]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages one optimiser step along."""
        torch._foreach_lerp_(self.averages, self.tensors, 1 - self.decay)
