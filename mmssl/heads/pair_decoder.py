"""The decoder that predicts one look at a scene from another, and is thrown away after pre-training."""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmssl.backbones.blocks import MLP, Attention, Block, CrossAttention, init_linear
from mmssl.backbones.positions import Positions
from mmssl.config import Piece
from mmssl.contracts import Grid
from mmssl.masking import gather

PairAttention = Literal["cross_self", "cross", "joint"]


class PairDecoderConfig(Piece):
    """A pair decoder's shape; SiamMAE's own is 256 x 4 (arXiv:2305.14344, appendix)."""

    dim: Annotated[int, Field(gt=0)] = 256
    depth: Annotated[int, Field(gt=0)] = 4
    num_heads: Annotated[int, Field(gt=0)] = 8
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    attention: PairAttention = "cross_self"
    """cross_self: the later look attends to the past one, then to itself. cross: to the past one alone, so that what is
    visible of the later look is not used. joint: both are one sequence, attending to all of it (section 4.3)."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "PairDecoderConfig":
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} does not divide into num_heads {self.num_heads}")
        return self

    def build(self, in_dim: int, out_dim: int, grid: Grid, extend: tuple[int, ...] = ()) -> "PairDecoder":
        """Make the module, freshly initialised, for latents of width ``in_dim`` and patches of ``out_dim`` values."""
        return PairDecoder(in_dim, out_dim, grid, **self.model_dump(), extend=extend)


class CrossBlock(nn.Module):
    """A pre-norm block: attention to another sequence, unless ``self_attention`` is False to itself, and an MLP."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, self_attention: bool, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.cross = CrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps) if self_attention else None
        self.attn = Attention(dim, num_heads) if self_attention else None
        self.norm3 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, past: Tensor, queries: int | None = None) -> Tensor:
        """Map [B, N, D] with past [B, N', D] to [B, N, D], or to the last ``queries`` tokens alone."""
        x = x + self.cross(self.norm1(x), past)
        if self.attn is not None and self.norm2 is not None:
            branch = self.attn(self.norm2(x), queries=queries)
            x = (x if queries is None else x[:, -queries:]) + branch
        return x + self.mlp(self.norm3(x))  # type: ignore[no-any-return]


class Mark(nn.Module):
    """Adds a learned token to all: joint attention cannot tell two looks apart by itself."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(dim))
        nn.init.normal_(self.token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, N, D] to [B, N, D]."""
        return x + self.token


class PairDecoder(nn.Module):
    """Predicts the patches of a look at ``drop`` from its latent at ``keep`` and from the latent of a past look.

    The sequence of the later look is [prefix, visible, masked], as in ``MaskedDecoder``; tokens of both looks carry
    their positions, so that a place can look for itself. In the last block only the masked tokens are computed.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        grid: Grid,
        dim: int = 256,
        depth: int = 4,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        attention: PairAttention = "cross_self",
        extend: tuple[int, ...] = (),
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(dim))
        self.past = Mark(dim) if attention == "joint" else nn.LayerNorm(dim, eps=eps)
        self.positions = Positions(grid, dim, extend=extend)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio, eps=eps)
            if attention == "joint"
            else CrossBlock(dim, num_heads, mlp_ratio, attention == "cross_self", eps)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.head = nn.Linear(dim, out_dim)
        self.apply(init_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        latent: Tensor,
        keep: Tensor,
        drop: Tensor,
        past: Tensor,
        past_keep: Tensor | None = None,
        grid: Grid | None = None,
    ) -> Tensor:
        """Map latent [B, prefix + K, in_dim], keep [B, K], drop [B, M] and past to predictions [B, M, out_dim].

        ``past`` [B, prefix + K', in_dim] holds the past look's patches at ``past_keep`` [B, K'], all of them if None.
        """
        table = self.positions(grid)
        seen = self.past(self._placed(past, table if past_keep is None else gather(table, past_keep)))
        masked = self.mask_token + gather(table, drop)
        # In cross attention alone, tokens of the later look never meet: only those asked for are needed.
        ours = [masked] if self.attention == "cross" else [self._placed(latent, gather(table, keep)), masked]
        joint = self.attention == "joint"
        x, others = torch.cat([seen, *ours] if joint else ours, dim=1), () if joint else (seen,)
        for block in self.blocks[:-1]:
            x = block(x, *others)
        return self.head(self.norm(self.blocks[-1](x, *others, queries=drop.shape[1])))  # type: ignore[no-any-return]

    def _placed(self, latent: Tensor, positions: Tensor) -> Tensor:
        # Tables are fp32, so the residual stream is too, also where autocast makes the products bf16.
        x = self.embed(latent)
        prefix, tokens = x.split([x.shape[1] - positions.shape[-2], positions.shape[-2]], dim=1)
        return torch.cat([prefix.to(positions.dtype), tokens + positions], dim=1)
