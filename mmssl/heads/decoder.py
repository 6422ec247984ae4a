"""The small Transformer that predicts masked patches from visible tokens, and is thrown away after pre-training."""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmssl.backbones.blocks import Block, init_linear
from mmssl.backbones.positions import Positions
from mmssl.config import Piece
from mmssl.contracts import Grid
from mmssl.heads.local_decoder import LocalBlock, run_local
from mmssl.masking import gather

AttentionKind = Literal["global", "local"]


class DecoderConfig(Piece):
    """A decoder's shape; MAE's own is 512 x 8 x 16 (arXiv:2111.06377, table 1)."""

    dim: Annotated[int, Field(gt=0)] = 512
    depth: Annotated[int, Field(gt=0)] = 8
    num_heads: Annotated[int, Field(gt=0)] = 16
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    attention: AttentionKind = "global"
    """global: every token sees all others. local: those in its window of the grid, every other block's windows shifted
    by half of one (Audio-MAE, arXiv:2207.06405, section 3.2); a class token does not take part."""
    window: Annotated[int, Field(ge=2)] = 4
    """local: tokens of a window along every axis of the grid; on a shorter axis the whole axis."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "DecoderConfig":
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} does not divide into num_heads {self.num_heads}")
        return self

    def build(self, in_dim: int, out_dim: int, grid: Grid, extend: tuple[int, ...] = ()) -> "MaskedDecoder":
        """Make the module, freshly initialised, for latents of width ``in_dim`` and patches of ``out_dim`` values."""
        return MaskedDecoder(in_dim, out_dim, grid, **self.model_dump(), extend=extend)


class MaskedDecoder(nn.Module):
    """Predicts the patches at ``drop`` from the latent of the prefix and of the patches at ``keep``.

    The sequence is [prefix, visible, masked]: each token carries the position of the patch it stands for, so nothing
    has to be shuffled back, and the masked ones are simply the last. In the last block only they are computed, since
    nothing reads the others afterwards: the same prediction for less work.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        grid: Grid,
        dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        attention: AttentionKind = "global",
        window: int = 4,
        extend: tuple[int, ...] = (),
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(dim))
        self.positions = Positions(grid, dim, extend=extend)
        self.window = window if attention == "local" else None
        kind = Block if self.window is None else LocalBlock
        self.blocks = nn.ModuleList(kind(dim, num_heads, mlp_ratio, eps=eps) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.head = nn.Linear(dim, out_dim)
        self.apply(init_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, latent: Tensor, keep: Tensor, drop: Tensor, grid: Grid | None = None, pad: Tensor | None = None
    ) -> Tensor:
        """Map latent [B, prefix + K, in_dim], keep [B, K], drop [B, M] on ``grid`` to predictions [B, M, out_dim].

        Tokens before the K visible ones are a prefix (a class token) and have no position. ``grid`` None is the one
        that the decoder was made for. Tokens with ``pad`` [B, N] are seen by nobody, and what is predicted at them
        means nothing. ``drop`` may leave out hidden tokens, which then take no part.
        """
        grid = self.positions.grid if grid is None else tuple(grid)
        positions = self.positions(grid)
        x = self.embed(latent)
        prefix, visible = x.split([x.shape[1] - keep.shape[1], keep.shape[1]], dim=1)
        masked = self.mask_token + gather(positions, drop)
        # Tables are fp32, so the residual stream is too, also where autocast makes the products bf16.
        x = torch.cat([prefix.to(masked.dtype), visible + gather(positions, keep), masked], dim=1)
        places = torch.cat([keep, drop], dim=1)
        pad = None if pad is None else pad.gather(1, places)
        if self.window is None:
            x = self._run_global(x, drop.shape[1], pad)
        else:
            x = run_local(self.blocks, self.window, x, places, drop.shape[1], grid, pad)
        return self.head(self.norm(x))  # type: ignore[no-any-return]

    def _run_global(self, x: Tensor, queries: int, pad: Tensor | None) -> Tensor:
        if pad is not None:
            pad = F.pad(pad, (x.shape[1] - pad.shape[1], 0))  # the prefix is no padding
        for block in self.blocks[:-1]:
            x = block(x, pad)
        return self.blocks[-1](x, pad, queries=queries)  # type: ignore[no-any-return]
