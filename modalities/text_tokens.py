"""Tokenizers of texts: sentence by sentence, a token every few bytes, or words and parts of words.

A signal holds the bytes of UTF-8 text, or the numbers of a vocabulary's tokens, each 1 higher, as floats (which are
exact), and 0 where there is no more text.

Shape legend: B samples, S sentences, L bytes of a sentence, N tokens, E width of a byte's embedding, D of a token's.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.backbones.conv import Norm, StridedConvs
from mmssl.backbones.positions import PositionKind, Positions
from mmssl.contracts import Batch, Grid, Size, State
from mmssl.masking import gather
from modalities.text_bpe import coder, vocabulary

VALUES = 257
"""Padding, and 256 bytes."""
AT_ONCE = 64
"""Sentences that are embedded at a time: what is between bytes and tokens is so much larger than both that it should
stay in the processor's cache (measured: up to 1.5 x faster), and a library of books in memory."""


class _OfBytes(nn.Module, ABC):
    """What both have: embedded bytes, of which padding is 0, comes last and is recognised, and no positions."""

    placed, symbols = False, True
    extend: tuple[int, ...] = (0,)
    channels = 1

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VALUES, embed_dim, padding_idx=0)

    def embedded(self, values: Tensor) -> Tensor:
        """Map values of a signal [...] to [..., E]; what is no byte to the nearest."""
        return cast(Tensor, self.bytes(values.long().clamp(0, VALUES - 1)))

    @abstractmethod
    def patches(self, batch: Batch) -> Tensor:
        """Cut the ``signal`` of a batch into [B, N, P]."""

    def pad(self, batch: Batch) -> Tensor | None:
        """Return which tokens begin behind the text, bool [B, N]."""
        return self.patches(batch)[..., 0] == 0

    def learned_on(self, grid: Grid) -> None:
        """Take no notice: there are no positions."""

    def target(self, patches: Tensor) -> Tensor:
        """Return the bytes as they are."""
        return patches

    def untarget(self, prediction: Tensor, patches: Tensor) -> Tensor:
        """Return the bytes as they are."""
        return prediction


