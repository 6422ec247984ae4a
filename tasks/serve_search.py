"""Search in a folder, as a service shows it: names in the folder, and pictures by ids that tell nothing."""

import asyncio
import hashlib
import hmac
import io
import secrets
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from mmssl.data import inline
from mmssl.data.guard import BrokenFile
from mmssl.objectives.clip import unit
from tasks.search_index import SearchIndex
from tasks.serve_limits import Limits
from tasks.serve_media import Decoders, check_extent, restrict
from tasks.serve_problem import Problem
from tasks.thumbnails import thumbnail

SIDE = 320
"""Pixels of a thumbnail's longer side."""
QUALITY = 85
KEPT = 20_000
"""Files that can be shown: the last ones that were found."""


class Search:
    """Answers searches of strangers: of the server's paths they get to see what is below the folder alone."""

    def __init__(self, index: SearchIndex, limits: Limits) -> None:
        """Search ``index``, which is there already; raises what it raises where it is not, or holds no file."""
        self._index, self._limits = index, limits
        index.nearest(torch.zeros(index.facts.dim), 1)
        self._secret = secrets.token_bytes(32)
        self._shown: OrderedDict[str, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._index)

    async def nearest(self, vector: Tensor, top: int) -> list[dict[str, Any]]:
        """Return [{"id", "name", "score"}, ...] for a vector float32 [d], best first; raises Problem for zero."""
        if not vector.any():
            raise Problem(422, "the model's answer to this file is zero, so that nothing is like it")
        hits = await asyncio.to_thread(self._index.nearest, unit(vector[None])[0], top)
        return [{"id": self._id(hit["path"]), "name": self.name(hit["path"]), "score": hit["score"]} for hit in hits]

    def name(self, path: str) -> str:
        """Return what a file is called: its path in the folder, or its own name where it lies elsewhere."""
        name = self._index.name(path)
        is_file = inline.text(path) is None
        return Path(name).name if is_file and Path(name).is_absolute() else name

    def _id(self, path: str) -> str:
        # With a secret: an id says nothing of the path, and nobody can make one up.
        key = hmac.new(self._secret, path.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:24]
        self._shown[key] = path
        self._shown.move_to_end(key)
        while len(self._shown) > KEPT:
            self._shown.popitem(last=False)
        return key

    async def thumbnail(self, key: str, decoders: Decoders) -> bytes:
        """Return a JPEG of a file that was found; raises Problem where none was by that id, or it has gone."""
        path = self._shown.get(key)
        if path is None:
            raise Problem(404, "nothing was found by this id; search again")
        try:
            return await decoders.made(Thumbnail(self._index.modality, self._limits), path)
        except BrokenFile:
            # The reason may name what is not a stranger's to know.
            raise Problem(404, "this file cannot be shown any more") from None


@dataclass(frozen=True)
class Thumbnail:
    """Makes a small JPEG of a file. Picklable; to be called in a process of its own."""

    modality: str
    limits: Limits

    def __call__(self, path: str) -> bytes:
        """Return the JPEG; raises BrokenFile."""
        restrict(self.limits.decode_memory)
        if inline.text(path) is None and self.modality != "text":
            check_extent(path, self.modality, self.limits)
        out = io.BytesIO()
        PIL.Image.fromarray(thumbnail(path, self.modality, SIDE)).save(out, "JPEG", quality=QUALITY)
        return out.getvalue()
