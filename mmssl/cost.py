"""What a step costs before it is taken: operations and memory, from the real objective on tensors without data.

Fake tensors have shapes, types and lifetimes but no bytes. A training step on them allocates, keeps and frees what a
real one does, so that its memory can be added up in seconds for models and batches of any size.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmssl.backbones import positions
from mmssl.backbones.blocks import attention_kernel
from mmssl.contracts import Batch, Draw, Grid
from mmssl.losses.contrastive import one_tile

BYTES = 4
"""Weights, gradients and moments are fp32."""
FLAT_LIMIT = 500_000_000
"""DeepSpeed without ZeRO copies this many gradients at most into one tensor before it reduces them."""


@dataclass(frozen=True)
class Cost:
    """What one sample costs, and how many weights there are."""

    parameters: int
    gflop_forward: float
    """10^9 floating-point operations of one forward pass of one sample; a multiply and an add count as two.

    Those of the model: a spectrogram has no gradients, is made before it, and does not count.
    """

    @property
    def gflop_train(self) -> float:
        """Forward and backward: the backward pass multiplies twice as much."""
        return 3 * self.gflop_forward


def sample_batch(shapes: Mapping[str, tuple[int, ...]], draw: Draw | None, grid: Grid, device: str = "cpu") -> Batch:
    """Return a batch of one synthetic sample: its inputs [1, *shape] on ``device``, masks for the token grid."""
    rng = np.random.default_rng(0)
    batch: Batch = {
        **{name: torch.empty(1, *shape, device=device).normal_() for name, shape in shapes.items()},
        "index": torch.zeros(1, dtype=torch.int64),
        "seed": torch.zeros(1, dtype=torch.int64),
        "target": torch.zeros(1, dtype=torch.int64),
    }
    return batch | {name: torch.from_numpy(value)[None] for name, value in (draw(rng, grid) if draw else {}).items()}


def measure(objective: nn.Module, batch: Batch) -> Cost:
    """Count an objective's operations on a batch of one sample; its weights may be on any device, meta included."""
    with _fakes():
        state, fakes = _fake_state(objective), _fake_batch(batch, 1)
        # Counters see nothing of scaled_dot_product_attention on a CPU; the naive kernel is of products they do see.
        with attention_kernel("naive"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            functional_call(objective, state, (fakes,))
    return Cost(sum(p.numel() for p in objective.parameters()), counter.get_total_flops() / 1e9)


@dataclass(frozen=True)
class Footprint:
    """The bytes of one optimiser step in one process."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    """Of all trainable parameters."""
    batch: int
    """All micro-batches: they are on the device before the first of them is used."""
    activations: int
    """What a forward pass of one micro-batch leaves behind for the backward pass."""
    timeline: tuple[tuple[int, int], ...]
    """(finished gradients, everything else: activations and temporaries) after each allocation of the step."""

    def peak(self, share: float = 1.0) -> int:
        """Return the most that gradients, activations and temporaries take at once.

        ``share`` is the part of each gradient that this rank keeps once it is finished.
        """
        return max(int(share * gradients) + others for gradients, others in self.timeline)


def between(one: Footprint, other: Footprint, share: float) -> Footprint | None:
    """Return the footprint on the line from ``one`` (share 0) to ``other`` (1), without tracing it.

    A step on more samples makes the same tensors, larger in proportion. None where it does not make the same ones.
    """
    if len(one.timeline) != len(other.timeline):
        return None

    def mixed(a: int, b: int) -> int:
        return round(a + share * (b - a))

    return Footprint(
        one.weights,
        one.gradients,
        mixed(one.batch, other.batch),
        mixed(one.activations, other.activations),
        tuple((mixed(a[0], b[0]), mixed(a[1], b[1])) for a, b in zip(one.timeline, other.timeline, strict=True)),
    )


def footprint(objective: nn.Module, batch: Batch, samples: int, accumulate: int = 1, bf16: bool = False) -> Footprint:
    """Trace a training step of ``accumulate`` micro-batches of ``samples``, shaped as ``batch`` (of one sample).

    The attention kernel, activation checkpointing and the types that autocast chooses are those of training on a CPU,
    and taken to be the same on a GPU. ``torch.compile`` is not followed: the plan is for the model as it is written.
    """
    with _fakes():
        state, fakes = _fake_state(objective), _fake_batch(batch, samples)
        live = trace(objective, state, fakes, accumulate, bf16)
        trainable = [t for t in state.values() if t.requires_grad]
        return Footprint(
            weights=_bytes(state.values()),
            gradients=_bytes(trainable),
            batch=_bytes(fakes.values()) * accumulate,
            activations=live.after_forward,
            timeline=tuple(live.timeline),
        )


def trace(
    objective: nn.Module, state: Mapping[str, Tensor], batch: Batch, accumulate: int = 1, bf16: bool = False
) -> "Live":
    """Run forward and backward passes with the weights ``state``, fake or real, and return what they allocated."""
    live = Live([*state.values(), *batch.values()])
    for parameter in state.values():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(live.finished)
    with live:
        # From the second micro-batch on all is as in the second: the gradients of those before are there.
        functional_call(
            _Step(objective, live, min(accumulate, 2), bf16),
            {f"objective.{name}": tensor for name, tensor in state.items()},
            (batch,),
        )
    return live


class Live(TorchDispatchMode):
    """Follows the storages that operations make from their first appearance to their end, but for those ``outside``."""

    def __init__(self, outside: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._outside = {id(t.untyped_storage()): t.untyped_storage() for t in outside}
        self._seen: dict[int, Any] = {}
        self._finished: set[int] = set()
        self.gradients = self.others = self.after_forward = 0
        self.timeline: list[tuple[int, int]] = [(0, 0)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note the storages of what it returns."""
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._outside or key in self._seen:
            return
        self._seen[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.others += size
        self.timeline.append((self.gradients, self.others))

    def _forget(self, key: int, size: int) -> None:
        del self._seen[key]
        if key in self._finished:
            self._finished.remove(key)
            self.gradients -= size
        else:
            self.others -= size

    def finished(self, parameter: Tensor) -> None:
        """Count a parameter's gradient as finished."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        if id(storage) not in self._finished:
            self._finished.add(id(storage))
            self.others -= storage.nbytes()
            self.gradients += storage.nbytes()


class _Step(nn.Module):
    # A module, so that the backward passes run while functional_call's weights are in place: checkpointing needs them.
    def __init__(self, objective: nn.Module, live: Live, micros: int, bf16: bool) -> None:
        super().__init__()
        self.objective, self.live, self.micros, self.bf16 = objective, live, micros, bf16

    def forward(self, batch: Batch) -> None:
        for micro in range(self.micros):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                loss = self.objective(batch).loss
            if micro == 0:
                self.live.after_forward = self.live.others
            (loss / self.micros).backward()


@contextmanager
def _fakes() -> Iterator[None]:
    # Tables that a model computes with numpy are real, and may be mixed in; those it caches must not stay fake.
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), one_tile():
            yield
    finally:
        positions.resized_sincos.cache_clear()


def _fake_state(objective: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {
        name: nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
        for name, p in objective.named_parameters()
    }
    return state | {name: torch.empty(b.shape, dtype=b.dtype) for name, b in objective.named_buffers()}


def _fake_batch(batch: Batch, samples: int) -> Batch:
    return {name: torch.empty(samples, *value.shape[1:], dtype=value.dtype) for name, value in batch.items()}


def _bytes(tensors: Any) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


@dataclass(frozen=True)
class Sharding:
    """How DeepSpeed spreads the state of training over the ranks."""

    stage: int
    ranks: int
    offload: bool = False
    """Whether the optimiser and its state are in main memory."""
    bucket: int = 500_000_000
    """Gradients that are reduced together, in elements."""
    prefetch: int = 50_000_000
    """Stage 3: parameters gathered ahead, in elements."""

    @property
    def gradients(self) -> float:
        """The part of each finished gradient that a rank keeps on its device."""
        if self.stage < 2:
            return 1.0
        return 0.0 if self.offload else 1 / self.ranks

    @classmethod
    def of(cls, config: Mapping[str, Any], ranks: int) -> Self:
        """Read a DeepSpeed configuration; what it leaves out has DeepSpeed's defaults."""
        zero = config.get("zero_optimization", {})

        def elements(key: str, default: int) -> int:
            value = zero.get(key)
            return int(value) if isinstance(value, int | float) else default  # "auto"; DeepSpeed refuses the rest

        return cls(
            stage=zero.get("stage", 0),
            ranks=ranks,
            offload=(zero.get("offload_optimizer") or {}).get("device") == "cpu",
            bucket=elements("reduce_bucket_size", cls.bucket),
            prefetch=elements("stage3_prefetch_bucket_size", cls.prefetch),
        )


@dataclass(frozen=True)
class Memory:
    """The bytes that training takes at its peak, in one process and on its device.

    The interpreter, the libraries, the data workers and what the allocator holds back come on top.
    """

    weights: int
    moments: int
    averages: int
    batch: int
    buffers: int
    """What DeepSpeed holds besides: the fp32 copy that it steps on, flat gradients, buckets."""
    step: int
    """Gradients, activations, temporaries and gathered parameters at the moment when together they take most."""
    host: int = 0
    """In main memory per rank, where the optimiser is offloaded; not part of ``total``."""

    @property
    def total(self) -> int:
        """All that is on the device."""
        return self.weights + self.moments + self.averages + self.batch + self.buffers + self.step


def plan(foot: Footprint, moments: int, averaged: bool, sharding: Sharding | None = None) -> Memory:
    """Plan the memory of a step with ``moments`` tensors of optimiser state per weight; no ``sharding``: torch engine.

    What DeepSpeed 0.19 allocates at each stage was read in its source and measured on two ranks (benchmarks/memory.py).
    """
    gradients = foot.gradients
    averages = foot.weights if averaged else 0
    memory = Memory(foot.weights, moments * gradients, averages, foot.batch, buffers=0, step=foot.peak())
    if sharding is None:
        return memory
    if sharding.stage == 0:
        reduced = gradients + min(gradients, BYTES * FLAT_LIMIT)
        return replace(memory, step=max(memory.step, reduced))
    part = gradients // sharding.ranks
    memory = replace(memory, moments=moments * part)
    memory = _stage_3(memory, foot, part, sharding) if sharding.stage == 3 else _stage_1_2(memory, foot, part, sharding)
    # Moments, the fp32 copy and gradients twice: as they arrive and as they are stepped on.
    return replace(memory, moments=0, host=(moments + 3) * part) if sharding.offload else memory


def _stage_1_2(memory: Memory, foot: Footprint, part: int, sharding: Sharding) -> Memory:
    mine = 0 if sharding.offload else part
    kept = 1.0 if sharding.stage == 1 else mine / foot.gradients
    backward = foot.peak(kept) + BYTES * sharding.bucket
    return replace(memory, buffers=mine, step=max(backward, 2 * mine))


def _stage_3(memory: Memory, foot: Footprint, part: int, sharding: Sharding) -> Memory:
    mine = 0 if sharding.offload else part
    # All parameters stay gathered from the forward to the backward pass, since autograd holds them. Only activation
    # checkpointing, with a low stage3_max_live_parameters and stage3_max_reuse_distance (1e9 both), lets them go.
    gathered = foot.weights + min(foot.weights, BYTES * sharding.prefetch)
    return replace(
        memory,
        weights=foot.weights // sharding.ranks,
        averages=memory.averages // sharding.ranks,
        buffers=2 * mine + BYTES * sharding.bucket,
        step=max(foot.peak(0) + gathered, mine),
    )
