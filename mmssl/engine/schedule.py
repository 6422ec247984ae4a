"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up to ``peak``, then half a cosine down to ``floor`` (SGDR, arXiv:1608.03983, eq. 5)."""

    peak: float
    steps: int
    warmup: int = 0
    floor: float = 0.0

    def __call__(self, step: int) -> float:
        """Return the learning rate of the 0-based ``step``."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.floor + (self.peak - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
