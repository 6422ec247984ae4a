"""What each rank of ``test_batch_norm_over_two_ranks_is_that_of_the_whole_batch`` runs on its half of the batch."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmssl.heads.batch_norm import BatchNorm

DIM, STEPS, BATCH = 5, 3, 8


def batches() -> tuple[Tensor, Tensor]:
    """Return vectors [STEPS, BATCH, DIM] of different scales and offsets, and weights that make the loss uneven."""
    generator = torch.Generator().manual_seed(3)
    scale = torch.logspace(-1, 2, DIM)
    vectors = torch.randn(STEPS, BATCH, DIM, generator=generator) * scale + 10 * scale
    return vectors, torch.randn(BATCH, DIM, generator=generator)


def walk(rank: int, size: int) -> dict[str, Tensor]:
    """Normalise this rank's share of every batch; return outputs, gradients (averaged as engines do) and buffers."""
    vectors, weights = batches()
    torch.manual_seed(0)
    norm, linear = BatchNorm(DIM), nn.Linear(DIM, DIM)
    mine = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    outputs, gradients = [], []
    for batch in vectors:
        x = linear(batch[mine])
        x.retain_grad()
        y = norm(x)
        ((y.tanh() * weights[mine]).sum(1).mean() / size).backward()
        outputs.append(y.detach())
        gradients.append(x.grad)
    found = {"y": torch.stack(outputs), "x.grad": torch.stack(gradients), **norm.state_dict()}
    for name, parameter in linear.named_parameters():
        total = parameter.grad.clone()
        if size > 1:
            dist.all_reduce(total)
        found[name] = total
    return found
