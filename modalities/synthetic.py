"""Training signals without files, for what is about the machinery: verifying ranks, measuring steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmssl.contracts import Size


@dataclass(frozen=True)
class Noise:
    """Makes of any path one sample per generator: each of ``keys`` is normal noise, float32 [channels, *size]."""

    keys: tuple[str, ...]
    channels: int

    def __call__(self, path: str, rngs: Sequence[np.random.Generator], size: Size) -> list[dict[str, Tensor]]:
        """Return the samples; what they are is drawn from their generators alone."""
        shape = (self.channels, *size)
        return [
            {key: torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) for key in self.keys} for rng in rngs
        ]
