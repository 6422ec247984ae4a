"""The contracts between the five rooms of the house: tokenizer, backbone, objective, engine and encoder.

Shapes use one legend throughout: B samples, N tokens of the full grid, K kept and M masked tokens (N = K + M),
P values per patch, D embedding width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from pydantic import BaseModel
from torch import Tensor, nn

Batch: TypeAlias = dict[str, Tensor]
"""What collate makes and an objective consumes. Every value has the sample as its first axis.

``signal``: float32 [B, C, *size]; ``index``: int64 [B], the sample's global index; ``seed``: int64 [B], what stochastic
layers draw from; ``keep`` [B, K] and ``drop`` [B, M]: int64 mask indices; ``target``: int64 [B] class indices, or 0 and
1 per class, float32 [B, classes].
An objective uses the keys that it needs.
"""

Grid: TypeAlias = tuple[int, ...]
"""The token lattice: (h, w), (t, h, w), (f, t) or (n,)."""

Size: TypeAlias = tuple[int, ...]
"""The extent of a signal without its channels: (h, w) in pixels, (t, h, w) ..."""

Draw: TypeAlias = Callable[[np.random.Generator, Grid], dict[str, np.ndarray[Any, Any]]]
"""What an objective draws per sample (masks, permutations ...), given the sample's token grid.

It runs in the data worker, so it must be picklable, and every sample of a batch gets arrays of the same shapes."""

Views: TypeAlias = Callable[[str, Sequence[np.random.Generator], Size], list[Tensor]]
"""Reads a file once and makes one training signal float32 [C, *size] per generator, drawing from that alone.

