"""Residual networks over small pictures, each mapped to a vector by itself: the patch encoder of CPC on pictures.

Pre-activation bottleneck blocks (He et al., arXiv:1603.05027): what CPC calls ResNet-v2-101 has stages of 3, 4 and 23
of them up to the third stage, which gives 1024 channels (arXiv:1807.03748, section 3.2).

Shape legend: M pictures, C channels in, p x q pixels, D channels out.
"""

from collections.abc import Sequence
from math import gcd
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["layer", "group", "none"]
"""Over all channels and places of a picture (CPC v2), over groups of channels, or nothing (CPC): never over several
pictures. Batch norm is left out on purpose: its statistics tell a patch of the others that it is to be told from."""
GROUPS = 32


class ResNet(nn.Module):
    """Stages of residual blocks and the mean over all places: [M, C, p, q] -> [M, D].

    The first convolution and the maximum behind it leave a quarter of the places each way, and every stage but the
    first half of those it is given. Channels last in memory are faster on a CPU.
    """

    def __init__(
        self,
        inputs: int,
        dim: int,
        blocks: Sequence[int] = (3, 4, 23),
        channels: Sequence[int] = (256, 512, 1024),
        bottlenecks: Sequence[int] = (64, 128, 256),
        norm: Norm = "layer",
    ) -> None:
        """A stage has ``blocks`` that give ``channels``, with ``bottlenecks`` within; the stem gives the first.

        A linear map to ``dim`` follows where the last channels are not as many.
        """
        super().__init__()
        if not len(blocks) == len(channels) == len(bottlenecks) > 0:
            raise ValueError(
                f"each stage needs blocks, channels and bottlenecks, but got {[*blocks]}, {[*channels]}, "
                f"{[*bottlenecks]}"
            )
        self.dim, now = dim, bottlenecks[0]
        self.stem = nn.Conv2d(inputs, now, 7, stride=2, padding=3, bias=norm == "none")
        self.blocks = nn.ModuleList()
        for stage, (count, out, width) in enumerate(zip(blocks, channels, bottlenecks, strict=True)):
            for i in range(count):
                self.blocks.append(Bottleneck(now, out, width, 2 if stage > 0 and i == 0 else 1, norm))
                now = out
        self.norm = make_norm(norm, now)
        self.project = nn.Linear(now, dim) if now != dim else nn.Identity()
        self.apply(_init)

    def forward(self, x: Tensor) -> Tensor:
        """Map [M, C, p, q] to [M, D]; no picture depends on another."""
        x = F.max_pool2d(self.stem(x), 3, stride=2, padding=1)
        for block in self.blocks:
            x = block(x)
        return self.project(F.relu(self.norm(x)).mean((2, 3)))  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """Around a shortcut: narrow, look at the neighbours, widen; a norm and a ReLU before each."""

    def __init__(self, channels: int, out: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        bias = norm == "none"
        self.norm1, self.norm2, self.norm3 = make_norm(norm, channels), make_norm(norm, width), make_norm(norm, width)
        self.narrow = nn.Conv2d(channels, width, 1, bias=bias)
        self.look = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=bias)
        self.widen = nn.Conv2d(width, out, 1, bias=bias)
        same = stride == 1 and channels == out
        self.shortcut = None if same else nn.Conv2d(channels, out, 1, stride=stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [M, channels, p, q] to [M, out, p / stride, q / stride]."""
        y = F.relu(self.norm1(x))
        if self.shortcut is not None:
            x = self.shortcut(y)
        y = self.look(F.relu(self.norm2(self.narrow(y))))
        return torch.add(x, self.widen(F.relu(self.norm3(y))))


def make_norm(kind: Norm, channels: int) -> nn.Module:
    """Return a norm over [M, channels, p, q] that takes each of the M by itself."""
    if kind == "none":
        return nn.Identity()
    return nn.GroupNorm(1 if kind == "layer" else gcd(GROUPS, channels), channels)


def _init(module: nn.Module) -> None:
    # He et al., arXiv:1502.01852, by what goes out; a block's last convolution starts at zero and so the block as its
    # shortcut (Goyal et al., arXiv:1706.02677, section 5.1), which networks without norms need most.
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, Bottleneck):
        nn.init.zeros_(module.widen.weight)
