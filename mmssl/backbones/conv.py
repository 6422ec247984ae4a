"""Strided causal convolutions over sequences, which make 100 vectors a second of a waveform (CPC, arXiv:1807.03748).

A value sees its own stride and what came before it, never what comes after: sequences may be cut anywhere between two
strides and go on as one. A convolution of stride s is computed as one product of its s inputs at a time, which are
contiguous where channels come last, with all blocks of s taps; shifted sums of these are the convolution.

Shape legend: B samples, L inputs in time, I channels in, D channels out.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.contracts import State

Norm = Literal["none", "channel"]
"""channel: each moment's channels get mean 0 and variance 1 by themselves, so nothing leaks over time or the batch
(Riviere et al., arXiv:2002.02848, section 3, where batch norm is replaced in this way)."""


class CausalConv(nn.Module):
    """A convolution over time whose output t sees the inputs up to (t + 1) * stride, channels last."""

    def __init__(self, channels: int, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        if not 1 <= stride <= kernel:
            raise ValueError(f"a kernel of {kernel} with stride {stride} would leave inputs out; take kernel >= stride")
        self.stride, self.dim, self.kernel = stride, dim, kernel
        self.blocks = -(-kernel // stride)
        self.past = (self.blocks - 1) * stride
        """How many inputs before a stride are looked at, rounded up to whole strides."""
        # torch's own initialisation of convolutions: uniform, by the number of inputs that an output has.
        bound = (channels * kernel) ** -0.5
        self.weight = nn.Parameter(torch.empty(self.blocks * dim, stride * channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound))
        self.register_buffer("taps", self._taps(channels), persistent=False)

    taps: Tensor | None

    def _taps(self, channels: int) -> Tensor | None:
        # Where the kernel is no multiple of the stride, its oldest block has fewer taps.
        missing = self.blocks * self.stride - self.kernel
        if not missing:
            return None
        taps = torch.ones(self.blocks * self.dim, self.stride * channels)
        taps[: self.dim, : missing * channels] = 0
        return taps

    def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        """Map [B, L, I] to [B, L / stride, D]; ``past`` [B, self.past, I] came before it, zeros where there is none."""
        weight = self.weight if self.taps is None else self.weight * self.taps
        x = x.reshape(x.shape[0], -1, self.stride * x.shape[2])
        known = 0 if past is None else self.blocks - 1
        if past is not None:
            x = torch.cat([past.reshape(x.shape[0], known, x.shape[2]), x], 1)
        # Split and padded, not sliced: the gradient of a slice is a tensor of zeros first.
        *older, newest = F.linear(x, weight).split(self.dim, -1)
        out: Tensor = newest + self.bias
        for block, products in enumerate(older):
            late = self.blocks - 1 - block
            if late < out.shape[1]:
                out = out + F.pad(products, (0, 0, late, -late))
        return out[:, known:] if known else out


class StridedConvs(nn.Module):
    """Causal convolutions, each with a norm and a ReLU behind it: [B, L, I] -> [B, L / hop, D]."""

    def __init__(
        self, channels: int, dim: int, kernels: Sequence[int], strides: Sequence[int], norm: Norm = "channel"
    ) -> None:
        super().__init__()
        if len(kernels) != len(strides) or not kernels:
            raise ValueError(f"as many kernels as strides are needed, but got {[*kernels]} and {[*strides]}")
        self.dim, self.hop, self.sees = dim, 1, 1
        self.convs = nn.ModuleList(
            CausalConv(channels if i == 0 else dim, dim, *pair)
            for i, pair in enumerate(zip(kernels, strides, strict=True))
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) if norm == "channel" else nn.Identity() for _ in kernels)
        for kernel, stride in zip(kernels, strides, strict=True):
            self.sees += (kernel - 1) * self.hop
            self.hop *= stride
        self.edge = -(-self.sees // self.hop) - 1
        """How many outputs see zeros before the first input."""

    def forward(self, x: Tensor) -> Tensor:
        """Map whole sequences [B, L, I], L a multiple of ``hop``, to [B, L / hop, D], each of ``sees`` inputs."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return x

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Continue with the next [B, n * hop, I]: [B, n, D], and what each layer still needs of its inputs."""
        after = []
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            assert isinstance(conv, CausalConv)
            past = x.new_zeros(x.shape[0], conv.past, x.shape[2]) if state is None else state[i]
            after.append(torch.cat([past[:, x.shape[1] :], x[:, -conv.past :] if conv.past else x[:, :0]], 1))
            x = F.relu(norm(conv(x, past)))
        return x, tuple(after)
