"""The heads that turn an encoder's tokens into class scores.

Shape legend: B samples, N tokens without the prefix, D the encoder's width, H heads, E = D / H.
"""

from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn

from mmssl.backbones.blocks import MLP, attend
from mmssl.config import Piece
from mmssl.contracts import Pooling
from mmssl.errors import UserError
from mmssl.heads.batch_norm import BatchNorm

Pool: TypeAlias = Literal[Pooling, "cls+mean", "attentive"]


class HeadConfig(Piece):
    """What stands between an encoder and its class scores."""

    pool: Pool | None = None
    """How tokens become one vector: their mean, the class token, the last one, class token and mean behind each other,
    or a learned query that attends to them; null is the encoder's own way."""
    layers: Annotated[int, Field(gt=0)] = 1
    """How many of the last blocks are pooled, each through the encoder's final norm, and concatenated."""
    batch_norm: bool = False
    """Normalise the pooled vector over the batch, without gain and bias, before the linear layer (as MAE probes)."""
    num_heads: Annotated[int, Field(gt=0)] = 1
    """Heads of the attentive pooling; must divide the encoder's width."""

    def build(self, dim: int, num_prefix: int, pool: Pooling, num_classes: int) -> "ClassifierHead":
        """Make the head for an encoder of width ``dim`` that pools by ``pool`` itself.

        Raises ValueError where there is no class token to pool, or heads do not divide the width.
        """
        return ClassifierHead(
            dim, num_prefix, self.pool or pool, num_classes, self.layers, self.batch_norm, self.num_heads
        )


class ClassifierHead(nn.Module):
    """Maps the latents of an encoder's last blocks to class scores: pooling, perhaps batch norm, one linear layer."""

    def __init__(
        self,
        dim: int,
        num_prefix: int,
        pool: Pool,
        num_classes: int,
        layers: int = 1,
        batch_norm: bool = False,
        num_heads: int = 1,
    ) -> None:
        super().__init__()
        if pool.startswith("cls") and not num_prefix:
            raise ValueError(f"the head's pool '{pool}' needs a class token, and the encoder has none; use 'mean'")
        self.num_prefix, self.pool, self.layers = num_prefix, pool, layers
        self.queries = nn.ModuleList(AttentivePool(dim, num_heads) for _ in range(layers) if pool == "attentive")
        width = dim * layers * (2 if pool == "cls+mean" else 1)
        self.norm = BatchNorm(width) if batch_norm else nn.Identity()
        self.linear = nn.Linear(width, num_classes)
        # Small, so that the first steps do not push random directions through the encoder.
        nn.init.trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, latents: list[Tensor], pad: Tensor | None = None) -> Tensor:
        """Map ``layers`` latents [B, num_prefix + N, D], the last block's last, to class scores [B, classes].

        Tokens where ``pad`` [B, N] is True are left out. Raises UserError where the encoder has fewer blocks than
        ``layers``.
        """
        if len(latents) != self.layers:
            raise UserError(f"the head's layers is {self.layers}, but the encoder has {len(latents)} blocks")
        vectors = torch.cat([self._pool(latent, i, pad) for i, latent in enumerate(latents)], dim=1)
        return self.linear(self.norm(vectors))  # type: ignore[no-any-return]

    def _pool(self, latent: Tensor, i: int, pad: Tensor | None) -> Tensor:
        tokens = latent[:, self.num_prefix :]
        if self.pool == "attentive":
            return self.queries[i](tokens, pad)  # type: ignore[no-any-return]
        if self.pool == "cls+mean":
            return torch.cat([latent[:, 0], mean_pool(tokens, pad)], dim=1)
        return pooled(latent, self.num_prefix, self.pool, pad)


def pooled(latent: Tensor, num_prefix: int, pool: Pooling, pad: Tensor | None = None) -> Tensor:
    """Return one vector per sample, [B, num_prefix + N, D] -> [B, D]; tokens where ``pad`` [B, N] is True do not count.

    "last" is the last token before the padding, which comes last.
    """
    if pool == "cls":
        return latent[:, 0]
    tokens = latent[:, num_prefix:]
    return mean_pool(tokens, pad) if pool == "mean" else last_pool(tokens, pad)


def last_pool(tokens: Tensor, pad: Tensor | None) -> Tensor:
    """Return the last token before the padding, [B, N, D] -> [B, D]; the first where all is padding."""
    if pad is None:
        return tokens[:, -1]
    last = (~pad).sum(1).sub(1).clamp(min=0)
    return tokens[torch.arange(len(tokens), device=tokens.device), last]


def mean_pool(tokens: Tensor, pad: Tensor | None) -> Tensor:
    """Return the mean over tokens, [B, N, D] -> [B, D], of those where ``pad`` [B, N] is not True; 0 where all are."""
    if pad is None:
        return tokens.mean(1)
    whole = (~pad).unsqueeze(-1).to(tokens.dtype)
    return (tokens * whole).sum(1) / whole.sum(1).clamp(min=1)


class AttentivePool(nn.Module):
    """A learned query that attends to the tokens, in a pre-norm block with an MLP.

    It is V-JEPA's attentive pooler (arXiv:2404.08471, section 3.3; its public code for the parts and their
    initialisation): q + attention(q, norm(x)), then q + mlp(norm(q)), where q is the query as learned.
    """

    def __init__(self, dim: int, num_heads: int = 1, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"the head's num_heads {num_heads} does not divide the encoder's width {dim}")
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(dim))
        self.norm1 = nn.LayerNorm(dim)
        self.to_query = nn.Linear(dim, dim)
        self.to_key_value = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        nn.init.trunc_normal_(self.query, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # The two that write into the residual stream start smaller by the square root of their number.
                last = module in (self.proj, self.mlp.fc2)
                nn.init.trunc_normal_(module.weight, std=0.02 / 2**0.5 if last else 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, pad: Tensor | None = None) -> Tensor:
        """Pool [B, N, D] to [B, D], without the tokens where ``pad`` [B, N] is True."""
        pairs_BN2HE: Tensor = self.to_key_value(self.norm1(tokens)).unflatten(-1, (2, self.num_heads, -1))
        key, value = pairs_BN2HE.permute(2, 0, 3, 1, 4)
        query_H1E: Tensor = self.to_query(self.query).view(self.num_heads, 1, -1)
        attended = attend(query_H1E.expand(len(tokens), -1, -1, -1), key, value, pad).flatten(1)
        x = self.query + self.proj(attended)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]
