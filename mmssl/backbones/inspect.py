"""Looking inside a Vision Transformer: where its heads look, and how well that separates a thing from the rest.

Shape legend: B samples, N tokens, D width, H heads.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmssl.backbones.blocks import Attention
from mmssl.backbones.vit import ViT


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the first argument of every call of ``module`` inside the block, in the order of the calls."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def attention_maps(vit: ViT, tokens: Tensor, block: int = -1) -> Tensor:
    """Return the weights with which each query (third axis) attends to each key (last): float32 [B, H, N, N].

    ``tokens`` [B, N, D] are what the backbone is called with; ``block`` counts from the end if negative. Fused kernels
    hand out no weights, so they are computed from the attention's own input. Raises IndexError for a block that there
    is not.
    """
    attention = vit.blocks[block].attn
    assert isinstance(attention, Attention)
    with inputs_of(attention) as seen:
        vit(tokens)
    q, k = attention._heads(attention.qkv(seen[0], slice(0, 2 * attention.dim)), 2)
    scores: Tensor = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-2, -1)
    return scores.softmax(-1)


def heaviest(weights: Tensor, mass: float) -> Tensor:
    """Mark the fewest tokens that hold at least the share ``mass`` of the weights: [..., N] -> bool [..., N].

    What DINO makes of a head's attention (Caron et al., arXiv:2104.14294, section 4.2.2, with 0.6). Of equal weights
    the first is taken first. Raises ValueError for a mass outside (0, 1].
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass is a share above 0 and at most 1, but got {mass}")
    values, order = weights.double().sort(dim=-1, descending=True, stable=True)
    before = values.cumsum(-1) - values
    # The slack keeps a sum that is the mass but for rounding from costing one more token.
    wanted = before < mass * values.sum(-1, keepdim=True) * (1 - 1e-9)
    return torch.zeros_like(wanted).scatter(-1, order, wanted)


def jaccard(mask: Tensor, truth: Tensor) -> Tensor:
    """Return intersection over union of two masks, bool [..., N] -> float32 [...] in [0, 1]; 1 where both are empty."""
    both, either = (mask & truth).sum(-1), (mask | truth).sum(-1)
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)
