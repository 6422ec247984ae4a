"""The settings of pictures: how they are cropped and normalised, and cut into tokens."""

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, ValidationInfo, field_validator, model_validator

from mmssl.backbones.positions import PositionKind
from mmssl.backbones.resnet import Norm
from mmssl.config import Piece
from modalities.augment import Augment
from modalities.looks import Frame, FramePair, Look
from modalities.patch_augment import PatchAugment
from modalities.patches import TargetKind


def _pair(value: Any) -> Any:
    # A YAML 224 means a square: [224, 224].
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


class ImageSignal(Piece):
    """How a decoded picture becomes a signal."""

    size: tuple[int, int] = (224, 224)
    """Height and width in pixels; one number is a square."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Training: least and greatest fraction of the picture's area in a crop (MAE, arXiv:2111.06377, table 8)."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Training: least and greatest width / height of a crop over that of ``size`` (Inception, arXiv:1409.4842)."""
    buckets: tuple[tuple[int, int], ...] = ()
    """Further sizes [height, width]. Each picture is cropped to the one, ``size`` included, whose aspect ratio is
    nearest to its own, and a batch holds pictures of one size."""
    flip: bool = True
    """Training: mirror every other picture left to right."""
    augment: Augment = Augment()
    """Training: what else is done to a crop."""
    patch_augment: PatchAugment = PatchAugment()
    """Training: what is done to each patch by itself, for patches that overlap (model.tokenizer 'crops')."""
    look: Look | None = None
    """Training: what a sample is if not a crop of a picture. kind frame: of a frame of a video, and videos are what is
    trained on. For objectives that predict one look from another (siam_mae), kind frames: of two frames of a video,
    kind crops: two crops of a picture."""
    draft: bool = True
    """Training: decode a JPEG file at 1/2, 1/4 or 1/8 where even its smallest crop has ``size`` pixels that way.
    Far faster for large photographs; the pixels differ slightly from a full decoding, which evaluation always does."""
    resize_ratio: float = 0.875
    """Evaluation: the centre crop's share of the resized picture's side; MAE's is 224 / 256, 1 leaves no margin."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted per channel, on a scale of 0 to 1 (ImageNet's)."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Divided by per channel (ImageNet's)."""

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return _pair(value)

    @field_validator("buckets", mode="before")
    @classmethod
    def _squares(cls, value: Any) -> Any:
        return [_pair(size) for size in value] if isinstance(value, list | tuple) else value

    @field_validator("buckets")
    @classmethod
    def _positive_sizes(cls, value: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        if any(side <= 0 for size in value for side in size):
            raise ValueError(f"every side must be greater than 0, but got {[list(size) for size in value]}")
        return value

    @field_validator("size", "std")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if min(value) <= 0:
            raise ValueError(f"every number must be greater than 0, but got {list(value)}")
        return value

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        low, high = value
        if not 0 < low <= high:
            raise ValueError(f"is [least, greatest], both greater than 0, but got {list(value)}")
        if info.field_name == "crop_scale" and high > 1:
            raise ValueError(f"is a fraction of the picture's area, at most 1, but got {list(value)}")
        return value

    @field_validator("resize_ratio")
    @classmethod
    def _fraction(cls, value: float) -> float:
        if not 0 < value <= 1:
            raise ValueError(f"is the share of a side that is kept, above 0 and at most 1, but got {value}")
        return value

    @model_validator(mode="after")
    def _no_buckets_of_videos(self) -> "ImageSignal":
        if self.buckets and isinstance(self.look, Frame | FramePair):
            raise ValueError("buckets are for pictures, not for the frames of videos (signal.look)")
        return self

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """All sizes that signals may have, the encoder's own first."""
        return self.size, *self.buckets


class ImageTokenizer(Piece):
    """How a picture is cut into tokens."""

    name: Literal["patches"] = "patches"
    patch_size: tuple[int, int] = (16, 16)
    """Height and width of a patch in pixels; one number is a square. Both must divide ``signal.size``."""
    positions: PositionKind = "sincos"
    """Fixed sine-cosine positions, or learned ones."""
    target: TargetKind = "normalized"
    """What a reconstruction predicts: patches normalised one by one (MAE, section 4.1), or raw values."""

    @field_validator("patch_size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return _pair(value)

    @field_validator("patch_size")
    @classmethod
    def _positive(cls, value: tuple[int, int]) -> tuple[int, int]:
        if min(value) <= 0:
            raise ValueError(f"both sides must be greater than 0, but got {list(value)}")
        return value


class CropTokenizer(Piece):
    """How a picture is cut into patches that overlap, and the residual network that makes a token of each.

    The defaults are CPC's (arXiv:1807.03748, section 3.2): 7 x 7 patches of 256 x 256 pixels, ResNet-v2-101 up to its
    third stage. There is no batch norm: what it tells a patch about the batch makes the prediction trivial (CPC v2,
    arXiv:1905.09272, section 4).
    """

    name: Literal["crops"] = "crops"
    patch_size: tuple[int, int] = (64, 64)
    """Height and width of a patch in pixels; one number is a square."""
    stride: tuple[int, int] = (32, 32)
    """Pixels from one patch to the next, down and to the right; one number is both. At most the patch's own."""
    blocks: tuple[Annotated[int, Field(gt=0)], ...] = (3, 4, 23)
    """Residual blocks of each stage; every stage but the first halves height and width."""
    channels: tuple[Annotated[int, Field(gt=0)], ...] = (256, 512, 1024)
    """Channels that the blocks of each stage give. Where the last are not the width of the tokens
    (model.backbone.input_dim), a linear map follows."""
    bottlenecks: tuple[Annotated[int, Field(gt=0)], ...] = (64, 128, 256)
    """Channels within the blocks of each stage."""
    norm: Norm = "layer"
    """layer: over all of a patch (CPC v2); group: over 32 groups of its channels; or none (CPC)."""

    _squares = field_validator("patch_size", "stride", mode="before")(_pair)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        stages = self.blocks, self.channels, self.bottlenecks
        if not len(self.blocks) == len(self.channels) == len(self.bottlenecks) > 0:
            raise ValueError(
                f"each stage needs blocks, channels and bottlenecks, but got {', '.join(str([*s]) for s in stages)}"
            )
        if not all(0 < step <= side for step, side in zip(self.stride, self.patch_size, strict=True)):
            raise ValueError(
                f"a stride of {[*self.stride]} leaves out pixels between patches of {[*self.patch_size]}; take one "
                "above 0 and at most the patch_size"
            )
        return self


AnyTokenizer: TypeAlias = ImageTokenizer | CropTokenizer
