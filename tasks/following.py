"""Following what is marked in a film's first frame by the features of an encoder, whatever the marks are."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias, TypedDict, cast

import torch
from torch import Tensor

from mmssl.errors import MmsslError, UnusableData, UserError, is_out_of_memory, nearest
from mmssl.propagation import Propagator
from modalities.abilities import SeesFrames
from modalities.encoder import Encoder
from modalities.pixels import Frames, FrameSize

Layer: TypeAlias = int | Literal["patches"]

AT_ONCE = 4
"""Frames that go through an encoder together: few, as what every block puts out is in memory."""
LARGEST_SIDE = 4096
MOST_ENLARGED = 4
"""Frames are not made larger than this shorter side, in pixels, nor than so many times their own: it shows no more."""


class FollowOptions(TypedDict, total=False):
    """The options of following, as ``Settings`` has them."""

    layer: Layer | None
    short_side: int | None
    context: int
    radius: int
    topk: int
    temperature: float


@dataclass(frozen=True)
class Settings:
    """How labels are propagated; the defaults are those of DINO's evaluation on DAVIS."""

    layer: Layer | None = None
    """The block whose output is compared, from 1, or from -1 for the last; "patches" are the pixels themselves."""
    short_side: int | None = None
    """Pixels of the frames' shorter side as the encoder sees them; None for their own."""
    context: int = 7
    """Frames before the present one that are compared with it, besides the first."""
    radius: int = 12
    """How far away a similar token may be, in tokens; 0 means anywhere."""
    topk: int = 5
    """How many of the most similar tokens of all these frames count."""
    temperature: float = 0.1
    """Of the softmax that weighs them."""
    depth: int | None = None
    """How many blocks the encoder has; ``checked`` says it."""

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        what = "pixels of the patches" if self.layer == "patches" else f"features of block {self.layer}"
        if self.depth is not None and self.layer != "patches":
            what += " (the last)" if self.layer == self.depth else f" of {self.depth}"
        return f"{what}, {self.comparison()}"

    def described(self, weights: str) -> str:
        """Return whose weights were used, in the words given, and how; pixels have neither weights nor a block."""
        return f"{weights}; {self.comparison() if self.layer == 'patches' else self}"

    def comparison(self) -> str:
        """Return how it is compared, in words."""
        side = "in their own size" if self.short_side is None else f"with a shorter side of {self.short_side} pixels"
        where = f"within {self.radius} tokens" if self.radius else "anywhere"
        return (
            f"frames {side}; the {self.topk} most similar tokens {where} in the first and the last "
            f"{self.context} frames, at temperature {self.temperature:g}"
        )


def checked(encoder: Encoder, options: FollowOptions) -> Settings:
    """Return the settings, the layer counted from 1; raises UserError for what is not possible with this encoder."""
    settings = Settings(**options)
    if not isinstance(encoder.kind, SeesFrames):
        raise UserError(
            f"propagate follows what is seen in frames, but this encoder is of modality {encoder.modality}; "
            "give one of images or of videos"
        )
    if encoder.tokenizer.overlaps:
        raise UserError("propagate follows patches that lie side by side, but this encoder's overlap")
    for name, least in (("context", 0), ("radius", 0), ("topk", 1), ("short_side", 1)):
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, but got {value}")
    if not 0 < settings.temperature < math.inf:
        raise UserError(f"--temperature must be above 0, but got {settings.temperature:g}")
    return replace(settings, layer=_block(encoder, settings.layer), depth=max(1, encoder.config.model.blocks))


def parse_layer(text: str | None) -> Layer | None:
    """Return the layer that a person typed; UserError for what is neither a number nor "patches"."""
    if text is None or text == "patches":
        return cast(Layer | None, text)
    try:
        return int(text)
    except ValueError:
        hint = nearest(text, ["patches"])
        raise UserError(f"--layer {text}: give the number of a block, from 1, or patches{hint}") from None


def _block(encoder: Encoder, layer: Layer | None) -> Layer:
    if layer == "patches":
        return layer
    depth = max(1, encoder.config.model.blocks)
    wanted = depth if layer is None else layer + depth + 1 if layer < 0 else layer
    if not 1 <= wanted <= depth:
        raise UserError(
            f"--layer {layer}: this encoder has {depth} blocks; give 1 to {depth}, -1 for the last, or patches"
        )
    return wanted


def fresh(encoder: Encoder, seed: int) -> Encoder:
    """Return an encoder of the same shape and on the same device with random weights, those of ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Encoder(encoder.config).to(encoder.device).eval()


class Follower:
    """Carries soft labels [N, C] of a film's first frame on to the frames that follow, N tokens of ``grid`` each."""

    def __init__(self, encoder: Encoder, settings: Settings, frame: FrameSize) -> None:
        self.encoder, self.layer = encoder.eval(), settings.layer
        patch = encoder.tokenizer.patch_size[-2:]
        self.size = fitting(frame, settings.short_side, (patch[0], patch[1]))
        self.grid = self.size[0] // patch[0], self.size[1] // patch[1]
        self._propagator = Propagator(self.grid, settings.context, settings.radius, settings.topk, settings.temperature)

    def start(self, frame: Frames, labels: Tensor) -> None:
        """Begin with the first frame, uint8 [1, H, W, 3], and its labels."""
        with _in_memory():
            self._propagator.start(self.features(frame)[0], labels.to(self.encoder.device))

    def follow(self, frames: Frames) -> Iterator[Tensor]:
        """Yield the labels of the next frames, uint8 [n, H, W, 3], one after the other."""
        for first in range(0, len(frames), AT_ONCE):
            with _in_memory():
                several = self.features(frames[first : first + AT_ONCE])
            for features in several:
                with _in_memory():
                    labels = self._propagator.step(features)
                yield labels

    @torch.no_grad()
    def features(self, frames: Frames) -> Tensor:
        """Return what is compared, float32 [n, N, D], of frames uint8 [n, H, W, 3]; UnusableData for NaN in it."""
        encoder = self.encoder
        kind, config = encoder.kind, encoder.config
        assert isinstance(kind, SeesFrames)
        signal = kind.stills(frames, self.size, config.signal, config.model.tokenizer).to(encoder.device)
        if self.layer == "patches":
            return encoder.tokenizer.patches({"signal": signal})
        assert self.layer is not None
        features = encoder.layers({"signal": signal})[self.layer - 1][:, encoder.num_prefix :]
        if not bool(features.isfinite().all()):
            raise UnusableData(
                f"the encoder's features of block {self.layer} are NaN or infinite: its training has diverged, so take "
                "an earlier checkpoint"
            )
        return features


@contextmanager
def _in_memory() -> Iterator[None]:
    # What to make smaller is something else here than in training.
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        first = (str(error) or "out of memory").splitlines()[0]
        raise MmsslError(f"out of memory ({first}); lower --short-side or --context") from None


def fitting(frame: FrameSize, short_side: int | None, patch: tuple[int, int]) -> FrameSize:
    """Return the size that patches divide next to a frame's, scaled to that shorter side: at least one patch.

    Raises UserError for a shorter side that is far larger than the frame's.
    """
    most = min(LARGEST_SIDE, MOST_ENLARGED * min(frame))
    if short_side is not None and short_side > most:
        raise UserError(
            f"--short-side {short_side} is too large for frames of {frame[1]} x {frame[0]} pixels: at most {most}"
        )
    scale = 1.0 if short_side is None else short_side / min(frame)
    height, width = (max(1, round(side * scale / p)) * p for side, p in zip(frame, patch, strict=True))
    return height, width
