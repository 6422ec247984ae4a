"""Planned against measured memory of training: a few steps of each case, each in processes of its own.

``python benchmarks/memory.py [RECIPE:BATCH[:checkpointing][:bf16][:zero0|zero1|zero2|zero3|zero3_offload] ...]``; BATCH
is samples per process, and a DeepSpeed configuration means two of them.

What is measured, and how, is in ``tasks/plan_check.py``; beside it, on a GPU, is what the allocator has taken from the
device, and on a CPU what is taken with glibc as it is.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from typing import Any

from tasks.build import Recipe, default_device, load_recipe
from tasks.plan_check import Case as Measured
from tasks.plan_check import measure, plan_of, traced
from tasks.plan_rows import ALONE

CASES = (
    "image-mae-tiny:256", "image-mae-s16:8", "image-mae-s16:16", "image-mae-s16:16:checkpointing",
    "image-mae-b16:4", "image-mae-b16:4:checkpointing", "image-mae-b16:8", "image-mae-b16:8:checkpointing",
    "image-mae-l16:1", "image-mae-l16:2", "image-mae-l16:2:checkpointing",
    "image-mae-b16:1:zero0", "image-mae-b16:1:zero1", "image-mae-b16:1:zero2", "image-mae-b16:1:zero3",
)  # fmt: skip
STEPS = 3


@dataclass(frozen=True)
class Case:
    """What is trained; ``batch`` counts the samples of one process."""

    recipe: str
    batch: int
    checkpointing: bool = False
    bf16: bool = False
    deepspeed: str | None = None

    @classmethod
    def parse(cls, words: str) -> "Case":
        """Read ``RECIPE:BATCH[:option ...]``."""
        recipe, batch, *options = words.split(":")
        zero = [option for option in options if option.startswith("zero")]
        return cls(recipe, int(batch), "checkpointing" in options, "bf16" in options, zero[0] if zero else None)

    def measured(self) -> Measured:
        """Return it as it is measured."""
        settings = {
            "model.backbone.checkpointing": self.checkpointing,
            "train.precision": "bf16" if self.bf16 else "fp32",
        }
        recipe: Recipe = load_recipe(self.recipe, settings)
        return Measured(recipe.as_dict(), self.batch, self.deepspeed or ALONE)


def row(case: Case) -> dict[str, Any]:
    """Return a case with its planned and measured sizes, of rank 0."""
    real = case.measured()
    found = {**asdict(case), "planned": plan_of(real, traced(real)), "peak": measure(real, steps=STEPS)[0]}
    return found | {"held": measure(real, exact=False, steps=STEPS)[0]}


def line(found: dict[str, Any]) -> str:
    """Return a row of the table."""
    kind = "bf16" if found["bf16"] else "fp32"
    cells = [found["recipe"], str(found["batch"]), kind, "yes" if found["checkpointing"] else "no"]
    cells += [found["deepspeed"] or "", f"{found['planned'] / 1e9:.3f} GB"]
    for key in ("peak", "held"):
        cells += [f"{found[key] / 1e9:.3f} GB", f"{found['planned'] / found[key]:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="planned against measured memory")
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    options = parser.parse_args()
    held = "taken by the allocator" if default_device().type == "cuda" else "with glibc as it is"
    if not options.json:
        head = f"planned | measured | planned / it | {held} | planned / it |"
        print(f"| recipe | batch | | checkpointing | DeepSpeed | {head}")
        print("|---|--:|---|---|---|--:|--:|--:|--:|--:|")
    for words in options.cases:
        found = row(Case.parse(words))
        print(json.dumps(found) if options.json else line(found), flush=True)


if __name__ == "__main__":
    main()
