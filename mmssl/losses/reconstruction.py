"""Losses between predicted and true patches."""

from torch import Tensor


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
