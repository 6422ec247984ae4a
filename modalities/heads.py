"""Heads that are kept beside an encoder, in its folder: tensors, and as JSON what they are made from again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmssl.errors import UserError
from mmssl.files import save_tensors, write_json

FORMAT = 1


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
