"""What ``mmssl data pack`` leaves beside its shards, and whether the shards are still what it wrote."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmssl.errors import UserError

FACTS = "shards.json"


def checksum(file: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_facts(folder: Path) -> dict[str, Any] | None:
    """Return what is known of the shards in a folder, None where nothing is; raises UserError for other files."""
    file = folder / FACTS
    try:
        facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); it was written by 'data pack'") from None
    lists = [facts.get(key) for key in ("modalities", "sources", "shards")] if isinstance(facts, dict) else []
    if not lists or not all(isinstance(one, list) and one for one in lists) or not all(map(right, facts["shards"])):
        raise UserError(f"{file} is not what 'data pack' writes; is it of another program?")
    return facts


def right(shard: Any) -> bool:
    """Whether what was read says of a shard what ``data pack`` writes of one."""
    kinds = {"file": str, "samples": int, "bytes": int, "sha256": str}
    return isinstance(shard, dict) and all(isinstance(shard.get(key), kind) for key, kind in kinds.items())


def verify(folder: Path, facts: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Yield each shard's name and what is wrong with it, None where it is as it was written."""
    for shard in facts["shards"]:
        yield shard["file"], fault(folder / shard["file"], shard)


def fault(file: Path, shard: dict[str, Any]) -> str | None:
    """Return what is wrong with a shard, in a clause; None where it is as it was written."""
    try:
        size = file.stat().st_size
        if size != shard["bytes"]:
            return f"has {size} bytes, but was written with {shard['bytes']}"
        return None if checksum(file) == shard["sha256"] else "its checksum is not that with which it was written"
    except FileNotFoundError:
        return "no such file"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
