"""What a step costs before it is taken: FLOPs and memory, from one sample run through the real objective."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmssl.backbones.blocks import attention_kernel
from mmssl.contracts import Batch, Draw, Grid

BYTES = 4


@dataclass(frozen=True)
class Cost:
    """What one sample costs, and what the weights weigh."""

    parameters: int
    gflop_forward: float
    """10^9 floating-point operations of one forward pass of one sample; a multiply and an add count as two."""
    activation_bytes: int
    """What autograd keeps of one sample for the backward pass, in fp32."""

    @property
    def gflop_train(self) -> float:
        """Forward and backward: the backward pass multiplies twice as much."""
        return 3 * self.gflop_forward

    def memory_bytes(self, samples: int, ema: bool = False) -> int:
        """Estimate training memory at ``samples`` per micro-batch: weights, gradients, moments, averages, activations.

        The interpreter, the libraries and the data workers come on top.
        """
        return self.parameters * BYTES * (5 if ema else 4) + self.activation_bytes * samples


def sample_batch(signal_shape: tuple[int, ...], draw: Draw | None, grid: Grid) -> Batch:
    """Return a batch of one synthetic sample with signal [1, C, *size] and token grid ``grid``."""
    rng = np.random.default_rng(0)
    batch: Batch = {
        "signal": torch.from_numpy(rng.standard_normal((1, *signal_shape), dtype=np.float32)),
        "index": torch.zeros(1, dtype=torch.int64),
        "seed": torch.zeros(1, dtype=torch.int64),
        "target": torch.zeros(1, dtype=torch.int64),
    }
    return batch | {name: torch.from_numpy(value)[None] for name, value in (draw(rng, grid) if draw else {}).items()}


def measure(objective: nn.Module, batch: Batch) -> Cost:
    """Measure an objective on a batch of one sample."""
    parameters = sum(p.numel() for p in objective.parameters())
    # Counters see nothing of scaled_dot_product_attention on a CPU; the naive kernel is made of products they do see.
    with attention_kernel("naive"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        objective(batch)
    return Cost(parameters, counter.get_total_flops() / 1e9, saved_bytes(objective, batch))


def saved_bytes(objective: nn.Module, batch: Batch) -> int:
    """Return the bytes that autograd saves in a forward pass, each storage once, weights and inputs left out."""
    own = {t.untyped_storage().data_ptr() for t in [*objective.parameters(), *objective.buffers(), *batch.values()]}
    seen: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        objective(batch)
    return sum(seen.values())
