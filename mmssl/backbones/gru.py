"""Recurrent backbones, GRU (Cho et al., arXiv:1406.1078) and LSTM: tokens in their order, and a state that is carried.

Shape legend: B samples, N tokens, D' width of the tokens, D width of the state.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmssl.config import OrderedConfig
from mmssl.contracts import Grid, State


class GRUConfig(OrderedConfig):
    """A GRU's shape; CPC has one layer of 256 units over 512 channels (arXiv:1807.03748, section 3.1)."""

    name: Literal["gru"] = "gru"
    dim: Annotated[int, Field(gt=0)] = 256
    """Units of the state."""
    depth: Annotated[int, Field(gt=0)] = 1
    """Layers, each over the outputs of the one before."""

    def build(self) -> "Recurrent":
        """Make the module, freshly initialised."""
        return Recurrent(nn.GRU, self.reads, self.dim, self.depth)


class LSTMConfig(GRUConfig):
    """An LSTM's shape."""

    name: Literal["lstm"] = "lstm"  # type: ignore[assignment]

    def build(self) -> "Recurrent":
        """Make the module, freshly initialised."""
        return Recurrent(nn.LSTM, self.reads, self.dim, self.depth)


class Recurrent(nn.Module):
    """Layers of a recurrent network over tokens [B, N, D'], from a state of zeros; implements ``Streams``."""

    def __init__(self, cell: type[nn.GRU] | type[nn.LSTM], reads: int, dim: int, depth: int) -> None:
        super().__init__()
        self.dim = dim
        # Layer by layer, so that each can be looked at, frozen and given a learning rate, as a Transformer's blocks.
        self.blocks = nn.ModuleList(cell(reads if i == 0 else dim, dim, batch_first=True) for i in range(depth))

    def forward(
        self, tokens: Tensor, pad: Tensor | None = None, seeds: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        """Map [B, N, D'] to [B, N, D]. What is padded comes last, so it reaches nobody; there is nothing to draw."""
        return self.layers(tokens)[-1]

    def layers(
        self, tokens: Tensor, pad: Tensor | None = None, seeds: Tensor | None = None, grid: Grid | None = None
    ) -> list[Tensor]:
        """Return the outputs of every layer for [B, N, D']: tensors [B, N, D]."""
        return self._run(tokens, None)[0]

    def step(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Continue with the next tokens [B, n, D']: [B, n, D], and the state after them, [B, D] tensors."""
        outputs, state = self._run(tokens, state)
        return outputs[-1], state

    def _run(self, tokens: Tensor, state: State | None) -> tuple[list[Tensor], State]:
        outputs: list[Tensor] = []
        after: list[Tensor] = []
        # A state is a sum over many steps: fp32 throughout, also where products are bf16.
        with torch.autocast(tokens.device.type, enabled=False):
            x = tokens.float()
            for i, block in enumerate(self.blocks):
                x, ended = block(x, _initial(block, state, i))
                outputs.append(x)
                after += [part[0] for part in (ended if isinstance(ended, tuple) else (ended,))]
        return outputs, tuple(after)


def _initial(block: nn.Module, state: State | None, layer: int) -> Tensor | tuple[Tensor, Tensor] | None:
    if state is None:
        return None
    if isinstance(block, nn.LSTM):
        hidden, cell = state[2 * layer : 2 * layer + 2]
        return hidden.unsqueeze(0), cell.unsqueeze(0)
    return state[layer].unsqueeze(0)
