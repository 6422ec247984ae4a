"""Training samples of several modalities: what each makes of its part of a row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmssl.contracts import Size, Views
from mmssl.data.guard import BrokenFile, guarded

Row = tuple[str | None, ...]
"""The paths of what belongs together, one per modality, None for what is missing."""
Blank = dict[str, Tensor]


@dataclass(frozen=True)
class TowerViews:
    """Reads the files of a row, each with the views of its modality, under keys that have its name in front.

    Where rows may lack a modality, every sample has ``MODALITY.present``, bool [], and zeros for what is missing.
    """

    views: Mapping[str, Views]
    sizes: Mapping[str, Size]
    blanks: Mapping[str, Blank]
    """For each modality that is missing in some row, a sample of zeros."""
    timeout: float | None = None
    """Seconds after which a decoder that still works on one file is interrupted; None is never."""

    def __call__(self, row: Row, rngs: Sequence[np.random.Generator], size: Size) -> list[dict[str, Tensor]]:
        """Return a sample per generator; ``size`` is not used. Raises BrokenFile, which names the modality."""
        samples: list[dict[str, Tensor]] = [{} for _ in rngs]
        for (name, views), path in zip(self.views.items(), row, strict=True):
            for sample, part in zip(samples, self._read(name, views, path, rngs), strict=True):
                sample |= {f"{name}.{key}": value for key, value in part.items()}
                if name in self.blanks:
                    sample[f"{name}.present"] = torch.tensor(path is not None)
        return samples

    def _read(
        self, name: str, views: Views, path: str | None, rngs: Sequence[np.random.Generator]
    ) -> Sequence[dict[str, Tensor]]:
        if path is None:
            return [self.blanks[name]] * len(rngs)
        try:
            return guarded(lambda file: views(file, rngs, self.sizes[name]), path, self.timeout)
        except BrokenFile as error:
            raise BrokenFile(f"its {name}: {error.reason}") from None


def blank(views: Views, paths: Sequence[str | None], size: Size, timeout: float | None = None) -> Blank:
    """Return a sample of zeros like those that ``views`` makes of the first file that it can read in time.

    Raises BrokenFile where it can read none.
    """
    fault = BrokenFile("there is none")
    for path in paths:
        if path is None:
            continue
        try:
            (sample,) = guarded(lambda file: views(file, [np.random.default_rng(0)], size), path, timeout)
        except BrokenFile as error:
            fault = error
        else:
            return {key: torch.zeros_like(value) for key, value in sample.items()}
    raise fault
