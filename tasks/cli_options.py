"""What the commands of the command line share: their options, and how a result is printed and kept."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
from rich.console import Console

from mmssl.config import parse_assignments
from mmssl.data.listing import Listing, list_files
from mmssl.distributed import world
from mmssl.files import to_json, write_json
from modalities.encoder import Encoder

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
EncoderPath = Annotated[Path, typer.Argument(metavar="ENCODER", help="An encoder folder, a run folder or a file.")]
TrainData = Annotated[Path, typer.Option("--train", help="Training files: a folder or a manifest.")]
TestData = Annotated[Path, typer.Option("--test", help="Test files: a folder or a manifest.")]
TrainSplit = Annotated[str | None, typer.Option(help="Which split of --train; 'train' if it has one.")]
TestSplit = Annotated[str | None, typer.Option(help="Which split of --test; 'test' if it has one.")]
LabelColumn = Annotated[str, typer.Option(help="Manifest column with the labels.")]
SkipBroken = Annotated[bool, typer.Option("--skip-broken", help="Leave broken files out and report how many.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key.sub=value]...", help="Settings to change.")]
Signal = Annotated[
    list[str] | None,
    typer.Option("--signal", metavar="KEY=VALUE", help="Read files otherwise than in training, such as views=[5,3]."),
]
Out = Annotated[
    Path | None, typer.Option("--out", help="Folder for the result as JSON (and the run, where one is trained).")
]
LocalRank = Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")]
DeepSpeedConfig = Annotated[
    str | None, typer.Option("--deepspeed_config", "--deepspeed-config", help="A DeepSpeed JSON, or a name: zero2.")
]


class Result(Protocol):
    """What a task returns."""

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        ...

    def render(self, console: Console) -> None:
        """Print for people."""
        ...


def emit(result: Result, as_json: bool, signal: Sequence[str] | None = None) -> None:
    """Print a result on stdout, on rank 0 alone, and how files were read where that was not as in training."""
    if not world().is_main:
        return
    if as_json:
        print(to_json(_facts(result, signal)))
    else:
        result.render(console())
        if signal:
            console().print(f"files were read with {', '.join(signal)}", markup=False, highlight=False, soft_wrap=True)


def _facts(result: Result, signal: Sequence[str] | None) -> dict[str, Any]:
    return {**result.as_dict(), "signal": parse_assignments(signal)} if signal else result.as_dict()


def console() -> Console:
    """Return where people read results."""
    # A pipe has no width of its own; tables and sentences must not be cut at 80 columns in a log file.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def keep(result: Result, out: Path | None, name: str, signal: Sequence[str] | None = None) -> None:
    """Write a result as ``name`` into the folder ``out``, if one is given."""
    if out is not None:
        write_json(out / name, _facts(result, signal))


def writable(out: Path | None) -> None:
    """Make the folder ``out``, before anything is computed for it."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)


def pair(
    encoder: Encoder, train: Path, test: Path, train_split: str | None, test_split: str | None
) -> tuple[Listing, Listing]:
    """List the training and the test files of an encoder's modality."""
    kind = encoder.kind
    return (
        list_files(train, kind, split=train_split, default_split="train"),
        list_files(test, kind, split=test_split, default_split="test"),
    )
