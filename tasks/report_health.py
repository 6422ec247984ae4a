"""What a run's report says of its health: the verdict, and how its encoders' features spread."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmssl.verdict import judge
from tasks.report import Curve, Section, Words

HEALTH_NOTE = "Judged by the metrics alone: a healthy run may still have learned something other than what is wanted."
SPREAD_NOTE = (
    "Effective rank of the encoder's features on training batches, of 256 samples at most. One or two directions are a "
    "collapse; which number is good depends on the data."
)


def health_sections(metrics: Sequence[Mapping[str, Any]], steps: int | None = None) -> list[Section]:
    """Return the verdict on a run of so many steps, and a curve of the effective rank where it was measured."""
    found = judge(metrics, steps)
    words = "\n\n".join(f"{finding.what}. {finding.hint}." for finding in found.findings) or found.grounds
    sections: list[Section] = [Words(f"Health: {found.word}", words, HEALTH_NOTE)]
    names = [name for name in metrics[-1] if name.endswith("health.rank")]
    series = {name.removesuffix("health.rank").rstrip(".") or "features": _points(metrics, name) for name in names}
    if series:
        sections.append(Curve("Spread of features", "step", "directions", series, SPREAD_NOTE))
    return sections


def _points(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    lines = [line for line in metrics if name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]
