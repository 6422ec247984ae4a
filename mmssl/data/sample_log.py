"""Which samples each optimiser step was taken on, one JSON object per line: proof that none is skipped or repeated."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from mmssl.contracts import Batch
from mmssl.data.dataset import Plan
from mmssl.distributed import Council
from mmssl.files import to_json

MOST_FAULTS = 8
"""A log that disagrees with its plan mostly does so from some step on: a few sentences are enough."""


def global_batch(micros: Sequence[Batch], council: Council) -> dict[str, list[int]]:
    """Return the samples of a step of all ranks, in the order of the global batch. A collective.

    ``samples`` are the files that the plan asks for, ``epochs`` and ``repeats`` say in which pass and which look at
    them, ``read`` are the files that were read: others where one is broken.
    """
    ranks = council.gather([(batch["place"].tolist(), batch["index"].tolist()) for batch in micros])
    # Micro-step m of rank r has run m * world + r of the batch.
    runs = [micro for step in zip(*ranks, strict=True) for micro in step]
    places = [place for run, _ in runs for place in run]
    epochs, samples, repeats = ([place[i] for place in places] for i in range(3))
    return {"samples": samples, "epochs": epochs, "repeats": repeats, "read": [i for _, read in runs for i in read]}


class SampleLog:
    """Appends a line per step to a file: ``step``, and what ``global_batch`` returns."""

    def __init__(self, path: Path, council: Council, write: bool) -> None:
        self.path, self.council, self.write = path, council, write

    def after(self, step: int, micros: Sequence[Batch]) -> None:
        """Note the samples of a step. A collective; where there is a GPU, it waits for it."""
        line = {"step": step, **global_batch(micros, self.council)}
        if self.write:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(to_json(line) + "\n")


def faults(lines: Sequence[Mapping[str, Any]], plan: Plan) -> list[str]:
    """Return in sentences where a log is not what a run of ``plan`` (of one rank, from its first step) writes.

    That is each step once and in order, on the samples that the plan has for it; and, whatever the plan, each look at
    a file once in every epoch from the first on. Only the first few are told.
    """
    found = []
    steps, planned = [line["step"] for line in lines], range(plan.start + 1, plan.stop + 1)
    if steps != [*planned]:
        more = sorted(step for step in set(steps) if steps.count(step) > 1 or step not in planned)
        missing = sorted(set(planned) - set(steps))
        found.append(f"steps {missing} are missing, {more} are there too often, of {len(planned)}")
    micros, many = [*plan], plan.accumulate
    keys = {step: [*chain(*micros[i * many : (i + 1) * many])] for i, step in enumerate(planned)}
    seen = defaultdict(list)
    for line in lines:
        there = [*zip(line["epochs"], line["samples"], line["repeats"], strict=True)]
        wanted = [key[:3] for key in keys.get(line["step"], ())]
        if there != wanted:
            found.append(f"step {line['step']} was taken on {there}, but planned is {wanted} (epoch, file, look)")
        for epoch, sample, repeat in there:
            seen[sample, repeat].append(epoch)
    for (sample, repeat), epochs in sorted(seen.items()):
        if sorted(epochs) != [*range(len(epochs))]:
            found.append(f"file {sample}, look {repeat}, was read in the epochs {sorted(epochs)}")
    return found[:MOST_FAULTS]
