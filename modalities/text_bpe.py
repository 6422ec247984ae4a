"""Byte-level BPE (Sennrich et al., arXiv:1508.07909) with the rules and the numbering of CLIP's vocabulary.

A text is normalised (NFC, white space to one space, lower case) and split into words, and each word's bytes are merged
pair by pair. A vocabulary is determined by its merges, written as one text, a merge a line: its tokens are the 256
bytes, the same at the end of a word, what each merge makes in turn, and start and end of text.
"""

import gzip
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from mmssl.errors import UserError, sibling

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Pipeline
    from tokenizers.models import BPE

WORD_END = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""CLIP's, less start and end of text: that a text speaks of them does not make it end there."""
_CLIP_MERGES = 49408 - 512 - 2
"""How many of the merges in CLIP's own file, ``bpe_simple_vocab_16e6.txt``, its models use."""
_LONGEST_WORD, _LONGEST_PIECE = 64, 1000
"""Characters: of a text that are looked at for each token that is needed, and of what is learned from at a time."""
_PARALLELISM = "TOKENIZERS_PARALLELISM"
_PIECE = re.compile(rf"[^\n]{{1,{_LONGEST_PIECE}}}\S{{0,{_LONGEST_WORD}}}")
_ASKED = os.environ.get(_PARALLELISM)
_PROCESS = os.getpid()


def _alphabet() -> dict[str, int]:
    """Return the printable character that stands for each byte, in CLIP's order: printable bytes come first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _alphabet()
_BASE = [*_BYTES, *(letter + WORD_END for letter in _BYTES)]
LEAST_VOCABULARY = len(_BASE) + 2


@lru_cache(maxsize=8)
def vocabulary(merges: str) -> dict[str, int]:
    """Return every token's number; raises ValueError for a line that does not join two tokens."""
    tokens = dict.fromkeys(_BASE)
    for number, line in enumerate(_lines(merges), start=1):
        left, _, right = line.partition(" ")
        if left not in tokens or right not in tokens:
            raise ValueError(
                f"line {number} of the merges, {line!r}, does not join two tokens that are there before it"
            )
        tokens[left + right] = None
    return {token: i for i, token in enumerate([*tokens, START, END])}


def _lines(merges: str) -> list[str]:
    # Not splitlines, which takes letters of the alphabet for ends of lines.
    return merges.split("\n") if merges else []


class Coder:
    """Turns texts into numbers of tokens, and these into words."""

    def __init__(self, merges: str) -> None:
        from tokenizers.models import BPE

        numbers = vocabulary(merges)
        self.tokens = [*numbers]
        self.start, self.end = numbers[START], numbers[END]
        pairs = [(left, right) for left, _, right in (line.partition(" ") for line in _lines(merges))]
        self._pipeline = _pipeline(BPE(vocab=numbers, merges=pairs, end_of_word_suffix=WORD_END))

    def encode(self, text: str, context: int) -> list[int]:
        """Return start of text, the text's tokens and end of text: at most ``context`` numbers, cut behind a token.

        Raises ValueError where there is nothing but white space.
        """
        if not text.strip():
            raise ValueError("a text is needed, but there is nothing in it but white space")
        found = self._pipeline.encode(_beginning(text, context), add_special_tokens=False).ids
        return [self.start, *found[: context - 2], self.end]

    def too_long(self, texts: Sequence[str], context: int) -> int:
        """Return how many of the texts ``encode`` cuts; they are split into words on all cores."""
        # A letter of ASCII is a token at most, and what normalises a text makes no other letters of it.
        sure = (text.isascii() and len(text) - text.count(" ") <= context - 2 for text in texts)
        unsure = [_beginning(text, context) for text, short in zip(texts, sure, strict=True) if not short]
        with _in_parallel():
            found = self._pipeline.encode_batch_fast(unsure, add_special_tokens=False)
        return sum(len(encoding) > context - 2 for encoding in found)

    def spelling(self, number: int) -> bytes:
        """Return the bytes of a token, and a space where it ends a word."""
        token = self.tokens[number]
        if token in (START, END):
            return token.encode()
        whole = token.removesuffix(WORD_END)
        return bytes(_BYTES[letter] for letter in whole) + b" " * (whole != token)

    def decode(self, numbers: Sequence[int]) -> str:
        """Return the words that tokens spell, one space between them, without start and end of text."""
        spelt = b"".join(self.spelling(number) for number in numbers if number not in (self.start, self.end))
        return spelt.decode("utf-8", "replace").strip(" ")


