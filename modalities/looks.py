"""What a training sample is made of: one picture, a frame of a video, or two looks of which one is to be predicted."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, field_validator
from torch import Tensor

from mmssl.config import Piece
from mmssl.contracts import Media, Modality
from modalities.video_read import FOLDER_FPS

Share = Annotated[float, Field(gt=0, le=1)]
Above0 = Annotated[float, Field(gt=0)]


class Frame(Piece):
    """One frame of a video, as if it were a picture; all are equally likely."""

    kind: Literal["frame"] = "frame"
    folder_fps: Above0 = FOLDER_FPS
    """Frames per second of a folder of pictures, by which pieces of it are found."""


class FramePair(Piece):
    """Two frames of one video, the later one to be predicted from the earlier (SiamMAE, arXiv:2305.14344, section 3).

    Both are mirrored and augmented alike, and unless ``jitter`` says otherwise cropped alike.
    """

    past: ClassVar[str] = "past"
    """What the look that is predicted from is called where both are shown."""
    kind: Literal["frames"] = "frames"
    gap: tuple[Above0, Above0] = (4, 48)
    """Least and greatest distance; all in between are equally likely, as are all places in the video."""
    unit: Literal["frames", "seconds"] = "frames"
    """What the gap is counted in; the paper's 4 to 48 frames are of videos with 30 frames per second."""
    jitter: bool = False
    """Crop each of the two by itself: then hardly anything stays in its place, and to look there is of no use."""
    folder_fps: Above0 = FOLDER_FPS
    """Frames per second of a folder of pictures."""

    @field_validator("gap")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        return _ordered(value)

    def frames(self, fps: float) -> tuple[int, int]:
        """Return the gap in frames of a video with so many per second, at least 1."""
        least, most = (max(1, round(at * fps) if self.unit == "seconds" else round(at)) for at in self.gap)
        return least, most


class CropPair(Piece):
    """Two crops of one picture, one to be predicted from the other (CropMAE, arXiv:2403.17823, section 3).

    Each is mirrored and augmented by itself.
    """

    past: ClassVar[str] = "other crop"
    kind: Literal["crops"] = "crops"
    nested: bool = True
    """The crop to be predicted lies within the other one; or both are drawn alike, each by itself."""
    inner_scale: tuple[Share, Share] = (0.3, 0.6)
    """nested: least and greatest fraction of the outer crop's area in the inner one."""

    @field_validator("inner_scale")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        return _ordered(value)


Look: TypeAlias = Annotated[Frame | FramePair | CropPair, Field(discriminator="kind")]


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"is [least, greatest], but got {list(value)}")
    return value


class OneLook:
    """What holds for a modality whose files are looked at once per sample."""

    def source(self: Modality, signal: Any) -> Media:
        """Return the modality itself: it is trained on its own files."""
        return self

    def inputs(self, signal: Any) -> tuple[str, ...]:
        """Return ``signal`` alone."""
        return ("signal",)

    def alone(self, signal: Any) -> Any:
        """Return the settings as they are."""
        return signal

    def learn(self, paths: Sequence[str], signal: Any, tokenizer: Any) -> tuple[Any, list[str]]:
        """Return the settings as they are: nothing is learned from the files before training."""
        return tokenizer, []

    def example(self: Modality, path: str, signal: Any, tokenizer: Any) -> dict[str, Tensor]:
        """Return a file's evaluation signal, [C, *size] or several views of it; raises BrokenFile."""
        return {"signal": self.eval_transform(signal, tokenizer)(self.decode(path))}
