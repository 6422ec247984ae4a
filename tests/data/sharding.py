"""Tar shards made by hand, and kinds of media without a modality behind them."""

import io
import tarfile
from pathlib import Path
from typing import NamedTuple

from mmssl.data.tars import TarMember, scan


class Kind(NamedTuple):
    name: str
    suffixes: frozenset[str]
    frame_suffixes: frozenset[str] = frozenset()
    timed: bool = False


IMAGE, AUDIO, TEXT = (Kind(n, frozenset(s)) for n, s in (("image", {".png"}), ("audio", {".wav"}), ("text", {".txt"})))


def write_tar(path, members, layout=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=layout) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def member(shard, i, **changes):
    entry = scan(str(shard))[i]
    return TarMember(str(shard), entry.offset, entry.size, entry.name)._replace(**changes)


def read(path):
    return Path(path).read_bytes()
