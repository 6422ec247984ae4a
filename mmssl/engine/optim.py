"""The optimisers and their parameter groups: no decay for vectors, a learning rate that decays towards the input."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

UNDECAYED = ("cls_token", "mask_token", "positions.table")


def param_groups(
    objective: nn.Module, weight_decay: float, layer_decay: float = 1.0, depth: int = 0
) -> list[dict[str, Any]]:
    """Return optimiser groups over the trainable parameters, in a fixed order.

    Biases, norm gains and other vectors, class and mask tokens and position tables are not decayed. ``layer_decay`` L
    scales the learning rate of layer i of ``depth`` blocks by ``L ** (depth + 1 - i)``: the tokenizer is layer 0, the
    head (anything outside the encoder) layer depth + 1 (BEiT, arXiv:2106.08254, appendix). The scale is each group's
    ``lr_scale``.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim < 2 or name.endswith(UNDECAYED) else weight_decay
        scale = layer_decay ** (depth + 1 - layer_of(name, depth))
        group = groups.setdefault((decay, scale), {"params": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
    return list(groups.values())


def layer_of(name: str, depth: int) -> int:
    """Return a parameter's layer by its name in the objective: 0 tokenizer, 1 to depth blocks, depth + 1 the rest.

    What maps tokens to the width of the blocks belongs to the tokenizer.
    """
    block = re.search(r"backbone\.blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return 0 if re.search(r"(^|\.)(_?tokenizer|cls_token|backbone\.(reader|pre_norm))\b", name) else depth + 1


def adamw(groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """Return fused AdamW (one pass over memory: 5 x the foreach one on CPU); ``set_lr`` sets the learning rate."""
    return torch.optim.AdamW(list(groups), lr=0.0, betas=betas, eps=eps, fused=True)


def sgd(groups: Iterable[dict[str, Any]], momentum: float) -> torch.optim.SGD:
    """Return stochastic gradient descent with momentum; decay is added to the gradient, not decoupled."""
    return torch.optim.SGD(list(groups), lr=0.0, momentum=momentum)


class LARS(torch.optim.Optimizer):
    """Momentum SGD with a learning rate per layer (arXiv:1708.03888, algorithm 1), as MAE's linear probe has it.

    A matrix w with gradient g and decay b moves along v <- m v + r (g + b w), with r = trust |w| / |g + b w|, or 1
    where either norm is 0. As in MAE's code and unlike the paper's formula, the norm of the sum stands below the line,
    the learning rate is outside of v, and vectors (biases, gains) have r = 1.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float = 0.9, trust: float = 0.001) -> None:
        super().__init__(list(groups), {"lr": 0.0, "momentum": momentum, "weight_decay": 0.0, "trust": trust})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step; never waits for the device."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad.add(parameter, alpha=group["weight_decay"])
                if parameter.ndim > 1:
                    weight, norm = parameter.norm(), update.norm()
                    scale = group["trust"] * weight / norm
                    update *= scale.where((weight > 0) & (norm > 0), 1.0)
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                parameter.add_(velocity, alpha=-group["lr"])


ADAMW_STATE = ("exp_avg", "exp_avg_sq")


def state_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Return the names of the tensors that an optimiser keeps per parameter, besides AdamW's count of steps."""
    if isinstance(optimizer, torch.optim.AdamW):
        return ADAMW_STATE
    # torch's SGD keeps nothing where there is no momentum.
    return ("momentum_buffer",) if optimizer.defaults["momentum"] > 0 else ()


def clipped(parameters: Iterable[nn.Parameter], most: float | None) -> Tensor:
    """Scale the gradient down to an L2 norm of ``most`` if it is longer; returns what it was."""
    parameters = list(parameters)
    if most is not None:
        return nn.utils.clip_grad_norm_(parameters, most)
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def set_lr(optimizer: Any, lr: float) -> None:
    """Give every group its learning rate: ``lr`` times its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
