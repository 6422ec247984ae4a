"""Facts about the ranks of a run, sums over them that carry gradients, and the little else they say to each other."""

import atexit
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from mmssl import srun
from mmssl.errors import MmsslError

LAUNCH_FACTS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class World(NamedTuple):
    """Where a process stands among the ranks of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that writes and talks."""
        return self.rank == 0


def launch_facts() -> dict[str, str]:
    """Return what the launcher (``deepspeed``, ``torchrun``, ``srun``) says, by torchrun's names; nothing without."""
    facts = {name: os.environ[name] for name in LAUNCH_FACTS if name in os.environ} | srun.facts(os.environ)
    if "LOCAL_SIZE" in os.environ:
        facts.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])  # deepspeed's name for it
    return facts


def world() -> World:
    """Return where the launcher put this process; alone where there is none."""
    facts = launch_facts()

    def fact(name: str, default: int) -> int:
        return int(facts.get(name, default))

    return World(fact("RANK", 0), fact("WORLD_SIZE", 1), fact("LOCAL_RANK", 0), fact("LOCAL_WORLD_SIZE", 1))


def launched() -> bool:
    """Whether a launcher started this process as one of its ranks, of which there may be one."""
    return "RANK" in launch_facts()


def ranks() -> int:
    """Return how many processes a collective reaches: 1 where none were joined."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def lost(error: BaseException) -> bool:
    """Whether an error means that a collective could not reach another rank."""
    words = ("gloo/transport", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def leave(code: int) -> NoReturn:
    """End this process with an exit code; exit handlers run and buffers are written, as with ``sys.exit``.

    Gloo's threads wake whoever waits for them before they let go of its tensors, for which they need the interpreter.
    While that is taken down they abort the process (SIGABRT), which a launcher takes for a failure of the whole run. So
    a process that has joined others does not take it down.
    """
    if not (dist.is_available() and dist.is_initialized()):
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # whoever reads has gone
            stream.flush()
    os._exit(code)


def all_reduce(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over the ranks, differentiably. A collective, and so is its backward pass.

    The gradient of a rank's tensor is the sum over the ranks of what each says of the total. So where engines average
    the ranks' losses and gradients, both are those of one process with the whole batch.
    """
    return tensor if ranks() == 1 else _SumOverRanks.apply(tensor)  # type: ignore[no-untyped-call]


def rank() -> int:
    """Return which of ``ranks()`` this is."""
    return dist.get_rank() if ranks() > 1 else 0


def all_gather(tensor: Tensor) -> Tensor:
    """Return the tensors [B, ...] of all ranks as one, [ranks * B, ...]; differentiable and collective as above."""
    return tensor if ranks() == 1 else _RowsOfRanks.apply(tensor)  # type: ignore[no-untyped-call]


class _RowsOfRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(ranks())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _summed(grad).chunk(ranks())[rank()]


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _summed(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _summed(grad)


def _summed(tensor: Tensor) -> Tensor:
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


class Council:
    """Decisions that all ranks must take together: every method is a collective and returns the same on each rank.

    Speaks gloo, so that deciding never waits for a GPU; with one rank it says nothing.
    """

    def __init__(self, size: int) -> None:
        self.group = None
        if size > 1:
            self.group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the element-wise sum over ranks."""
        if self.group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.group)
        return tensor.tolist()

    def mean(self, values: Tensor) -> Tensor:
        """Return the element-wise mean over ranks of a tensor, on the CPU in float64."""
        values = values.detach().double().cpu()
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
            values /= dist.get_world_size(self.group)
        return values

    def lead(self, me: World, action: Callable[[], None]) -> None:
        """Do something on rank 0 alone; what fails there (MmsslError, OSError) is raised on every rank."""
        problem: Exception | None = None
        if me.is_main:
            try:
                action()
            except (MmsslError, OSError) as error:
                problem = error
        if (problem := self.gather(problem)[0]) is not None:
            raise problem

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values
