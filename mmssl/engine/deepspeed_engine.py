"""The DeepSpeed engine: many processes, ZeRO stages 0 to 3, the same few methods as the plain one.

Importing this imports DeepSpeed: call ``mmssl.engine.deepspeed_setup.connect`` first.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from pydantic import ValidationError
from torch import Tensor, nn

from mmssl.contracts import Batch, Micros
from mmssl.engine import StepResult, zero
from mmssl.engine.deepspeed_setup import autocast_precision
from mmssl.engine.ema import EMA
from mmssl.engine.finite import FiniteGuard, NonFiniteSamples
from mmssl.engine.optim import clipped, set_lr
from mmssl.engine.precision import loss_scale, taken, unscale
from mmssl.engine.torch_engine import MOMENTS, layout, mean_result, persistent_buffers
from mmssl.errors import NonFiniteLoss, UserError
from mmssl.files import Shape


class DeepSpeedEngine:
    """Takes optimiser steps with DeepSpeed. Implements ``mmssl.engine.Engine``."""

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Mapping[str, Any],
        ema: float | None = None,
    ) -> None:
        """Hand ``objective`` and its AdamW to DeepSpeed, with the configuration that ``merge`` returned.

        All ranks start from rank 0's weights and buffers. Raises UserError where DeepSpeed refuses a key of the
        configuration.
        """
        self.objective = objective
        self.accumulate: int = config["gradient_accumulation_steps"]
        self.clip: float | None = config["gradient_clipping"] or None
        self.names = {parameter: name for name, parameter in objective.named_parameters()}
        # Without ZeRO, DeepSpeed clips but does not tell the norm; so there we clip.
        self.clips_here = config.get("zero_optimization", {}).get("stage", 0) == 0
        self.engine = _initialize(
            objective, optimizer, {**config, "gradient_clipping": 0.0 if self.clips_here else self.clip or 0.0}
        )
        self.device = torch.device(self.engine.device)
        for _, buffer in persistent_buffers(objective):
            dist.broadcast(buffer, 0)  # DeepSpeed does so with the parameters alone
        self.precision = autocast_precision(config) or "fp32"
        self.scale = loss_scale(self.precision)
        zero.take_over_scaling(self.engine, self.scale is not None)
        self.ema = EMA([zero.resident(p) for p in self.names], ema) if ema is not None else None
        self.guard = FiniteGuard(objective)

    def step(self, micros: Micros, lr: float) -> StepResult:
        """Take one optimiser step: accumulate over the micro-batches, reduce over the ranks, clip, AdamW, average."""
        assert len(micros) == self.accumulate
        set_lr(self.engine.optimizer, lr)
        factor = 1.0 if self.scale is None else self.scale.scale
        if self.scale is not None and not self.clips_here:
            self.engine.optimizer.override_loss_scale(factor)
        steps, norm, finite = [], None, True
        for i, batch in enumerate(micros):
            step = self.engine(batch)
            self._watch(step.loss, batch)
            # Divides by the number of micro-batches.
            self.engine.backward(step.loss * factor if self.clips_here else step.loss)
            if i == len(micros) - 1 and self.clips_here:
                finite, norm = self._finish_gradient()
            self.engine.step()  # but for the last micro-batch, only counts
            steps.append(step)
        finite = finite and self.engine.was_step_applied()
        if not finite and self.scale is None:
            raise NonFiniteLoss("the gradient is not finite although the loss is; the weights were not updated")
        if not self.clips_here and self.engine.get_global_grad_norm() is not None:
            norm = torch.as_tensor(self.engine.get_global_grad_norm(), device=self.device)
        if self.ema is not None and finite:
            self.ema.update()
        return mean_result(steps, norm, {} if self.scale is None else self.scale.update(finite))

    def _finish_gradient(self) -> tuple[bool, Tensor | None]:
        # Without ZeRO the gradients are whole, and the same on every rank.
        finite = self.scale is None or unscale(self.names, self.scale)
        norm = clipped(self.names, self.clip)
        if not finite:
            self.engine.zero_grad()  # the optimiser leaves alone what has no gradient
        return finite, norm

    def _watch(self, loss: Tensor, batch: Batch) -> None:
        # All ranks look at the sum of their losses, so that they stop together: one that raised alone would leave the
        # others waiting for it in the backward pass.
        total = loss.detach().clone()
        dist.all_reduce(total)
        try:
            self.guard.watch(total, batch)
        except NonFiniteSamples as error:
            raise self._blame(error) from None

    def _blame(self, error: NonFiniteSamples) -> NonFiniteSamples:
        # A rank whose own batch was fine finds nothing but the sum to be bad.
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (error.tensor, error.samples))
        guilty = [one for one in found if one[0] != "the loss itself"] or found
        return NonFiniteSamples(float("nan"), guilty[0][0], [index for _, samples in guilty for index in samples])

    def whole(self) -> AbstractContextManager[None]:
        """Return a context in which stage 3 has gathered all parameters. A collective, and so is leaving it."""
        return deepspeed.zero.GatheredParameters(list(self.names))  # type: ignore[no-any-return]

    def layout(self) -> dict[str, Shape]:
        """Return what ``state`` will yield; see ``Engine.layout``."""
        moments = MOMENTS if self._stepped else ()
        return layout(
            self.objective, zero.full_shape, lambda p: moments if p.requires_grad else (), self.ema is not None
        )

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters, moments, averages and buffers; see ``Engine.state``."""
        self.guard.settle()
        averages = self.ema.averages if self.ema is not None else [None] * len(self.names)
        if self._stepped:
            zero.link_moments(self.engine.optimizer)
        for (parameter, name), average in zip(self.names.items(), averages, strict=True):
            yield f"param/{name}", zero.whole(parameter, zero.resident(parameter), self.device)
            for key in MOMENTS if self._stepped and parameter.requires_grad else ():
                yield f"{key}/{name}", zero.moment(self.engine.optimizer, parameter, key, self.device)
            if average is not None:
                yield f"ema/{name}", zero.whole(parameter, average, self.device)
        for name, buffer in persistent_buffers(self.objective):
            yield f"buffer/{name}", buffer

    @property
    def _stepped(self) -> bool:
        # Before the first step that was taken there are no moments.
        return taken(self.engine.global_steps, self.scale) > 0

    @torch.no_grad()
    def load(self, read: Callable[[str], Tensor], step: int) -> None:
        """Restore what ``state`` of any engine yielded after ``step`` optimiser steps."""
        self.guard.settle()
        optimizer, count = self.engine.optimizer, taken(step, self.scale)
        if count > 0:
            zero.make_moments(optimizer, count, MOMENTS)
        for index, (parameter, name) in enumerate(self.names.items()):
            zero.set_parameter(parameter, read(f"param/{name}").to(self.device))
            for key in MOMENTS if count > 0 and parameter.requires_grad else ():
                zero.set_moment(optimizer, parameter, key, read(f"{key}/{name}").to(self.device))
            if self.ema is not None:
                self.ema.averages[index].copy_(zero.share(parameter, read(f"ema/{name}")))
        zero.refresh(optimizer)
        for name, buffer in persistent_buffers(self.objective):
            buffer.copy_(read(f"buffer/{name}"))
        self.engine.global_steps = step
        self.engine.micro_steps = step * self.accumulate
        self.engine.global_samples = step * self.engine.train_batch_size()

    def close(self) -> None:
        """Check the last loss, and take DeepSpeed's hooks off the objective."""
        self.guard.settle()
        self.engine.destroy()


def _initialize(objective: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    with refusals():
        return deepspeed.initialize(model=objective, optimizer=optimizer, config=config, dist_init_required=False)[0]


def accept(config: Mapping[str, Any]) -> None:
    """Raise UserError where DeepSpeed refuses a key of the configuration that ``merge`` returned."""
    with refusals():
        DeepSpeedConfig(dict(config))


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what DeepSpeed says of a configuration that it refuses into a sentence."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"the DeepSpeed configuration: '{key}' in its {error.title}: {first['msg'].lower()}") from None
    except DeepSpeedConfigError as error:
        raise UserError(f"the DeepSpeed configuration: {error}") from None
