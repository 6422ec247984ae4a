"""The commands for many processes: prove that they compute what one does, and survive what happens to them."""

from pathlib import Path
from typing import Annotated

import typer

from mmssl.config import parse_assignments
from mmssl.errors import UserError
from mmssl.files import write_json
from tasks.build import load_recipe
from tasks.cli_options import Json, Overrides, emit, keep, writable

RecipeName = Annotated[str, typer.Argument(help="A recipe's name or a YAML path.")]


def verify(
    recipe: RecipeName,
    overrides: Overrides = None,
    data: Annotated[
        Path | None, typer.Option(help="A folder of media or a manifest; synthetic signals without it.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Which split of the data; 'train' if it has one.")] = None,
    world: Annotated[str, typer.Option(help="Numbers of ranks to compare with one process.")] = "1,2",
    zero: Annotated[
        str, typer.Option(help="ZeRO stages, or DeepSpeed JSON files, for each number of ranks.")
    ] = "0,1,2,3",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps to take.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """Take real steps of a recipe on several ranks, and compare them with one process. Exit code 1 if they differ."""
    from tasks.verify import parse_worlds
    from tasks.verify import verify as run

    needs_data(split, data)
    if out is not None and out.is_dir():
        raise UserError(f"--out {out} is a folder; name a JSON file in it, such as {out / 'verify.json'}")
    writable(None if out is None else out.parent)
    resolved = load_recipe(recipe, parse_assignments(overrides or ()))
    result = run(resolved, data, split=split, worlds=parse_worlds(world), zero=zero.split(","), steps=steps)
    emit(result, as_json)
    if out is not None:
        write_json(out, result.as_dict())
    if not result.equal:
        raise typer.Exit(1)


def needs_data(split: str | None, data: Path | None) -> None:
    """Raise UserError for a split of no data."""
    if split is not None and data is None:
        raise UserError(f"--split {split} is of the files that --data names; give --data too, or leave it out")


def drill(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Which; all without a name.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the runs and the result as JSON in this folder.")] = None,
    as_json: Json = False,
) -> None:
    """Kill, stop and damage tiny runs on this machine, and see whether they go on as if nothing had happened."""
    from tasks.drill import drill as run

    result = run(names or (), out)
    keep(result, out, "drill.json")
    emit(result, as_json)
    if not result.passed:
        raise typer.Exit(1)


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Cards, or with --cpu processes; 8, or 1.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Their kind: h100 if left out, a100, l40s ...")] = None,
    memory: Annotated[float | None, typer.Option(min=0.1, help="GB of each, instead of what its kind has.")] = None,
    tflops: Annotated[float | None, typer.Option(min=0.001, help="Peak TFLOP/s of each, likewise.")] = None,
    mfu: Annotated[float, typer.Option(min=0.001, max=1, help="Share of the peak that training reaches.")] = 0.4,
    data: Annotated[Path | None, typer.Option(help="What it is to learn from: tells the steps.")] = None,
    split: Annotated[str | None, typer.Option(help="Which split of the data; 'train' if it has one.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="How many files that is, instead of --data.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="For processes without cards.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Take small steps here, and compare their memory.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a recipe needs on so many cards: memory by ZeRO stage, days, and what to type. Exit code 1: no room."""
    from tasks.plan import USUAL, cards, processors
    from tasks.plan import plan as run

    if data is not None and samples is not None:
        raise UserError("--data and --samples both say how much there is to learn from; give one of them")
    needs_data(split, data)
    if cpu and gpu is not None:
        raise UserError(f"--cpu is for processes without cards, and --gpu {gpu} for cards; give one of them")
    machines = (
        processors(gpus or 1, memory, tflops, mfu) if cpu else cards(gpus or 8, gpu or USUAL, memory, tflops, mfu)
    )
    settings = parse_assignments(overrides or ())
    result = run(recipe, settings, machines=machines, data=data, split=split, samples=samples, check=check)
    emit(result, as_json)
    if result.proposal is None:
        raise typer.Exit(1)
