"""The precision of products, and the scale that keeps gradients in 16 bit from becoming zero.

Parameters and moments are fp32 in every precision; bf16 and fp16 autocast what they say. float16 has few exponents:
gradients below 6e-8 are zero in it. So the loss is multiplied by a scale before the backward pass, and the gradients
are divided by it afterwards; a step in which one becomes infinite by that is left out and the scale lowered
(Micikevicius et al., arXiv:1710.03740, section 3.2). The rule is the same for every engine, and so is what a checkpoint
holds of it.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmssl.errors import NonFiniteLoss

Precision = Literal["fp32", "bf16", "fp16"]

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LossScale:
    """The factor on the loss, and how many steps were left out for the sake of it.

    It doubles after ``PATIENCE`` good steps in a row and halves after a bad one, down to 1.
    """

    FIRST = 2.0**16
    PATIENCE = 2000
    LEAST, MOST = 1.0, 2.0**24

    def __init__(self) -> None:
        self.scale, self.good, self.skipped = self.FIRST, 0, 0

    def update(self, finite: bool) -> dict[str, float]:
        """Take note of whether a step's gradient was finite, and return what metrics say of the step.

        Raises NonFiniteLoss where it was not although the scale is the least.
        """
        metrics = {"loss_scale": self.scale, "skipped": float(not finite)}
        if not finite and self.scale <= self.LEAST:
            raise NonFiniteLoss(
                f"the gradient overflows float16 even at the least loss scale ({self.LEAST:g}), after {self.skipped} "
                "skipped steps; use train.precision=bf16 or fp32, or lower optim.lr"
            )
        if finite:
            self.good = (self.good + 1) % self.PATIENCE
            self.scale = min(self.MOST, self.scale * (1 if self.good else 2))
        else:
            self.scale, self.good, self.skipped = self.scale / 2, 0, self.skipped + 1
        return metrics

    def facts(self) -> dict[str, Any]:
        """Return where it stands, as JSON values, for checkpoints."""
        return {"scale": self.scale, "good": self.good, "skipped": self.skipped}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Go on from what ``facts`` returned."""
        self.scale, self.good, self.skipped = float(facts["scale"]), int(facts["good"]), int(facts["skipped"])


def loss_scale(precision: Precision) -> LossScale | None:
    """Return a new scale where the precision needs one."""
    return LossScale() if precision == "fp16" else None


def taken(step: int, scale: LossScale | None) -> int:
    """Return how many of ``step`` optimiser steps were taken: AdamW counts those alone."""
    return step - (0 if scale is None else scale.skipped)


@torch.no_grad()
def unscale(parameters: Iterable[nn.Parameter], scale: LossScale) -> bool:
    """Divide gradients by the scale; returns whether they are finite. Reading that waits for the device."""
    grads: list[Tensor] = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(grads, 1 / scale.scale)
    return bool(torch.stack([norm.isfinite() for norm in torch._foreach_norm(grads)]).all())
