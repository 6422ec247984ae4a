"""The Transformer's parts: attention with a chosen kernel, the MLP, stochastic depth and the pre-norm block.

Shape legend: B samples, N tokens, D width, H heads, E = D / H.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kernel = Literal["auto", "sdpa", "naive"]
_kernel: ContextVar[Kernel] = ContextVar("attention_kernel", default="auto")


@contextmanager
def attention_kernel(kernel: Kernel) -> Iterator[None]:
    """Force one attention kernel inside the block: for tests, and to count FLOPs (counters do not see SDPA on CPU)."""
    token = _kernel.set(kernel)
    try:
        yield
    finally:
        _kernel.reset(token)


def choose_kernel(device: str, dtype: torch.dtype, tokens: int) -> Kernel:
    """Return the faster kernel: SDPA, but for short bf16 sequences on a CPU with AMX, where plain products win.

    Without AMX, SDPA was measured 1.1 to 4.4 x faster in fp32 and 3 to 4.8 x in bf16 (benchmarks/attention.py).
    """
    short = device == "cpu" and dtype == torch.bfloat16 and tokens < 200
    return "naive" if short and torch.cpu._is_amx_tile_supported() else "sdpa"


def attend(q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None = None) -> Tensor:
    """Attend from q [B, H, N, E] to k, v [B, H, N', E] -> [B, H, N, E]; keys with ``pad`` [B, N'] True are not seen."""
    # A sample of padding alone sees all of it: numbers that nobody uses, but numbers.
    mask = None if pad is None else (~pad | pad.all(1, keepdim=True))[:, None, None, :]
    kernel = _kernel.get()
    if kernel == "auto":
        kernel = choose_kernel(q.device.type, q.dtype, k.shape[-2])
    if kernel == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights: Tensor = scores.softmax(-1).to(v.dtype)
    return weights @ v


def init_linear(module: nn.Module) -> None:
    """Initialise linear layers as MAE does (Xavier uniform weights, zero biases); to be used with ``Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def uniform(seeds: Tensor, stream: int | Tensor) -> Tensor:
    """Return one float32 number in [0, 1) per seed: int64 [B] -> [B], a function of (seed, stream) alone.

    Several streams, int64 of a shape that goes with that of the seeds, give a number each.

    A counter-based generator (the splitmix64 finaliser) instead of the global one: a sample draws the same numbers on
    any rank, device and batch position, and again when activations are recomputed.
    """

    def shift(x: Tensor, bits: int) -> Tensor:  # logical, where torch's >> is arithmetic
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    def signed(x: int) -> int:
        return (x + 2**63) % 2**64 - 2**63

    step = 0x9E3779B97F4A7C15
    x = seeds + (signed((stream + 1) * step) if isinstance(stream, int) else (stream + 1) * signed(step))
    x = (x ^ shift(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ shift(x, 27)) * signed(0x94D049BB133111EB)
    return shift(x ^ shift(x, 31), 40).float() * 2.0**-24


def drop_path(x: Tensor, rate: float, seeds: Tensor | None, stream: int) -> Tensor:
    """Zero a residual branch [B, N, D] for a random fraction ``rate`` of the samples and rescale the others.

    Stochastic depth (Huang et al., arXiv:1603.09382). ``seeds`` None means evaluation: the branch passes unchanged.
    """
    if rate == 0.0 or seeds is None:
        return x
    keep = (uniform(seeds, stream) >= rate).to(x.dtype) / (1 - rate)
    return x * keep[:, None, None]


class SlicedLinear(nn.Linear):
    """A linear layer of which a range of output rows can be computed alone, inside its own forward.

    Inside the forward, because ZeRO stage 3 gathers a parameter only when its owner's forward runs.
    """

    def forward(self, input: Tensor, rows: slice | None = None) -> Tensor:
        """Map [..., in] to [..., out], or to the output features in ``rows``."""
        if rows is None:
            return super().forward(input)
        return F.linear(input, self.weight[rows], None if self.bias is None else self.bias[rows])


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} does not divide into {num_heads} heads")
        self.dim, self.num_heads = dim, num_heads
        self.qkv = SlicedLinear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, pad: Tensor | None = None, queries: int | None = None) -> Tensor:
        """Map [B, N, D] to [B, N, D], or to [B, queries, D] for the last ``queries`` tokens, which still see all N."""
        if queries is None:
            q, k, v = self._heads(self.qkv(x), 3)
        else:
            (q,) = self._heads(self.qkv(x[:, -queries:], slice(0, self.dim)), 1)
            k, v = self._heads(self.qkv(x, slice(self.dim, None)), 2)
        out = attend(q, k, v, pad)
        return self.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        heads: Tensor = x.unflatten(-1, (parts, self.num_heads, -1))
        return heads.permute(2, 0, 3, 1, 4).unbind(0)


class CrossAttention(nn.Module):
    """Multi-head attention from one sequence to another."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} does not divide into {num_heads} heads")
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Map [B, N, D] to [B, N, D], attending to memory [B, N', D]."""
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(memory).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class LayerScale(nn.Module):
    """A learned gain per channel (Touvron et al., arXiv:2103.17239, eq. 4)."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        """Scale [..., D]."""
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm Transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        stream: int = 0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.scale2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path, self.stream = drop_path, stream

    def forward(
        self, x: Tensor, pad: Tensor | None = None, seeds: Tensor | None = None, queries: int | None = None
    ) -> Tensor:
        """Map [B, N, D] to [B, N, D], or to the last ``queries`` tokens alone, sparing the work of the others."""
        rate = self.drop_path if self.training else 0.0
        branch = self.scale1(self.attn(self.norm1(x), pad, queries))
        if queries is not None:
            x = x[:, -queries:]
        x = x + drop_path(branch, rate, seeds, 2 * self.stream)
        branch = self.scale2(self.mlp(self.norm2(x)))
        return x + drop_path(branch, rate, seeds, 2 * self.stream + 1)
