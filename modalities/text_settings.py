"""The settings of texts: how one becomes a signal, and how that becomes tokens."""

import math
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, field_validator, model_validator

from mmssl.backbones.conv import Norm
from mmssl.backbones.positions import PositionKind
from mmssl.config import Piece
from mmssl.errors import UserError
from modalities.text_bpe import LEAST_VOCABULARY, vocabulary
from modalities.text_read import LONGEST_CHARACTER, Lines

Above0 = Annotated[int, Field(gt=0)]
GREATEST_VOCABULARY = 2**20
"""Four times the largest that are in use; the trainer takes memory for all that there may be."""


class TextSignal(Piece):
    """How a decoded text becomes a signal."""

    sentences: Above0 = 32
    """Tokenizer sentences: how many make a passage in training; evaluation cuts a text of more into passages, whose
    results are averaged."""
    length: Annotated[int, Field(ge=LONGEST_CHARACTER)] = 160
    """Tokenizer sentences: bytes of a sentence; of a longer one several are made."""
    bytes: Above0 = 1024
    """Tokenizer bytes: how many make a passage, in training and evaluation as ``sentences``."""
    context: Annotated[int, Field(ge=3)] = 77
    """Tokenizer bpe: tokens of a text, its start and end included (CLIP's 77); a longer text is cut, in training and
    evaluation alike."""
    lines: Lines = "end"
    """Tokenizer sentences. end: the end of a line ends a sentence too. wrapped: lines are broken anywhere, and an empty
    line ends a sentence."""


class SentenceTokenizer(Piece):
    """How a sentence becomes a token: one convolution over its bytes, ReLU, mean (arXiv:1807.03748, section 3.3)."""

    name: Literal["sentences"] = "sentences"
    embed_dim: Above0 = 32
    """Width of a byte's embedding; the paper embeds words."""
    kernel: Above0 = 7
    """Bytes that the convolution looks at, an odd number: about a word."""

    @field_validator("kernel")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"kernel must be odd, to have as many bytes on either side, but got {value}")
        return value


class ByteTokenizer(Piece):
    """How bytes become tokens: strided causal convolutions, as those over waveforms."""

    name: Literal["bytes"] = "bytes"
    embed_dim: Above0 = 32
    """Width of a byte's embedding."""
    kernels: tuple[Above0, ...] = (8, 4)
    """Bytes, then outputs of the layer before, that each layer looks at."""
    strides: tuple[Above0, ...] = (4, 2)
    """Their product is the bytes per token."""
    norm: Norm = "channel"
    """channel: over the channels of each moment by itself; or none."""

    @property
    def hop(self) -> int:
        """Bytes per token."""
        return math.prod(self.strides)


class BPETokenizer(Piece):
    """How words and parts of words become tokens: byte-level BPE, as in CLIP (arXiv:2103.00020, section 2.4)."""

    name: Literal["bpe"] = "bpe"
    vocab_size: Annotated[int, Field(ge=LEAST_VOCABULARY, le=GREATEST_VOCABULARY)] = 8192
    """Tokens that there may be (CLIP's are 49408): 256 bytes, the same at the end of a word, start and end of text, and
    one more per merge."""
    merges: str | None = None
    """What makes longer tokens of shorter ones, a merge a line in the order of learning; null is to be learned when
    training starts, from the texts themselves. Without any ("") every byte is a token."""
    vocabulary: str | None = None
    """Where merges are read that are not to be learned: a folder with CLIP's ``merges.txt``, or such a file."""
    positions: PositionKind = "learned"

    def known(self) -> str:
        """Return the merges; raises UserError where there are none yet."""
        if self.merges is None:
            raise UserError("model.tokenizer.merges is null: the vocabulary is learned when training starts")
        return self.merges

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.merges is not None and (size := len(vocabulary(self.merges))) > self.vocab_size:
            raise ValueError(f"vocab_size {self.vocab_size} is less than the {size} tokens that its merges make")
        return self


AnyTokenizer: TypeAlias = SentenceTokenizer | ByteTokenizer | BPETokenizer
