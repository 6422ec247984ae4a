"""The Vision Transformer that serves every modality (Dosovitskiy et al., arXiv:2010.11929): tokens in, tokens out."""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmssl.backbones.blocks import Block, init_linear
from mmssl.config import BackboneConfig
from mmssl.contracts import Grid


class ViTConfig(BackboneConfig):
    """A ViT's shape.

    Published sizes, as width x depth x heads: tiny 192 x 12 x 3, small 384 x 12 x 6, base 768 x 12 x 12,
    large 1024 x 24 x 16, huge 1280 x 32 x 16.
    """

    name: Literal["vit"] = "vit"
    dim: Annotated[int, Field(gt=0)] = 384
    """Width of the tokens."""
    depth: Annotated[int, Field(gt=0)] = 12
    """Number of blocks."""
    num_heads: Annotated[int, Field(gt=0)] = 6
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Hidden width of the MLP over ``dim``."""
    qkv_bias: bool = True
    layer_scale: Annotated[float, Field(gt=0)] | None = None
    """Initial gain of LayerScale, e.g. 1e-5; none by default."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth of the last block; it grows linearly from 0 at the first."""
    pre_norm: bool = False
    """Normalise the tokens before the first block too, as CLIP's ViT does (arXiv:2103.00020, section 2.4)."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more time for far less memory."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "ViTConfig":
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} does not divide into num_heads {self.num_heads}")
        return self

    def build(self) -> "ViT":
        """Make the module, freshly initialised."""
        return ViT(**self.model_dump(exclude={"name"}))


class ViT(nn.Module):
    """A pre-norm Transformer over [B, K, D] tokens with a final LayerNorm; knows no modality, no grid and no mask."""

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        pre_norm: bool = False,
        checkpointing: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.dim, self.checkpointing = dim, checkpointing
        self.pre_norm = nn.LayerNorm(dim, eps=eps) if pre_norm else nn.Identity()
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio, qkv_bias, layer_scale, rate, i, eps) for i, rate in enumerate(rates)
        )
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.apply(init_linear)

    def forward(
        self, tokens: Tensor, pad: Tensor | None = None, seeds: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        """Map [B, K, D] to [B, K, D]; ``pad`` [B, K] is True at padding, ``seeds`` [B] int64 drive stochastic depth.

        Tokens are a set: of ``grid`` nothing is used.
        """
        tokens = self.pre_norm(tokens)
        for block in self.blocks:
            tokens = self._run(block, tokens, pad, seeds)
        return self.norm(tokens)  # type: ignore[no-any-return]

    def layers(
        self, tokens: Tensor, pad: Tensor | None = None, seeds: Tensor | None = None, grid: Grid | None = None
    ) -> list[Tensor]:
        """Return the output of every block for [B, K, D], each put through the final norm; arguments as ``forward``."""
        tokens, outputs = self.pre_norm(tokens), []
        for block in self.blocks:
            tokens = self._run(block, tokens, pad, seeds)
            outputs.append(self.norm(tokens))
        return outputs

    def _run(self, block: nn.Module, tokens: Tensor, pad: Tensor | None, seeds: Tensor | None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            # Blocks draw from the samples' seeds only, so there is no generator state to put back.
            return checkpoint(block, tokens, pad, seeds, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
        return block(tokens, pad, seeds)  # type: ignore[no-any-return]
