"""The tokenizer of sounds that learns from samples: causal convolutions over the waveform, as CPC has them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmssl.backbones.conv import Norm, StridedConvs
from mmssl.contracts import Batch, Grid, Size, State
from mmssl.masking import gather


class Waves(nn.Module):
    """Cuts waveforms [B, 1, samples] into pieces of ``hop`` samples and makes a token of each and what led up to it.

    A patch is such a piece; a token sees ``convs.sees`` samples, all of them before the end of its patch, and zeros
    before the beginning. Implements ``Tokenizer`` and ``StreamsSignal``.
    """

    overlaps, placed, symbols = True, False, False
    extend: tuple[int, ...] = (0,)
    channels = 1

    def __init__(
        self, samples: int, dim: int, kernels: Sequence[int], strides: Sequence[int], norm: Norm = "channel"
    ) -> None:
        super().__init__()
        self.convs = StridedConvs(1, dim, kernels, strides, norm)
        self.dim, self.hop = dim, self.convs.hop
        self.patch_dim = self.hop
        self.edge = self.convs.edge
        self.widens = max(1.0, dim / strides[0])
        self.patch_size: Size = (self.hop,)
        self.size: Size = (samples,)
        self.grid = self.grid_of(self.size)

    def learned_on(self, grid: Grid) -> None:
        """Take no notice: there are no positions."""

    def grid_of(self, size: Size) -> Grid:
        """Return the number of tokens of [B, 1, samples]; raises ValueError where they are not whole."""
        (samples,) = size
        if samples < self.hop or samples % self.hop:
            raise ValueError(f"a sound of {samples} samples does not divide into tokens of {self.hop}")
        return (samples // self.hop,)

    def patches(self, batch: Batch) -> Tensor:
        """Cut the ``signal`` [B, 1, samples] of a batch into [B, N, hop]."""
        signal = batch["signal"]
        (count,) = self.grid_of(signal.shape[2:])
        return signal.reshape(len(signal), count, self.hop)

    def pad(self, batch: Batch) -> Tensor | None:
        """Return which tokens are not wholly within ``length`` [B] samples, bool [B, N]; the first always counts."""
        if "length" not in batch:
            return None
        (count,) = self.grid_of(batch["signal"].shape[2:])
        filled = (batch["length"] // self.hop).clamp(min=1)
        return torch.arange(count, device=filled.device) >= filled.unsqueeze(1)

    def embed(self, patches: Tensor, index: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """Embed patches [B, N, hop], and return the tokens at ``index`` [B, K], all of them if None: [B, K, D]."""
        tokens: Tensor = self.convs(patches.flatten(1).unsqueeze(2))
        return tokens if index is None else gather(tokens, index)

    def step(self, chunk: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Embed the next chunk [B, 1, n * hop] of waveforms: [B, n, D], and what is still needed of it."""
        self.grid_of(chunk.shape[2:])
        return self.convs.step(chunk.transpose(1, 2), state)

    def target(self, patches: Tensor) -> Tensor:
        """Return the samples as they are."""
        return patches

    def untarget(self, prediction: Tensor, patches: Tensor) -> Tensor:
        """Return the samples as they are."""
        return prediction

    def unpatch(self, patches: Tensor, grid: Grid | None = None) -> Tensor:
        """Invert ``patches`` exactly: [B, N, hop] -> [B, 1, samples]."""
        return patches.flatten(1).unsqueeze(1)
