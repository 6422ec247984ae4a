"""Two gloo ranks for the tests that compare them with one process."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmssl.distributed import world
from mmssl.engine.deepspeed_setup import connect
from mmssl.launch import run


def on_ranks(walk: Callable[..., dict[str, Tensor]], *arguments: Any, size: int = 2) -> list[dict[str, Tensor]]:
    """Return what ``walk(rank, size, *arguments)`` found on each of ``size`` ranks that are joined."""
    found = run(_joined, (walk, arguments), size)
    return [{name: torch.from_numpy(value) for name, value in one.items()} for one in found]


def _joined(walk: Callable[..., dict[str, Tensor]], arguments: tuple[Any, ...]) -> dict[str, np.ndarray[Any, Any]]:
    me = world()
    connect(me, "cpu")
    return {name: value.detach().numpy() for name, value in walk(me.rank, me.size, *arguments).items()}
