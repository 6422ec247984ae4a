"""TensorBoard: the metrics of a run, for those who follow several at once. The package is an extra."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmssl.errors import UserError
from tasks.build import Recipe

FOLDER = "tensorboard"
"""In the run folder."""


def check_board(recipe: Recipe) -> None:
    """Raise UserError where TensorBoard is asked for and not installed."""
    if recipe.train.tensorboard and find_spec("tensorboard") is None:
        raise UserError("train.tensorboard needs the package tensorboard: pip install 'mmssl[tensorboard]'")


class Board:
    """Writes every line of metrics as scalars."""

    def __init__(self, folder: Path, start: int) -> None:
        """Go on after ``start`` steps: what was written of later ones is not shown any more."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def write(self, line: Mapping[str, Any]) -> None:
        """Write a line."""
        for name, value in line.items():
            if name != "step":
                self._writer.add_scalar(name.replace(".", "/"), value, line["step"])
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
