"""Heads that are kept beside an encoder, in its folder: tensors, and as JSON what they are made from again."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmssl.errors import UserError
from mmssl.files import save_tensors, write_json

FORMAT = 1


class Reader(Protocol):
    """What knows how files become signals."""

    @property
    def decode(self) -> Callable[[str], Any]:
        """What decodes a file; picklable, because data workers call it."""
        ...

    @property
    def transform(self) -> Callable[[Any], Tensor]:
        """What makes a signal of it, float32 [C, *size], or several views, [V, C, *size]; picklable."""
        ...


class BatchReader(Reader, Protocol):
    """The same, and how many of them it takes at once."""

    @property
    def batch_size(self) -> int:
        """How many signals at once."""
        ...


class OnEncoder:
    """What stands on an encoder, or on something else that does, and reads files as that does: its ``reader``."""

    reader: BatchReader

    @property
    def decode(self) -> Callable[[str], Any]:
        """The reader's decoder."""
        return self.reader.decode

    @property
    def transform(self) -> Callable[[Any], Tensor]:
        """The reader's evaluation transform."""
        return self.reader.transform

    @property
    def batch_size(self) -> int:
        """The reader's."""
        return self.reader.batch_size


def has_head(folder: Path, name: str) -> bool:
    """Return whether there is a head of this name in an encoder folder."""
    return (folder / f"{name}.safetensors").is_file()


def write_head(
    folder: Path, name: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], what: str, usage: str
) -> None:
    """Write a head into an encoder folder, and add to its README ``what`` it is and how to use it."""
    save_tensors(folder / f"{name}.safetensors", tensors)
    write_json(folder / f"{name}.json", {"format": FORMAT, **facts})
    with (folder / "README.md").open("a", encoding="utf-8") as card:
        card.write(f"\nIt also holds {what}, `{name}.safetensors` and `{name}.json`: {usage}\n")


def read_head(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the facts and the tensors of a head; raises UserError, one sentence, where they cannot be read."""
    file = folder / f"{name}.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        tensors = load_file(folder / f"{name}.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: not a readable {name} ({error})") from None
    if not isinstance(facts, dict) or facts.pop("format", None) != FORMAT:
        raise UserError(f"{file}: not written in format {FORMAT}, which this mmssl reads")
    return facts, tensors
