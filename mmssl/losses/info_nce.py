"""InfoNCE (van den Oord et al., arXiv:1807.03748, eq. 4): which of N candidates belongs to the context."""

import torch
from torch import Tensor

TIE = 1e-4
"""Relative difference up to which two scores are equal: they are sums of many products, rounded in any order."""


def info_nce(positive: Tensor, negatives: Tensor, present: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of the positive among all candidates: scores [...] and [..., N - 1] -> float32 [...].

    Scores are log f(x, c), of any scale; of ``negatives`` those count where ``present`` [..., N - 1] is True. Constant
    scores give log N. Less than that is information: log N - loss is a lower bound, in nats and on average, of the
    mutual information between what is predicted and its context, and can never be more than log N (section 2.3).
    """
    negatives = negatives.float()
    if present is not None:
        negatives = negatives.masked_fill(~present, -torch.inf)
    positive = positive.float().unsqueeze(-1)
    return torch.cat([positive, negatives], -1).logsumexp(-1) - positive.squeeze(-1)


def chosen(positive: Tensor, negatives: Tensor, present: Tensor | None = None) -> Tensor:
    """Return where the positive has the highest score of all candidates, bool [...]; a tie, to rounding, is a miss.

    Else a collapsed encoder, whose vectors are all the same, would hit whenever its products are rounded in its favour.
    """
    above = negatives >= (positive - TIE * positive.abs()).unsqueeze(-1)
    return ~(above if present is None else above & present).any(-1)
