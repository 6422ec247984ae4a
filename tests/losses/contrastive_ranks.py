"""What each rank of ``test_two_ranks_equal_one_process`` runs on its half of the pairs."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmssl.losses.contrastive import PairLoss, pairwise_sigmoid, symmetric_info_nce

PAIRS, WIDTH, TILE = 10, 6, 3
PRESENT = {
    "all": [True] * PAIRS,
    "uneven": [True, False, True, True, True, False, False, True, False, False],
    "one-rank": [True, True, False, True, True, *[False] * 5],
    "none": [False] * PAIRS,
}
LOSSES = ("softmax", "sigmoid")


def pair_loss(name: str, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, present: Tensor | None) -> PairLoss:
    """Return either loss."""
    if name == "softmax":
        return symmetric_info_nce(a, b, scale, present, TILE)
    return pairwise_sigmoid(a, b, scale, bias, present, TILE)


def walk(rank: int, size: int) -> dict[str, Tensor]:
    """Return for all settings the losses, the matches found, and the gradients as engines average them."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(3, PAIRS, WIDTH, generator=generator)
    vectors = F.normalize(noise[:2] + noise[2], dim=2)  # alike, so that some matches are found
    mine = slice(rank * PAIRS // size, (rank + 1) * PAIRS // size)
    found = {}
    for loss in LOSSES:
        for name, present in PRESENT.items():
            whole = vectors.clone().requires_grad_()
            scale, bias = torch.tensor(9.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
            where = torch.tensor(present)
            out = pair_loss(loss, *whole[:, mine], scale, bias, None if all(present) else where[mine])
            # The mean over the present pairs of all ranks, as the average over the ranks of what each contributes.
            total = out.losses.sum() / max(1, sum(present))
            total.backward()
            losses, matches = torch.zeros(PAIRS), torch.zeros(PAIRS, 2)
            losses[mine], matches[mine] = out.losses.detach(), out.found.float()
            values = {"losses": losses, "found": matches, "vectors": whole.grad, "scale": scale.grad, "bias": bias.grad}
            for key, value in values.items():
                if value is not None:
                    if size > 1:
                        dist.all_reduce(value)
                    found[f"{loss}/{name}/{key}"] = value
    return found
