"""Ranks for the tests that compare them with one process, and processes beside each other for what takes long."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmssl.distributed import world
from mmssl.engine.deepspeed_setup import connect
from mmssl.launch import free_port, run


def on_ranks(walk: Callable[..., dict[str, Tensor]], *arguments: Any, size: int = 2) -> list[dict[str, Tensor]]:
    """Return what ``walk(rank, size, *arguments)`` found on each of ``size`` ranks that are joined."""
    found = run(_joined, (walk, arguments), size)
    return [{name: torch.from_numpy(value) for name, value in one.items()} for one in found]


def _joined(walk: Callable[..., dict[str, Tensor]], arguments: tuple[Any, ...]) -> dict[str, np.ndarray[Any, Any]]:
    me = world()
    connect(me, "cpu")
    return {name: value.detach().numpy() for name, value in walk(me.rank, me.size, *arguments).items()}


def at_once(function: Callable[[Any], Any], cases: Sequence[Any], timeout: float = 300) -> list[Any]:
    """Return ``function(case)`` of each case, every one in a process of its own and all at the same time."""
    return run(_alone, (function, tuple(cases)), len(cases), timeout)


def _alone(function: Callable[[Any], Any], cases: tuple[Any, ...]) -> Any:
    case = cases[int(os.environ["RANK"])]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": free_port()}
    os.environ.update({name: str(value) for name, value in alone.items()})
    return function(case)
