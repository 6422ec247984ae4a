"""AdamW and its parameter groups: no decay for vectors, a learning rate that decays towards the input."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

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
    """Return a parameter's layer by its name in the objective: 0 tokenizer, 1 to depth blocks, depth + 1 the rest."""
    block = re.search(r"backbone\.blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return 0 if re.search(r"(^|\.)(_?tokenizer|cls_token)\b", name) else depth + 1


def adamw(groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """Return fused AdamW (one pass over memory: 5 x the foreach one on CPU); ``set_lr`` sets the learning rate."""
    return torch.optim.AdamW(list(groups), lr=0.0, betas=betas, eps=eps, fused=True)


def set_lr(optimizer: Any, lr: float) -> None:
    """Give every group its learning rate: ``lr`` times its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
