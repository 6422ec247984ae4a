"""A causal Transformer over sequences: each token sees itself and those before it, and streaming keeps what it saw.

Positions are rotations of queries and keys (RoPE, Su et al., arXiv:2104.09864): only distances matter, so that a
sequence has no end that training would have had to see. Or there are none, where the tokens tell their places.

Shape legend: B samples, N tokens, D width, H heads, E = D / H.
"""

from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmssl.backbones.blocks import MLP, drop_path, init_linear
from mmssl.config import OrderedConfig
from mmssl.contracts import Grid, State


class CausalConfig(OrderedConfig):
    """A causal Transformer's shape."""

    name: Literal["causal"] = "causal"
    dim: Annotated[int, Field(gt=0)] = 256
    depth: Annotated[int, Field(gt=0)] = 2
    num_heads: Annotated[int, Field(gt=0)] = 4
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Hidden width of the MLP over ``dim``."""
    memory: Annotated[int, Field(gt=0)] | None = 256
    """How many tokens a token sees, itself included; null is all since the beginning, and streaming then slows down."""
    rotary: bool = True
    """Rotate queries and keys by their places; not for tokens that are told their places, as those of texts in CLIP."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth of the last block; it grows linearly from 0 at the first."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.dim % (2 * self.num_heads):
            raise ValueError(f"dim {self.dim} does not divide into num_heads {self.num_heads} of an even width")
        return self

    def build(self) -> "CausalTransformer":
        """Make the module, freshly initialised."""
        return CausalTransformer(
            self.reads, self.dim, self.depth, self.num_heads, self.mlp_ratio, self.memory, self.drop_path, self.rotary
        )


class CausalTransformer(nn.Module):
    """A pre-norm Transformer in which nobody sees what comes later; implements ``Streams``."""

    def __init__(
        self,
        reads: int,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        memory: int | None = None,
        drop_path: float = 0.0,
        rotary: bool = True,
    ) -> None:
        super().__init__()
        self.dim, self.memory = dim, memory
        self.reader = nn.Linear(reads, dim) if reads != dim else nn.Identity()
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            CausalBlock(dim, num_heads, mlp_ratio, memory, rate, i, rotary) for i, rate in enumerate(rates)
        )
        self.norm = nn.LayerNorm(dim)
        self.apply(init_linear)

    def forward(
        self, tokens: Tensor, pad: Tensor | None = None, seeds: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        """Map [B, N, D'] to [B, N, D]. What is padded comes last, so it reaches nobody."""
        x = self.reader(tokens)
        for block in self.blocks:
            x, _ = block(x, None, seeds)
        return self.norm(x)  # type: ignore[no-any-return]

    def layers(
        self, tokens: Tensor, pad: Tensor | None = None, seeds: Tensor | None = None, grid: Grid | None = None
    ) -> list[Tensor]:
        """Return the output of every block for [B, N, D'], each put through the final norm."""
        x, outputs = self.reader(tokens), []
        for block in self.blocks:
            x, _ = block(x, None, seeds)
            outputs.append(self.norm(x))
        return outputs

    def step(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Continue with the next tokens [B, n, D']: [B, n, D], and of every block the keys and values still in sight.

        Those are [B, H, memory - 1, E] at most; keys are kept as they were before their rotation.
        """
        x, after = self.reader(tokens), []
        for i, block in enumerate(self.blocks):
            x, seen = block(x, None if state is None else state[2 * i : 2 * i + 2])
            after += seen
        return self.norm(x), tuple(after)


class CausalBlock(nn.Module):
    """Causal self-attention and an MLP, each behind a LayerNorm and around a shortcut."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        memory: int | None,
        drop_path: float = 0.0,
        index: int = 0,
        rotary: bool = True,
    ) -> None:
        super().__init__()
        self.rotary = rotary
        self.num_heads, self.memory, self.drop_path, self.index = num_heads, memory, drop_path, index
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, past: State | None = None, seeds: Tensor | None = None) -> tuple[Tensor, State]:
        """Map [B, n, D] to [B, n, D] where ``past`` are keys and values [B, H, m, E] of those before; return both."""
        rate = self.drop_path if self.training else 0.0
        attended, seen = self._attend(self.norm1(x), past)
        x = x + drop_path(attended, rate, seeds, 2 * self.index)
        return x + drop_path(self.mlp(self.norm2(x)), rate, seeds, 2 * self.index + 1), seen

    def _attend(self, x: Tensor, past: State | None) -> tuple[Tensor, State]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        new, total = q.shape[2], k.shape[2]
        place = torch.arange(total, device=x.device)
        distance = place[total - new :, None] - place
        visible = distance >= 0 if self.memory is None else (distance >= 0) & (distance < self.memory)
        turned_q, turned_k = (rotate(q, place[total - new :]), rotate(k, place)) if self.rotary else (q, k)
        found = F.scaled_dot_product_attention(turned_q, turned_k, v, attn_mask=visible)
        keep = total if self.memory is None else min(total, self.memory - 1)
        return self.proj(found.transpose(1, 2).flatten(2)), (k[:, :, total - keep :], v[:, :, total - keep :])


def rotate(x: Tensor, place: Tensor) -> Tensor:
    """Rotate pairs of values of [B, H, n, E] by angles that grow with ``place`` [n], fast in the first pairs."""
    half = x.shape[-1] // 2
    rate = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = place.unsqueeze(1) * rate
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