Raises BrokenFile, and must be picklable."""


class Step(NamedTuple):
    """The result of an objective on one batch.

    ``loss`` is a scalar fp32 tensor, the mean over the batch of per-sample losses; ``metrics`` are detached scalars
    with the same reduction, so that the mean over ranks of equal batches is the value of the global batch.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class Tokenizer(Protocol):
    """Cuts a signal into patches and embeds the ones that are asked for. An ``nn.Module``."""

    dim: int
    patch_dim: int
    grid: Grid

    def patches(self, signal: Tensor) -> Tensor:
        """Cut [B, C, *size] into [B, N, P] without learning anything."""
        ...

    def grid_of(self, size: Size) -> Grid:
        """Return the grid of signals [B, C, *size]; raises ValueError where patches do not fit."""
        ...

    def embed(self, patches: Tensor, index: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """Embed the patches [B, N, P] at ``index`` [B, K] (all of them if None) and add positions: [B, K, D]."""
        ...

    def target(self, patches: Tensor) -> Tensor:
        """Return what a reconstruction should predict for patches [B, M, P]: the same shape, normalised."""
        ...

    def untarget(self, prediction: Tensor, patches: Tensor) -> Tensor:
        """Undo ``target`` with the statistics of the true ``patches``: [B, M, P] -> [B, M, P]."""
        ...

    def unpatch(self, patches: Tensor, grid: Grid | None = None) -> Tensor:
        """Invert ``patches`` exactly."""
        ...


class Backbone(Protocol):
    """Turns tokens into representations; knows no modality and no mask. An ``nn.Module``."""

    dim: int

    def __call__(self, tokens: Tensor, pad: Tensor | None = None, seeds: Tensor | None = None) -> Tensor:
        """Map [B, K, D] to [B, K, D].

        ``pad`` [B, K] is True where a token is padding. ``seeds`` [B] int64 drive stochastic depth while training, so
        that a sample sees the same network on any number of ranks.
        """
        ...

    def layers(self, tokens: Tensor, seeds: Tensor | None = None) -> list[Tensor]:
        """Return the output of every block, each put through the final norm: tensors [B, K, D]."""
        ...


class EncoderModule(Protocol):
    """What survives pre-training: tokenizer, backbone and pooling. An ``nn.Module``."""

    modality: str
    dim: int
    num_prefix: int
    pooling: Literal["mean", "cls"]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which also cuts and restores patches for the objective."""
        ...

    def __call__(
        self, patches: Tensor, index: Tensor | None = None, seeds: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        """Encode the patches [B, N, P] at ``index`` [B, K]: [B, num_prefix + K, D]."""
        ...

    def layers(self, signal: Tensor, seeds: Tensor | None = None) -> list[Tensor]:
        """Return what every block puts out for whole signals [B, C, *size]: tensors [B, num_prefix + N, D]."""
        ...

    def pool(self, latent: Tensor) -> Tensor:
        """Pool [B, num_prefix + N, D] to [B, D]."""
        ...

    def save(self, folder: Any, state: Mapping[str, Tensor] | None = None) -> None:
        """Write an encoder folder, with the tensors of ``state`` instead of the module's own if given."""
        ...


class Objective(Protocol):
    """Turns a batch into a loss: the one root module that engines train. An ``nn.Module``."""

    def __call__(self, batch: Batch) -> Step:
        """Return the loss and the metrics of one batch."""
        ...

    def encoders(self) -> dict[str, EncoderModule]:
        """Return what is kept after training, by modality."""
        ...

    def draw(self) -> Draw | None:
        """Return what the data worker draws for each sample, or None."""
        ...


class Progress(NamedTuple):
    """Where training stands, for schedules inside an objective (teacher momentum, temperatures)."""

    step: int
    steps: int


@runtime_checkable
class Reconstructs(Objective, Protocol):
    """An objective that can show what it predicts."""

    def reconstruct(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (the signal with masked patches predicted, the mask as 0/1 pixels), both [B, C, *size]."""
        ...


@runtime_checkable
class Classifies(Objective, Protocol):
    """An objective that trains a classifier on its one encoder, to be kept beside it."""

    def classifier(self) -> tuple[nn.Module, dict[str, Any]]:
        """Return the head, and as JSON values its settings and the names of the classes."""
        ...


class Modality(Protocol):
    """One kind of media: decoding, transforms, tokenizer and pictures.

    Its settings are typed by the modality itself (``signal_type``, ``tokenizer_type``), hence ``Any`` here.
    """

    name: str
    suffixes: frozenset[str]

    @property
    def signal_type(self) -> type[BaseModel]:
        """The type of the recipe's ``signal`` section."""
        ...

    @property
    def tokenizer_type(self) -> type[BaseModel]:
        """The type of the recipe's ``model.tokenizer`` section."""
        ...

    def decode(self, path: str) -> Any:
        """Decode a file; raises BrokenFile. Must be picklable as a bound method."""
        ...

    def sizes(self, signal: Any) -> Sequence[Size]:
        """Return the sizes that signals may have; the first is the encoder's own. More than one means buckets."""
        ...

    def bucket(self, path: str, signal: Any) -> int:
        """Return which of ``sizes`` suits a file, from its header alone; 0 for a file that cannot be read."""
        ...

    def views(self, signal: Any) -> Views:
        """Return what reads a file and makes training signals of it."""
        ...

    def eval_transform(self, signal: Any) -> Callable[[Any], Tensor]:
        """Return what makes a decoded file an evaluation signal, float32 [C, *size] of the size that suits it."""
        ...

    def tokenizer(self, signal: Any, tokenizer: Any, dim: int) -> Tokenizer:
        """Make the tokenizer of width ``dim``."""
        ...

    def extent(self, decoded: Any) -> tuple[int, ...]:
        """Return the size of a decoded file, for an image (height, width)."""
        ...

    def picture(self, x: Tensor, signal: Any) -> np.ndarray[Any, Any]:
        """Draw one signal [C, *size] as a uint8 picture [h, w, 3]."""
        ...


Micros: TypeAlias = Sequence[Batch]
"""The micro-batches of one optimiser step on one rank."""
