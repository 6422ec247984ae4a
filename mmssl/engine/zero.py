"""Where DeepSpeed's ZeRO keeps a parameter and its AdamW moments on this rank, and how they become whole tensors again.

Stage 0 keeps everything on every rank; stages 1 and 2 keep parameters whole and cut the moments; stage 3 cuts both, a
parameter into equal shards (the last ones padded with zeros). Parameters are fp32 everywhere. Functions that return or
take whole tensors are collectives.
"""

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_get_local_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from mmssl.files import Shape


def take_over_scaling(engine: Any, scaled: bool) -> None:
    """Leave the scaling of losses in float16 to ``mmssl.engine.precision``, on all stages alike.

    DeepSpeed scales losses that torch's autocast made by a GradScaler per rank. The norm by which it clips has that
    scale still in it, and the state is in no checkpoint. What is left is the scale that ``override_loss_scale`` sets
    and the search for infinities, whose finding all ranks share.
    """
    engine.torch_autocast_z0_gradscaler = None
    if hasattr(engine.optimizer, "override_loss_scale"):
        engine.optimizer.torch_autocast_gradscaler = None
        engine.optimizer.check_grad_overflow = scaled
        engine.optimizer.loss_scaler.update_scale = lambda overflow: None  # it would only say that a step is skipped


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether stage 3 cut the parameter, so that between uses a rank holds only its shard."""
    return hasattr(parameter, "ds_tensor")


def full_shape(parameter: nn.Parameter) -> Shape:
    """Return what a parameter is as a whole."""
    return Shape("F32", tuple(parameter.ds_shape)) if is_sharded(parameter) else Shape.of(parameter)  # type: ignore[attr-defined]


def resident(parameter: nn.Parameter) -> Tensor:
    """Return what this rank always holds of a parameter, live: the shard [n] of stage 3, else the whole parameter."""
    return parameter.ds_tensor if is_sharded(parameter) else parameter  # type: ignore[attr-defined]


def whole(parameter: nn.Parameter, part: Tensor, device: torch.device) -> Tensor:
    """Return the whole tensor of which every rank has a ``part`` shaped as ``resident``. A collective."""
    if not is_sharded(parameter):
        return part.detach()
    p: Any = parameter
    shards = torch.empty(part.numel() * dist.get_world_size(p.ds_process_group), dtype=part.dtype, device=device)
    dist.all_gather_into_tensor(shards, part.to(device), group=p.ds_process_group)
    return shards[: p.ds_numel].view(p.ds_shape)


def share(parameter: nn.Parameter, full: Tensor) -> Tensor:
    """Return this rank's part of a whole tensor, shaped as ``resident``: the inverse of ``whole``."""
    if not is_sharded(parameter):
        return full
    p: Any = parameter
    size = p.ds_tensor.numel()
    part = full.flatten()[size * dist.get_rank(p.ds_process_group) :][:size]
    return nn.functional.pad(part, (0, size - part.numel()))


def set_parameter(parameter: nn.Parameter, full: Tensor) -> None:
    """Overwrite a parameter; ``refresh`` must follow when all of them are written."""
    resident(parameter).copy_(share(parameter, full))
    # Small parameters of stage 3 stay gathered between steps, and would otherwise be used with their old values.
    if is_sharded(parameter) and parameter.ds_status == ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
        parameter.data.copy_(full)


def refresh(optimizer: Any) -> None:
    """Copy the parameters into the flat fp32 buffers that a ZeRO optimiser steps on; stage 0 has none."""
    if hasattr(optimizer, "refresh_fp32_params"):
        optimizer.refresh_fp32_params()


def moment(optimizer: Any, parameter: nn.Parameter, key: str, device: torch.device) -> Tensor:
    """Return a whole AdamW moment, shaped as the parameter; ``link_moments`` comes first. A collective."""
    if is_sharded(parameter):
        return whole(parameter, safe_get_local_optimizer_state(parameter, key), device)
    if hasattr(parameter, "_hp_mapping"):
        return safe_get_full_optimizer_state(parameter, key)  # type: ignore[no-any-return]
    return optimizer.state[parameter][key]  # type: ignore[no-any-return]


def set_moment(optimizer: Any, parameter: nn.Parameter, key: str, full: Tensor) -> None:
    """Overwrite a moment; ``make_moments`` comes first."""
    if is_sharded(parameter):
        # Not safe_set_full_optimizer_state: it reads past the end of tensors that do not divide by the ranks.
        safe_set_local_optimizer_state(parameter, share(parameter, full), key)
    elif hasattr(parameter, "_hp_mapping"):
        safe_set_full_optimizer_state(parameter, full, key)
    else:
        optimizer.state[parameter][key].copy_(full)


def make_moments(optimizer: Any, step: int, keys: tuple[str, ...]) -> None:
    """Give the optimiser the state of ``step`` steps, its moments zero: ZeRO's have none before their first step."""
    base = getattr(optimizer, "optimizer", optimizer)
    for tensor in _stepped(optimizer):
        count = torch.tensor(float(step), device=tensor.device)
        base.state[tensor] = {"step": count, **{key: torch.zeros_like(tensor) for key in keys}}
    link_moments(optimizer)


def link_moments(optimizer: Any) -> None:
    """Map each parameter of stages 1 and 2 to its fragment of the optimiser's state.

    DeepSpeed does it once, in its first step and already after the first parameter group, where the state of the other
    groups does not exist yet; so it is done anew before moments are read or written.
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _stepped(optimizer: Any) -> list[Tensor]:
    # The tensors that the base optimiser sees, by stage: 3, then 1 and 2, then 0.
    for flat in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(optimizer, flat):
            return list(getattr(optimizer, flat))
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
