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

``signal``: float32 [B, C, *size]; ``index``: int64 [B], the sample's global index; ``place``: int64 [B, 3], the epoch,
the file that was asked for (where that is broken, ``index`` is another) and which look at it; ``seed``: int64 [B], what
stochastic layers draw from; ``keep`` [B, K] and ``drop`` [B, M]: int64 mask indices; ``target``: int64 [B] class
indices, or 0 and 1 per class, float32 [B, classes]; ``length``: int64 [B], how much of the signal's last axis is no
padding; ``past``: an earlier or wider look at the same file as ``signal``, of its shape.
Of several modalities every key has its own in front, ``image.signal``; ``image.present``, bool [B], is then whether the
sample has that modality, and where it has not, its values mean nothing.
An objective uses the keys that it needs; views may add keys that their modality's tokenizer reads.
"""

Grid: TypeAlias = tuple[int, ...]
"""The token lattice: (h, w), (t, h, w), (f, t) or (n,)."""

Size: TypeAlias = tuple[int, ...]
"""The extent of a signal without its channels: (h, w) in pixels, (t, h, w) ..."""

State: TypeAlias = tuple[Tensor, ...]
"""What a causal module remembers of the past, between two chunks of a signal. Every tensor begins with the sample."""

Draw: TypeAlias = Callable[[np.random.Generator, Grid], dict[str, np.ndarray[Any, Any]]]
"""What an objective draws per sample (masks, permutations ...), given the sample's token grid.

It runs in the data worker, so it is picklable; every sample of a batch gets arrays of the same shapes."""

Views: TypeAlias = Callable[[Any, Sequence[np.random.Generator], Size], list[dict[str, Tensor]]]
"""Reads a file (a path), or those of several modalities, once and makes a training sample per generator, drawing from
that alone: its ``signal``, float32 [C, *size], and perhaps further tensors, of one shape for all samples.

Raises BrokenFile, and must be picklable."""


class Step(NamedTuple):
    """The result of an objective on one batch.

    ``loss`` is a scalar fp32 tensor, the mean over the batch of per-sample losses; ``metrics`` are detached scalars
    with the same reduction, so that the mean over ranks of equal batches is the value of the global batch.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


Pooling: TypeAlias = Literal["mean", "cls", "last"]
"""How the tokens of a signal become one vector: their mean, the class token, or the last one that is no padding."""


class Tokenizer(Protocol):
    """Cuts a signal into patches and embeds the ones that are asked for. An ``nn.Module``.

    It is made for signals [B, ``channels``, *``size``], which have the token grid ``grid``; others have other grids.
    ``extend`` are the grid's axes along which a longer signal is more of the same (time), not a finer one.
    ``overlaps``: an embedding sees more than its own patch, so that a masked one shows in its neighbours. ``placed``:
    it says where its patch is, which tells a patch from those of other places without a look at it. ``edge``: so many
    of the first tokens see zeros that stand before the signal, and are known by that. ``symbols``: the values are names
    (bytes, words), between which there is no distance.
    """

    dim: int
    patch_dim: int
    patch_size: Size
    channels: int
    size: Size
    grid: Grid
    extend: tuple[int, ...]
    overlaps: bool
    placed: bool
    symbols: bool
    edge: int

    def patches(self, batch: Batch) -> Tensor:
        """Cut the ``signal`` [B, C, *size] of a batch into [B, N, P] without learning anything."""
        ...

    def pad(self, batch: Batch) -> Tensor | None:
        """Return which tokens hold padding, bool [B, N]: nobody attends to them, scores or pools them. None: none."""
        ...

    def learned_on(self, grid: Grid) -> None:
        """Take the positions of another grid, from which those of its own are interpolated as any other's."""
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
        """Invert ``patches`` exactly, back to what was cut: the signal, or for sound its spectrogram."""
        ...


