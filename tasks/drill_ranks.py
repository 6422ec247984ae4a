"""What the ranks of ``mmssl drill`` do: train, and wait where they are told to, for something to be done to them."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

# What a run imports as it goes on: ranks are forks of a process that has it.
import modalities.image_views  # noqa: F401
import tasks.pretrain  # noqa: F401
from mmssl.distributed import world
from mmssl.files import to_json
from tasks.cli import main

RECIPE = "image-mae-tiny"
SYSTEM = "zero2"


@dataclass(frozen=True)
class Gate:
    """A place at which rank 0 waits: where it does something to a file for the ``count``-th time.

    The interpreter tells of what it is about to do (its audit events), so that the place is exact and nothing of what
    is drilled has to know of drills.
    """

    does: Literal["appends to", "renames to", "makes"]
    name: str
    """The file's, or the folder's."""
    count: int = 1

    def meets(self, event: str, arguments: tuple[Any, ...]) -> bool:
        """Return whether an audit event is what is waited for."""
        if self.does == "appends to":
            return event == "open" and arguments[1] == "a" and Path(str(arguments[0])).name == self.name
        if self.does == "renames to":
            return event == "os.rename" and Path(str(arguments[1])).name == self.name
        return event == "os.mkdir" and Path(str(arguments[0])).name == self.name

    def install(self, pipe: Connection) -> None:
        """Wait there from now on: say that it is reached, and go on when told to."""
        left = [self.count]

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if left[0] and self.meets(event, arguments):
                left[0] -= 1
                if not left[0]:
                    pipe.send("reached")
                    pipe.recv()

        sys.addaudithook(watch)


def pretrain(
    data: Path, run: Path, settings: Mapping[str, Any], resume: bool, gate: Gate | None, pipe: Connection | None
) -> None:
    """Run ``mmssl pretrain``, and end as it ends."""
    if gate is not None and pipe is not None and world().is_main:
        gate.install(pipe)
    words = [f"{key}={to_json(value)}" for key, value in settings.items()]
    where = ["--data", str(data), "--out", str(run), "--deepspeed_config", SYSTEM]
    sys.exit(main(["pretrain", RECIPE, *words, *where, *["--resume"] * resume]))
