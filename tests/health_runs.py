"""Whole runs that ``test_health`` looks at, in this process or on ranks."""

from pathlib import Path
from typing import Any

from mmssl.run import Run
from tasks.pretrain import pretrain


def lines_of(recipe: str, data: str, out: str, settings: dict[str, Any], config: str | None) -> list[dict[str, Any]]:
    """Pre-train, and return the lines of metrics."""
    pretrain(recipe, data, out, settings, deepspeed_config=config)
    return Run(Path(out)).metrics()
