"""Losses between predicted and true patches."""

import torch
from torch import Tensor

from mmssl.distributed import all_reduce, ranks


def patch_mse(prediction: Tensor, target: Tensor, scored: Tensor | None = None) -> Tensor:
    """Return the mean squared error per sample: two [B, M, P] -> float32 [B].

    Only masked patches are handed in, so visible ones are never scored (MAE, arXiv:2111.06377, section 3); of those,
    with ``scored`` [B, M], the ones where it is True. A sample of which nothing is scored has a loss of 0. Computed in
    fp32 whatever the precision of the prediction.
    """
    errors = (prediction.float() - target.float()).square()
    if scored is None:
        return errors.mean(dim=(1, 2))
    return (errors.mean(2) * scored).sum(1) / scored.sum(1).clamp(min=1)


@torch.no_grad()
def constant_mse(target: Tensor, scored: Tensor | None = None) -> Tensor:
    """Return what ``patch_mse`` would be, at best, if one patch were predicted everywhere: float32 [].

    That patch is the mean of the targets [B, M, P] of all ranks; where these have equal batches, the mean over ranks of
    what is returned is the value of the whole batch. A collective.
    """
    target = target.float()
    if scored is None:
        # A norm, because a square of everything would be as large as the targets.
        mean, square = target.mean((0, 1)), torch.linalg.vector_norm(target).square() / target.numel()
    else:
        weight = scored / (scored.sum(1, keepdim=True).clamp(min=1) * len(scored))
        mean, square = torch.einsum("bmp,bm->p", target, weight), (target.square().mean(2) * weight).sum()
    variance: Tensor = square - (all_reduce(mean) / ranks()).square().mean()
    return variance