class Sentences(_OfBytes):
    """Makes a token of each sentence: a convolution over its bytes, ReLU and the mean (arXiv:1807.03748, section 3.3).

    A patch is a sentence, the signal [B, 1, S, L]. Implements ``Tokenizer``.
    """

    overlaps, edge = False, 0

    def __init__(self, sentences: int, length: int, dim: int, embed_dim: int, kernel: int) -> None:
        super().__init__(embed_dim)
        self.conv = nn.Conv1d(embed_dim, dim, kernel, padding="same")
        self.dim, self.patch_dim = dim, length
        self.widens = max(1.0, dim / length)
        self.patch_size: Size = (1, length)
        self.size: Size = (sentences, length)
        self.grid: Grid = (sentences,)

    def grid_of(self, size: Size) -> Grid:
        """Return the sentences of [B, 1, S, L]; raises ValueError for another L than its own."""
        if len(size) != 2 or size[0] < 1 or size[1] != self.patch_dim:
            raise ValueError(f"sentences of {self.patch_dim} bytes are needed, [S, {self.patch_dim}], not {list(size)}")
        return (size[0],)

    def patches(self, batch: Batch) -> Tensor:
        """Cut the ``signal`` [B, 1, S, L] of a batch into [B, S, L]."""
        signal = batch["signal"]
        self.grid_of(signal.shape[2:])
        return signal.flatten(0, 1)

    def embed(self, patches: Tensor, index: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """Embed the sentences [B, N, L] at ``index`` [B, K], and only those: [B, K, D]; 0 for one without bytes."""
        chosen = patches if index is None else gather(patches, index)
        rows = [self._mean(part) for part in chosen.flatten(0, 1).split(AT_ONCE)]
        tokens: Tensor = torch.cat(rows).unflatten(0, chosen.shape[:2])
        return tokens

    def _mean(self, sentences: Tensor) -> Tensor:
        features = F.relu(self.conv(self.embedded(sentences).transpose(1, 2)))  # [n, D, L]
        there = (sentences != 0).to(features.dtype)
        share = there / there.sum(1, keepdim=True).clamp(min=1)
        return torch.bmm(features, share.unsqueeze(2)).squeeze(2)

    def unpatch(self, patches: Tensor, grid: Grid | None = None) -> Tensor:
        """Invert ``patches`` exactly: [B, S, L] -> [B, 1, S, L]."""
        return patches.unsqueeze(1)


class Bytes(_OfBytes):
    """Makes a token of every ``hop`` bytes and what led up to them, by strided causal convolutions.

    A patch are those bytes, the signal [B, 1, bytes]. Implements ``Tokenizer`` and ``StreamsSignal``.
    """

    overlaps = True

    def __init__(
        self, count: int, dim: int, embed_dim: int, kernels: Sequence[int], strides: Sequence[int], norm: Norm
    ) -> None:
        super().__init__(embed_dim)
        self.convs = StridedConvs(embed_dim, dim, kernels, strides, norm)
        self.dim, self.hop, self.edge = dim, self.convs.hop, self.convs.edge
        self.widens = max(embed_dim, dim / strides[0])
        self.patch_dim = self.hop
        self.patch_size: Size = (self.hop,)
        self.size: Size = (count,)
        self.grid = self.grid_of(self.size)

    def grid_of(self, size: Size) -> Grid:
        """Return the number of tokens of [B, 1, bytes]; raises ValueError where they are not whole."""
        if len(size) != 1 or size[0] < self.hop or size[0] % self.hop:
            raise ValueError(f"a text of {list(size)} bytes does not divide into tokens of {self.hop}")
        return (size[0] // self.hop,)

    def patches(self, batch: Batch) -> Tensor:
        """Cut the ``signal`` [B, 1, bytes] of a batch into [B, N, hop]."""
        signal = batch["signal"]
        (count,) = self.grid_of(signal.shape[2:])
        return signal.reshape(len(signal), count, self.hop)

    def embed(self, patches: Tensor, index: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """Embed patches [B, N, hop], and return the tokens at ``index`` [B, K], all of them if None: [B, K, D]."""
        tokens: Tensor = self.convs(self.embedded(patches.flatten(1)))
        return tokens if index is None else gather(tokens, index)

    def step(self, chunk: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Embed the next chunk [B, 1, n * hop] of texts: [B, n, D], and what is still needed of it."""
        self.grid_of(chunk.shape[2:])
        return self.convs.step(self.embedded(chunk.squeeze(1)), state)

    def unpatch(self, patches: Tensor, grid: Grid | None = None) -> Tensor:
        """Invert ``patches`` exactly: [B, N, hop] -> [B, 1, bytes]."""
        return patches.flatten(1).unsqueeze(1)


class Subwords(nn.Module):
    """Embeds the tokens of a vocabulary, with positions, initialised as CLIP's.

    A patch is a token's number, the signal [B, 1, N]. ``merges`` are needed to spell it. Implements ``Tokenizer``.
    """

    overlaps, placed, symbols, edge = False, True, True, 0
    extend: tuple[int, ...] = (0,)
    channels = patch_dim = 1
    patch_size: Size = (1,)

    def __init__(
        self, context: int, vocab_size: int, dim: int, positions: PositionKind = "learned", merges: str | None = None
    ) -> None:
        super().__init__()
        if merges is not None and (size := len(vocabulary(merges))) > vocab_size:
            raise ValueError(f"vocab_size {vocab_size} is less than the {size} tokens that its merges make")
        self.dim, self.merges = dim, merges
        self.widens = float(dim)
        self.size: Size = (context,)
        self.grid: Grid = (context,)
        self.words = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.words.weight, std=0.02)
        self.positions = Positions(self.grid, dim, positions, self.extend)
        if positions == "learned":
            nn.init.normal_(self.positions.table, std=0.01)

    def learned_on(self, grid: Grid) -> None:
        """Take the positions of another grid, from which those of its own are interpolated as any other's."""
        if grid != self.positions.grid:
            self.positions = Positions(grid, self.dim, self.positions.kind, self.extend)

    def grid_of(self, size: Size) -> Grid:
        """Return the number of tokens of [B, 1, N]; raises ValueError for what is no sequence."""
        if len(size) != 1 or size[0] < 1:
            raise ValueError(f"a sequence of tokens is needed, [N], not {list(size)}")
        return (size[0],)

    def patches(self, batch: Batch) -> Tensor:
        """Turn the ``signal`` [B, 1, N] of a batch into [B, N, 1]."""
        self.grid_of(batch["signal"].shape[2:])
        return batch["signal"].transpose(1, 2)

    def pad(self, batch: Batch) -> Tensor | None:
        """Return which tokens are behind the end of text, bool [B, N]."""
        return batch["signal"][:, 0] == 0

    def embed(self, patches: Tensor, index: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """Embed the tokens [B, N, 1] at ``index`` [B, K], and only those, with their positions: [B, K, D].

        Raises IndexError for a token that there is not.
        """
        positions = self.positions(self.grid if grid is None else grid)
        if index is None:
            return cast(Tensor, self.words(self._numbers(patches)) + positions)
        return cast(Tensor, self.words(self._numbers(gather(patches, index))) + gather(positions, index))

    def _numbers(self, patches: Tensor) -> Tensor:
        # Padding is embedded as any token, for nobody looks at it.
        return (patches[..., 0].long() - 1).clamp(min=0)

    def target(self, patches: Tensor) -> Tensor:
        """Return the numbers as they are."""
        return patches

    def untarget(self, prediction: Tensor, patches: Tensor) -> Tensor:
        """Return the numbers as they are."""
        return prediction

    def unpatch(self, patches: Tensor, grid: Grid | None = None) -> Tensor:
        """Spell the tokens [B, N, 1] as ``Sentences`` has sentences: a row of bytes for each, [B, 1, N, L].

        A space stands where a token ends a word. Raises ValueError where the vocabulary is still to be learned.
        """
        if self.merges is None:
            raise ValueError("tokens cannot be spelt: the vocabulary is learned when training starts")
        known = coder(self.merges)
        numbers = patches[..., 0].round().long().flatten().tolist()
        spelt = [known.spelling(number - 1) if 0 < number <= len(known.tokens) else b"" for number in numbers]
        longest = max(1, *map(len, spelt))
        rows = [[byte + 1 for byte in row] + [0] * (longest - len(row)) for row in spelt]
        return torch.tensor(rows, dtype=patches.dtype, device=patches.device).reshape(len(patches), 1, -1, longest)
