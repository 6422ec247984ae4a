"""Texts: decode UTF-8, take passages of whole sentences or of bytes, or the tokens at the beginning, pictures of them.

Shapes: a signal is float32 [1, sentences, bytes of a sentence], [1, bytes] or [1, context], as the tokenizer asks for;
its values are those of ``modalities/text_tokens.py``.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from PIL import ImageDraw, ImageFont
from torch import Tensor

from mmssl.config import Piece
from mmssl.contracts import Grid, Size, Views
from mmssl.data.guard import BrokenFile, guarded
from modalities.looks import OneLook
from modalities.text_bpe import coder, learn_merges, read_merges
from modalities.text_read import LONGEST_CHARACTER, Document, Lines, boundary, bounded, excerpts, read, sentences
from modalities.text_settings import AnyTokenizer, BPETokenizer, ByteTokenizer, SentenceTokenizer, TextSignal
from modalities.text_tokens import VALUES, Bytes, Sentences, Subwords

LEAST_READ, READ_AHEAD = 2**16, 4
"""Training: what is read of a longer file, in bytes, and in passages if that is more: the first sentence of a passage
is then any in there, so that few begin where the reading did, within one."""
LINE, LINE_HEIGHT, MARGIN = 64, 14, 3
"""Pictures: bytes in a line where there are no sentences, and pixels."""
AT_ONCE = 4096
"""Texts that are split into tokens at a time where a vocabulary is learned: enough for all cores."""


class Text(OneLook):
    """The modality of text."""

    name = "text"
    frame_suffixes = frozenset[str]()
    timed = False
    extent_words: tuple[str, ...] = ("characters", "sentences")
    suffixes = frozenset({".txt"})
    signal_type = TextSignal
    tokenizer_types: tuple[type[Piece], ...] = (SentenceTokenizer, ByteTokenizer, BPETokenizer)

    def decode(self, path: str) -> Document:
        """Return a whole text, of a file or of the path itself; raises BrokenFile.

        That is for what is empty, no UTF-8 text or absurdly large.
        """
        return guarded(read, path, timeout=None)

    def inspect(self, path: str) -> tuple[int, int]:
        """Decode a file and return its characters and sentences; raises BrokenFile."""
        text = self.decode(path).text
        return len(text), len(sentences(text))

    def moments(self, path: str, signal: TextSignal) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Raise BrokenFile: bytes are not normalised, so there is nothing to measure."""
        raise BrokenFile("texts are not normalised: modality text has no signal.mean and std")

    def learn(
        self, paths: Sequence[str], signal: TextSignal, tokenizer: AnyTokenizer
    ) -> tuple[AnyTokenizer, list[str]]:
        """Return the settings with a vocabulary, and how many of the texts are longer than the context, if any.

        Merges are read where ``vocabulary`` says, or learned from the texts, if there are none. Files that are broken
        are left out. Raises UserError for a vocabulary that cannot be read or has too many tokens.
        """
        if not isinstance(tokenizer, BPETokenizer):
            return tokenizer, []
        merges = tokenizer.merges
        if merges is None and tokenizer.vocabulary is not None:
            merges = read_merges(tokenizer.vocabulary, tokenizer.vocab_size)
        if merges is None:
            merges = learn_merges(self._texts(paths), tokenizer.vocab_size)
        total, cut, texts = 0, 0, self._texts(paths)
        while some := [*islice(texts, AT_ONCE)]:
            total += len(some)
            cut += coder(merges).too_long(some, signal.context)
        words = f"{cut:,} of {total:,} texts are longer than signal.context {signal.context} tokens and are cut"
        return tokenizer.model_copy(update={"merges": merges}), [words] if cut else []

    def _texts(self, paths: Sequence[str]) -> Iterator[str]:
        for path in paths:
            with suppress(BrokenFile):
                yield self.decode(path).text

    def sizes(self, signal: TextSignal, tokenizer: AnyTokenizer) -> tuple[Size]:
        """Return the one size of training signals: (sentences, bytes of each), bytes of whole tokens, or tokens."""
        if isinstance(tokenizer, BPETokenizer):
            return ((signal.context,),)
        if isinstance(tokenizer, ByteTokenizer):
            return ((signal.bytes // tokenizer.hop * tokenizer.hop,),)
        return ((signal.sentences, signal.length),)

    def bucket(self, path: str, signal: TextSignal) -> int:
        """Return 0: there is one size."""
        return 0

    def views(self, signal: TextSignal, tokenizer: AnyTokenizer | None = None) -> Views:
        """Return what reads a file and takes random passages of it, or for BPE its beginning, nothing drawn.

        Raises ValueError where a vocabulary is still to be learned.
        """
        if isinstance(tokenizer, BPETokenizer):
            return _Beginnings(_TokenTransform(signal.context, tokenizer.known()))
        return TextViews(signal.lines)

    def synthetic(self, signal: TextSignal, tokenizer: AnyTokenizer | None = None) -> Views:
        """Return ``views``: the paths are texts."""
        return self.views(signal, tokenizer)

    def eval_transform(self, signal: TextSignal, tokenizer: AnyTokenizer) -> Callable[[Document], Tensor]:
        """Return what makes of a decoded text one passage [1, *size], or several [V, 1, *size] that follow each other.

        Where passages differ in length, which is by one sentence or by less than a token, zeros fill the shorter ones.
        For BPE it is the tokens at the beginning. Raises ValueError where a vocabulary is still to be learned.
        """
        if isinstance(tokenizer, BPETokenizer):
            return _TokenTransform(signal.context, tokenizer.known())
        return _EvalTransform(signal, tokenizer)

    def tokenizer(self, signal: TextSignal, tokenizer: AnyTokenizer, dim: int) -> Sentences | Bytes | Subwords:
        """Return a tokenizer of ``dim`` channels; raises ValueError where no token fits."""
        if isinstance(tokenizer, BPETokenizer):
            return Subwords(signal.context, tokenizer.vocab_size, dim, tokenizer.positions, tokenizer.merges)
        if isinstance(tokenizer, SentenceTokenizer):
            return Sentences(signal.sentences, signal.length, dim, tokenizer.embed_dim, tokenizer.kernel)
        ((count,),) = self.sizes(signal, tokenizer)
        if not count:
            raise ValueError(f"signal.bytes {signal.bytes} is shorter than a token of {tokenizer.hop} bytes")
        return Bytes(count, dim, tokenizer.embed_dim, tokenizer.kernels, tokenizer.strides, tokenizer.norm)

    def picture(self, x: Tensor, signal: TextSignal) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Write what was cut in black on white, uint8 [h, w, 3]: a sentence, a token or ``LINE`` bytes in a line.

        Characters that a small Latin font does not have are question marks.
        """
        lines = [_legible(row) for row in _rows(x[0])]
        font = ImageFont.load_default()
        width = 2 * MARGIN + math.ceil(max(font.getlength(line) for line in lines))
        page = PIL.Image.new("RGB", (width, LINE_HEIGHT * len(lines)), "white")
        draw = ImageDraw.Draw(page)
        for i, line in enumerate(lines):
            draw.text((MARGIN, LINE_HEIGHT * i), line, fill="black", font=font)
        return np.asarray(page)

    def lattice(self, values: np.ndarray[Any, Any], grid: Grid) -> np.ndarray[Any, Any]:
        """Arrange values of tokens [N, ...] from top to bottom: [N, 1, ...], those of a line where it is.

        Tokens of bytes share lines, so theirs are on or beside the line that they are of.
        """
        return values[:, np.newaxis]


@dataclass(frozen=True)
class TextViews:
    """Opens a text once and takes of it one random passage per generator, float32 [1, *size]; raises BrokenFile.

    Passages begin with any sentence, or byte that begins a character, after which enough follow; of a shorter text it
    is all, and zeros.
    """

    lines: Lines

    def __call__(self, path: str, rngs: Sequence[np.random.Generator], size: Size) -> list[dict[str, Tensor]]:
        """Return the passages; each generator gives the part that is read of a long file, and the place in it."""
        return guarded(partial(self._passages, rngs=rngs, size=size), path, timeout=None)

    def _passages(self, path: str, rngs: Sequence[np.random.Generator], size: Size) -> list[dict[str, Tensor]]:
        parts = excerpts(path, rngs, max(LEAST_READ, READ_AHEAD * math.prod(size)))
        return [{"signal": self._passage(part, rng, size)} for part, rng in zip(parts, rngs, strict=True)]

    def _passage(self, part: Document, rng: np.random.Generator, size: Size) -> Tensor:
        if len(size) == 1:
            data = part.text.encode()
            start = boundary(data, _start(rng, len(data), size[0]))
            return _filled([data[start : boundary(data, start + size[0])]], (1, *size))[0].unsqueeze(0)
        found = bounded(sentences(part.text, self.lines), size[1])
        start = _start(rng, len(found), size[0])
        return _filled(found[start : start + size[0]], size).unsqueeze(0)


@dataclass(frozen=True)
class _TokenTransform:
    context: int
    merges: str

    def __call__(self, document: Document) -> Tensor:
        found = coder(self.merges).encode(_document(document).text, self.context)
        signal = torch.zeros(1, self.context)
        signal[0, : len(found)] = torch.tensor(found) + 1
        return signal


@dataclass(frozen=True)
class _Beginnings:
    """Opens a text once and gives each generator its first tokens, float32 [1, context]; raises BrokenFile."""

    transform: _TokenTransform

    def __call__(self, path: str, rngs: Sequence[np.random.Generator], size: Size) -> list[dict[str, Tensor]]:
        signal = guarded(lambda name: self.transform(read(name)), path, timeout=None)
        return [{"signal": signal} for _ in rngs]


@dataclass(frozen=True)
class _EvalTransform:
    signal: TextSignal
    tokenizer: SentenceTokenizer | ByteTokenizer

    def __call__(self, document: Document) -> Tensor:
        document = _document(document)
        views = self._bytes(document) if isinstance(self.tokenizer, ByteTokenizer) else self._sentences(document)
        return views if len(views) > 1 else views[0]

    def _sentences(self, document: Document) -> Tensor:
        found = bounded(sentences(document.text, self.signal.lines), self.signal.length)
        places = _places(len(found), -(-len(found) // self.signal.sentences))
        most = max(stop - start for start, stop in pairwise(places))
        passages = [_filled(found[start:stop], (most, self.signal.length)) for start, stop in pairwise(places)]
        return torch.stack(passages).unsqueeze(1)

    def _bytes(self, document: Document) -> Tensor:
        assert isinstance(self.tokenizer, ByteTokenizer)
        data, hop = document.text.encode(), self.tokenizer.hop
        most = max(1, self.signal.bytes // hop) * hop
        # Passages that begin with a character may be that much longer than others.
        views = 1 if len(data) <= most else -(-len(data) // max(1, most - LONGEST_CHARACTER))
        places = [boundary(data, place) for place in _places(len(data), views)]
        passages = [data[start:stop] for start, stop in pairwise(places) if stop > start]
        tokens = -(-max(map(len, passages)) // hop)
        return _filled(passages, (len(passages), tokens * hop)).unsqueeze(1)


def _document(item: Any) -> Document:
    if not isinstance(item, Document):
        raise TypeError(f"a path, a decoded text or a float tensor is needed, but got {type(item).__name__}")
    return item


def _start(rng: np.random.Generator, there: int, wanted: int) -> int:
    return int(rng.integers(max(1, there - wanted + 1)))


def _places(count: int, parts: int) -> list[int]:
    return [count * i // parts for i in range(parts + 1)]


def _filled(rows: Sequence[bytes], shape: Size) -> Tensor:
    """Return rows of bytes as values of a signal, with zeros behind each and below: float32 ``shape``."""
    values = np.zeros(shape, np.float32)
    for line, row in zip(values, rows, strict=False):
        line[: len(row)] = np.frombuffer(row, np.uint8)
        line[: len(row)] += 1
    return torch.from_numpy(values)


def _rows(x: Tensor) -> Tensor:
    """Return the lines of a picture of [S, L] or [bytes], as bytes, and -1 where there is none: int64 [lines, L]."""
    values = x.detach().cpu().float().round().clamp(0, VALUES - 1).long() - 1
    if values.ndim == 2:
        return values
    missing = -len(values) % LINE
    lines: Tensor = F.pad(values, (0, missing), value=-1).unflatten(0, (-1, LINE))
    return lines


def _legible(row: Tensor) -> str:
    text = bytes(value for value in row.tolist() if value >= 0).decode("utf-8", "replace")
    printed = "".join(letter if letter.isprintable() else " " for letter in text)
    return printed.encode("latin-1", "replace").decode("latin-1")
