"""Stopping at the first NaN or infinity with the step, the samples and the first bad tensor named."""

from typing import Any

import torch
from torch import Tensor, nn

from mmssl.contracts import Batch
from mmssl.errors import NonFiniteLoss


class FiniteGuard:
    """Watches losses. On a CPU a bad one raises before it is backpropagated; on a GPU one step later, so that looking
    never waits for the device (no checkpoint is written in between: ``settle`` is called first).
    """

    def __init__(self, objective: nn.Module) -> None:
        self.objective = objective
        self._pending: tuple[Tensor, Batch] | None = None

    def watch(self, loss: Tensor, batch: Batch) -> None:
        """Look at a loss; raises NonFiniteLoss (with ``samples``, the global indices) for a bad one."""
        pending, self._pending = self._pending, (loss.detach(), batch)
        if loss.device.type == "cpu":
            self.settle()
        elif pending is not None:
            self._check(*pending)

    def settle(self) -> None:
        """Look at what is still pending."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._check(*pending)

    def _check(self, loss: Tensor, batch: Batch) -> None:
        if not torch.isfinite(loss):
            raise NonFiniteSamples(loss.item(), first_bad(self.objective, batch), batch["index"].tolist())


class NonFiniteSamples(NonFiniteLoss):
    """A bad loss, with the sample indices for the loop to turn into names."""

    def __init__(self, loss: float, tensor: str, samples: list[int]) -> None:
        super().__init__(f"the loss is {loss}; the first bad tensor is {tensor}")
        self.tensor, self.samples = tensor, samples


@torch.no_grad()
def first_bad(objective: nn.Module, batch: Batch) -> str:
    """Name the first tensor that is not finite: in the batch, the weights, or the modules' outputs in forward order."""

    def bad(value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all())

    found = [f"the batch's '{name}'" for name, value in batch.items() if bad(value)]
    found += [f"the weight {name}" for name, parameter in objective.named_parameters() if bad(parameter)]

    def look(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if any(bad(value) for value in (output if isinstance(output, tuple) else (output,))):
                found.append(f"the output of {name}")

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in objective.named_modules() if name]
    try:
        objective(batch)  # always: where weights are spread over ranks, it takes all of them
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "the loss itself"