@runtime_checkable
class StreamsSignal(Protocol):
    """A tokenizer that embeds a signal as it comes, chunk by chunk; ``hop`` values are a token."""

    hop: int

    def step(self, chunk: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Embed the next chunk [B, C, n * hop] of signals: [B, n, D], and what to hand in with the chunk after it."""
        ...


@runtime_checkable
class Widens(Protocol):
    """A tokenizer that makes more of a signal than it was: ``widens`` activations at once per value, at least 1."""

    widens: float


class Backbone(Protocol):
    """Turns tokens into representations; knows no modality and no mask. An ``nn.Module``."""

    dim: int

    def __call__(
        self, tokens: Tensor, pad: Tensor | None = None, seeds: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        """Map [B, K, D'] to [B, K, D]; most keep the width.

        ``pad`` [B, K] is True where a token is padding. ``seeds`` [B] int64 drive stochastic depth while training, so
        that a sample sees the same network on any number of ranks. ``grid`` is the lattice on which the tokens lie, in
        row-major order, for those backbones to whom it is more than a set or a sequence.
        """
        ...

    def layers(
        self, tokens: Tensor, pad: Tensor | None = None, seeds: Tensor | None = None, grid: Grid | None = None
    ) -> list[Tensor]:
        """Return the output of every block, each put through the final norm if there is one: tensors [B, K, D]."""
        ...


@runtime_checkable
class Streams(Backbone, Protocol):
    """A causal backbone: a token's output depends on it and those before. Padding comes last and is seen by nobody."""

    def step(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Continue with the next tokens [B, n, D']: [B, n, D], and what to hand in with those after them.

        With ``state`` None they are the first. However a sequence is cut, the outputs are those of the whole.
        """
        ...


class EncoderModule(Protocol):
    """What survives pre-training: tokenizer, backbone and pooling. An ``nn.Module``."""

    modality: str
    dim: int
    num_prefix: int
    pooling: Pooling
    output: Literal["context", "latent"]
    """Whether it gives what the backbone made of patches or the embedded patches themselves."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which also cuts and restores patches for the objective."""
        ...

    def __call__(
        self,
        patches: Tensor,
        index: Tensor | None = None,
        seeds: Tensor | None = None,
        grid: Grid | None = None,
        pad: Tensor | None = None,
    ) -> Tensor:
        """Encode the patches [B, N, P] at ``index`` [B, K]: [B, num_prefix + K, D]; ``pad`` [B, N] marks padding."""
        ...

    @property
    def backbone(self) -> Backbone:
        """What turns embedded patches into representations."""
        ...

    def new_backbone(self) -> Backbone:
        """Return another backbone of the same settings, freshly initialised: for objectives that need several."""
        ...

    def layers(self, batch: Batch) -> list[Tensor]:
        """Return what every block puts out for the whole signals of a batch: tensors [B, num_prefix + N, D]."""
        ...

    def pool(self, latent: Tensor, pad: Tensor | None = None) -> Tensor:
        """Pool [B, num_prefix + N, D] to [B, D], padding [B, N] left out."""
        ...

    def save(self, folder: Any, state: Mapping[str, Tensor] | None = None) -> None:
        """Write an encoder folder, with the tensors of ``state`` instead of the module's own if given."""
        ...


class Objective(Protocol):
    """Turns a batch into a loss: the one root module that engines train. An ``nn.Module``."""

    inputs: tuple[str, ...]
    """The keys of the batch that hold signals, which a modality's views must give and all of which are used."""

    def __call__(self, batch: Batch) -> Step:
        """Return the loss and the metrics of one batch."""
        ...

    def encoders(self) -> dict[str, EncoderModule]:
        """Return what is kept after training, by modality."""
        ...

    def draw(self) -> Draw | None:
        """Return what the data worker draws for each sample, or None."""
        ...


class Reconstruction(NamedTuple):
    """What an objective made of a batch, as the tokenizer cuts it: float32 [B, C, *size] each."""

    original: Tensor
    filled: Tensor
    """The original with the masked patches predicted; what was hidden and not predicted is zero."""
    hidden: Tensor
    """1 where the encoder saw nothing, else 0."""
    past: Tensor | None = None
    """What it was predicted from besides, if there is a ``past``."""


class Progress(NamedTuple):
    """Where training stands, told to ``after_step`` (all weights whole): for teacher momentum, temperatures ..."""

    step: int
    steps: int


@runtime_checkable
class Warns(Objective, Protocol):
    """An objective that knows when its own metrics mean that a setting should be another."""

    def warning(self, line: Mapping[str, float]) -> str | None:
        """Return what a person should know of a line of metrics, in a sentence; it is told once."""
        ...


@runtime_checkable
class Reconstructs(Objective, Protocol):
    """An objective that can show what it predicts."""

    def reconstruct(self, batch: Batch) -> Reconstruction:
        """Return what it sees, and what it predicts of the rest."""
        ...


class Kept(NamedTuple):
    """A head that is kept beside an encoder."""

    name: str
    """What its files are called; the modalities know how to read it again."""
    head: nn.Module
    facts: dict[str, Any]
    """What it is made from again, as JSON values."""


@runtime_checkable
class Keeps(Objective, Protocol):
    """An objective that trains heads which are kept: a classifier, the way into a joint space."""

    def kept(self) -> dict[str, Kept]:
        """Return the head to be kept beside the encoder of each modality."""
        ...


class Media(Protocol):
    """Which files belong to a modality."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def suffixes(self) -> frozenset[str]:
        """What its files' names end in, lower case, with the dot."""
        ...

    @property
    def frame_suffixes(self) -> frozenset[str]:
        """What the names of pictures end in, a folder of which counts as one file; mostly none."""
        ...

    @property
    def timed(self) -> bool:
        """Whether a file has pieces from one second to another."""
        ...


class Modality(Media, Protocol):
    """One kind of media: decoding, transforms, tokenizer and pictures.

    Its settings are typed by the modality itself (``signal_type``, ``tokenizer_types``), hence ``Any`` here.
    """

    extent_words: tuple[str, ...]
    """What the numbers of ``inspect`` are."""

    @property
    def signal_type(self) -> type[BaseModel]:
        """The type of the recipe's ``signal`` section."""
        ...

    @property
    def tokenizer_types(self) -> tuple[type[Any], ...]:
        """The types of the recipe's ``model.tokenizer`` section, told apart by their ``name``; the first is usual."""
        ...

    def decode(self, path: str) -> Any:
        """Decode a file, or open it where it is large, for ``eval_transform``; raises BrokenFile.

        Must be picklable as a bound method.
        """
        ...

    def inspect(self, path: str) -> tuple[float, ...]:
        """Decode all of a file and return its extent, in the order of ``extent_words``; raises BrokenFile."""
        ...

    def sizes(self, signal: Any, tokenizer: Any) -> Sequence[Size]:
        """Return the sizes that signals may have; the first is the encoder's own. More than one means buckets."""
        ...

    def bucket(self, path: str, signal: Any) -> int:
        """Return which of ``sizes`` suits a file, from its header alone; 0 for a file that cannot be read."""
        ...

    def source(self, signal: Any) -> Media:
        """Return which files are trained on: mostly its own, but frames of videos are pictures too."""
        ...

    def inputs(self, signal: Any) -> tuple[str, ...]:
        """Return the keys under which a training sample has signals: ``signal``, perhaps ``past``."""
        ...

    def alone(self, signal: Any) -> Any:
        """Return the settings for one look at a file: what an encoder keeps of them."""
        ...

    def learn(self, paths: Sequence[str], signal: Any, tokenizer: Any) -> tuple[Any, list[str]]:
        """Return the tokenizer's settings with what is learned from the files to be trained on (a vocabulary), and what
        a person should know of it, in sentences.
        """
        ...

    def views(self, signal: Any, tokenizer: Any = None) -> Views:
        """Return what reads a file and makes training signals of it."""
        ...

    def synthetic(self, signal: Any, tokenizer: Any) -> Views:
        """Return what makes samples as ``views`` do, with all their keys, of noise or of paths that are texts."""
        ...

    def example(self, path: str, signal: Any, tokenizer: Any) -> dict[str, Tensor]:
        """Return the ``inputs`` of a file as evaluation would see it, nothing drawn: [C, *size], perhaps several views.

        Raises BrokenFile.
        """
        ...

    def eval_transform(self, signal: Any, tokenizer: Any) -> Callable[[Any], Tensor]:
        """Return what makes a decoded file an evaluation signal, float32 [C, *size] of the size that suits it.

        Where a file is looked at several times, [V, C, *size]: results are averaged over the V views.
        """
        ...

    def tokenizer(self, signal: Any, tokenizer: Any, dim: int) -> Tokenizer:
        """Make the tokenizer of width ``dim``."""
        ...

    def moments(self, path: str, signal: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return count, sum and sum of squares of what ``signal.mean`` normalises, [channels, 3]; raises BrokenFile."""
        ...

    def picture(self, x: Tensor, signal: Any) -> np.ndarray[Any, Any]:
        """Draw what the tokenizer cuts, [C, *size], as a uint8 picture [h, w, 3]."""
        ...

    def lattice(self, values: np.ndarray[Any, Any], grid: Grid) -> np.ndarray[Any, Any]:
        """Arrange one value (or row of values) per token, [N, ...], as ``picture`` does: [rows, columns, ...].

        Of moving pictures there is one frame per step of time.
        """
        ...


Micros: TypeAlias = Sequence[Batch]
"""The micro-batches of one optimiser step on one rank."""
