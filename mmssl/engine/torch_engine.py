"""The plain engine: one process, one device, no DeepSpeed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from mmssl.contracts import Micros, Step
from mmssl.engine import StepResult
from mmssl.engine.ema import EMA
from mmssl.engine.finite import FiniteGuard
from mmssl.engine.optim import ADAMW_STATE, clipped, set_lr, state_names
from mmssl.engine.precision import DTYPES, Precision, loss_scale, taken, unscale
from mmssl.files import Shape

MOMENTS = ADAMW_STATE


class TorchEngine:
    """Takes optimiser steps with plain PyTorch. Implements ``mmssl.engine.Engine``."""

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        precision: Precision = "fp32",
        clip: float | None = None,
        ema: float | None = None,
        compile: bool = False,
    ) -> None:
        self.objective, self.optimizer, self.device = objective, optimizer, device
        self.precision, self.clip, self.scale = precision, clip, loss_scale(precision)
        self.names = {parameter: name for name, parameter in objective.named_parameters()}
        self.ema = EMA([p.data for p in self.names], ema) if ema is not None else None
        self.guard = FiniteGuard(objective)
        self.kept = state_names(optimizer)
        if compile:
            objective.compile()

    def step(self, micros: Micros, lr: float) -> StepResult:
        """Take one optimiser step: accumulate over the micro-batches, clip, step, average."""
        steps = []
        factor = 1.0 if self.scale is None else self.scale.scale
        for batch in micros:
            with torch.autocast(self.device.type, DTYPES[self.precision], enabled=self.precision != "fp32"):
                step = self.objective(batch)
            self.guard.watch(step.loss, batch)
            (step.loss * factor / len(micros)).backward()
            steps.append(step)
        finite = self.scale is None or unscale(self.names, self.scale)
        norm = clipped(self.names, self.clip)
        if finite:
            set_lr(self.optimizer, lr)
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update()
        self.optimizer.zero_grad(set_to_none=True)
        return mean_result(steps, norm, {} if self.scale is None else self.scale.update(finite))

    def whole(self) -> AbstractContextManager[None]:
        """Return a context that does nothing: parameters are whole always."""
        return nullcontext()

    def layout(self) -> dict[str, Shape]:
        """Return what ``state`` will yield; see ``Engine.layout``."""
        stepped = self.optimizer.state
        return layout(self.objective, Shape.of, lambda p: self.kept if p in stepped else (), self.ema is not None)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters, moments, averages and buffers; see ``Engine.state``."""
        self.guard.settle()
        averages = self.ema.averages if self.ema is not None else [None] * len(self.names)
        for (parameter, name), average in zip(self.names.items(), averages, strict=True):
            yield f"param/{name}", parameter.data
            for key in self.kept if parameter in self.optimizer.state else ():
                yield f"{key}/{name}", self.optimizer.state[parameter][key]
            if average is not None:
                yield f"ema/{name}", average
        for name, buffer in persistent_buffers(self.objective):
            yield f"buffer/{name}", buffer

    @torch.no_grad()
    def load(self, read: Callable[[str], Tensor], step: int) -> None:
        """Restore what ``state`` yielded after ``step`` optimiser steps."""
        count = taken(step, self.scale)
        for index, (parameter, name) in enumerate(self.names.items()):
            parameter.copy_(read(f"param/{name}"))
            if count > 0 and parameter.requires_grad:
                state = {key: read(f"{key}/{name}").to(self.device) for key in self.kept}
                if self.kept == ADAMW_STATE:
                    state["step"] = torch.tensor(float(count), device=self.device)
                self.optimizer.state[parameter] = state
            if self.ema is not None:
                self.ema.averages[index].copy_(read(f"ema/{name}"))
        for name, buffer in persistent_buffers(self.objective):
            buffer.copy_(read(f"buffer/{name}"))

    def close(self) -> None:
        """Nothing is held."""


def mean_result(steps: list[Step], grad_norm: Tensor | None, more: Mapping[str, float]) -> StepResult:
    """Average the micro-batches of one optimiser step, and add ``more`` metrics of the step as a whole."""
    losses = torch.stack([step.loss.detach() for step in steps])
    metrics = {key: torch.stack([step.metrics[key] for step in steps]).mean() for key in steps[0].metrics}
    metrics |= {key: torch.tensor(value, device=losses.device) for key, value in more.items()}
    return StepResult(losses.mean(), metrics, grad_norm)


def layout(
    objective: nn.Module,
    shape: Callable[[nn.Parameter], Shape],
    moments: Callable[[nn.Parameter], Sequence[str]],
    averaged: bool,
) -> dict[str, Shape]:
    """Return what an engine's ``state`` yields, given the shape and the names of the moments of each parameter."""
    found: dict[str, Shape] = {}
    for name, parameter in objective.named_parameters():
        kinds = ("param", *moments(parameter), *(("ema",) if averaged else ()))
        found |= {f"{kind}/{name}": shape(parameter) for kind in kinds}
    return found | {f"buffer/{name}": Shape.of(buffer) for name, buffer in persistent_buffers(objective)}


def persistent_buffers(objective: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that belong to the training state (teachers, queues), not tables that are recomputed."""
    kept = objective.state_dict().keys()
    return ((name, buffer) for name, buffer in objective.named_buffers() if name in kept)
