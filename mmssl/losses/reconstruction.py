"""Losses between predicted and true patches."""

from torch import Tensor


def patch_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error per sample: two [B, M, P] -> float32 [B].

    Only masked patches are handed in, so visible ones are never scored (MAE, arXiv:2111.06377, section 3). Computed in
    fp32 whatever the precision of the prediction.
    """
    return (prediction.float() - target.float()).square().mean(dim=(1, 2))