@lru_cache(maxsize=8)
def coder(merges: str) -> Coder:
    """Return the coder of a vocabulary, made once in a process; raises ValueError for what are no merges."""
    return Coder(merges)


def learn_merges(texts: Iterable[str], vocab_size: int) -> str:
    """Return the merges of a vocabulary of at most ``vocab_size`` tokens for texts, whatever their order.

    What is there once only is not merged.
    """
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    # Known from the start, all base tokens have fixed numbers, and these decide between pairs that are as frequent.
    trainer = BpeTrainer(
        vocab_size=vocab_size - 2,
        min_frequency=2,
        special_tokens=_BASE,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    pipeline = _pipeline(BPE(end_of_word_suffix=WORD_END))
    with _in_parallel():
        # In lines, or pieces where they are long: the library takes for ever over words without an end.
        pipeline.train_from_iterator((piece for text in texts for piece in _PIECE.findall(text)), trainer)
    return "\n".join(" ".join(pair) for pair in json.loads(pipeline.to_str())["model"]["merges"])


def read_merges(path: str, vocab_size: int) -> str:
    """Return the merges in a folder with ``merges.txt``, or in such a file, which may be packed by gzip.

    Of ``bpe_simple_vocab_16e6.txt`` they are those that CLIP uses. A ``vocab.json`` beside them must number tokens as
    they do. Raises UserError where they cannot be read or are of more than ``vocab_size`` tokens.
    """
    given = Path(path)
    file = given / "merges.txt" if given.is_dir() else given
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        lines = data.decode("utf-8").replace("\r\n", "\n").strip("\n").split("\n")
    except FileNotFoundError:
        raise UserError(f"model.tokenizer.vocabulary: {file} does not exist{sibling(file)}") from None
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"model.tokenizer.vocabulary: {file} cannot be read ({error})") from None
    lines = lines["#version" in lines[0] :]
    if file.name.startswith("bpe_simple_vocab"):
        lines = lines[:_CLIP_MERGES]
    try:
        numbers = vocabulary(merges := "\n".join(lines))
    except ValueError as error:
        raise UserError(f"model.tokenizer.vocabulary: {file}: {error}") from None
    if len(numbers) > vocab_size:
        raise UserError(
            f"model.tokenizer.vocab_size {vocab_size} is less than the {len(numbers)} tokens of {file}; set "
            f"model.tokenizer.vocab_size={len(numbers)}"
        )
    _check_numbers(file.with_name("vocab.json"), numbers)
    return merges


def _check_numbers(file: Path, numbers: dict[str, int]) -> None:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UserError(f"model.tokenizer.vocabulary: {file} cannot be read ({error})") from None
    if stored != numbers:
        raise UserError(
            f"model.tokenizer.vocabulary: {file} does not number tokens as CLIP does: bytes, bytes at the end of a "
            "word, merges in their order, start and end of text"
        )


def _pipeline(model: "BPE") -> "Pipeline":
    from tokenizers import Regex, Tokenizer
    from tokenizers.normalizers import NFC, Lowercase, Replace
    from tokenizers.normalizers import Sequence as Normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Split
    from tokenizers.pre_tokenizers import Sequence as Splitters

    pipeline = Tokenizer(model)
    pipeline.normalizer = Normalizers([NFC(), Replace(Regex(r"\s+"), " "), Lowercase()])
    words = Split(Regex(_WORD), behavior="removed", invert=True)
    pipeline.pre_tokenizer = Splitters([words, ByteLevel(add_prefix_space=False, use_regex=False)])
    return pipeline


@contextmanager
def _in_parallel() -> Iterator[None]:
    """Let the library use all cores, unless a person said otherwise, and no more than one afterwards.

    Its threads do not survive a fork, so that a forked process that uses them waits for ever; and where nobody says
    whether it may, it warns of that at every fork.
    """
    os.environ[_PARALLELISM] = _ASKED or ("true" if os.getpid() == _PROCESS else "false")
    try:
        yield
    finally:
        os.environ[_PARALLELISM] = _ASKED or "false"


@lru_cache(maxsize=8)
def _first_words(count: int) -> re.Pattern[str]:
    return re.compile(rf"(?:\s*+\S[^ \t\n\r\f\v]{{0,{_LONGEST_WORD - 1}}}+){{0,{count}}}+\s*+")


def _beginning(text: str, context: int) -> str:
    """Return as many words of a text as make ``context`` tokens: a book is not read to its end for its first 77.

    What stands before white space does not depend on what comes behind it. Scripts without it are cut anywhere, but
    ``_LONGEST_WORD`` characters are more than one token.
    """
    match = _first_words(context).match(text)
    return text if match is None else match.group()
