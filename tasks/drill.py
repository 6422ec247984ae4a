"""Drills: tiny runs on this machine are killed, stopped and damaged, and must go on as if nothing had happened."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmssl.errors import MmsslError, UserError, nearest
from tasks.drill_cases import DRILLS
from tasks.drill_ground import Ground
from tasks.writer import say


@dataclass(frozen=True)
class Outcome:
    """What came of a drill."""

    drill: str
    done: str
    seen: str
    faults: list[str]

    @property
    def passed(self) -> bool:
        """Whether nothing was lost."""
        return not self.faults


@dataclass(frozen=True)
class Drilled:
    """What came of all drills."""

    outcomes: list[Outcome]

    @property
    def passed(self) -> bool:
        """Whether nothing was lost in any."""
        return all(outcome.passed for outcome in self.outcomes)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"passed": self.passed, "drills": [{**vars(one), "passed": one.passed} for one in self.outcomes]}

    def render(self, console: Console) -> None:
        """Print a table."""
        table = Table("drill", "what was done", "what was seen", "verdict", box=None, pad_edge=False)
        for one in self.outcomes:
            table.add_row(one.drill, one.done, one.seen, "passed" if one.passed else "FAILED: " + "; ".join(one.faults))
        console.print(table)


def drill(names: Sequence[str] = (), out: Path | None = None) -> Drilled:
    """Run the drills of these names, or all, in the folder ``out``, or in one that is removed afterwards.

    Each disturbs a run of two ranks, resumes it where it ended, and compares what it leaves with an undisturbed run:
    losses, the samples of every step and the last checkpoint must be the same to the bit. Raises UserError for an
    unknown name or a folder that is not empty.
    """
    for name in names:
        if name not in DRILLS:
            raise UserError(f"'{name}' is not a drill{nearest(name, DRILLS)}")
    if out is not None and out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give another --out")
    with ExitStack() as stack:
        folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mmssl-drill-")))
        say("an undisturbed run, with which all are compared")
        ground = Ground(folder)
        outcomes = []
        for name in names or DRILLS:
            say(f"drill {name}")
            case = DRILLS[name]
            try:
                seen, faults = case(ground)
            except MmsslError as error:  # the run never came to where it was to be disturbed
                seen, faults = "nothing", [str(error)]
            outcomes.append(Outcome(name, (case.__doc__ or "").partition(".")[0], seen, faults))
    return Drilled(outcomes)
