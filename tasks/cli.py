"""The command line: words into function calls, results into tables or JSON, errors into one sentence and a code."""

import errno
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from mmssl.config import parse_assignments
from mmssl.distributed import world
from mmssl.errors import MmsslError, UserError, is_out_of_memory
from tasks import cli_joint as joint
from tasks import cli_measure as measure
from tasks import cli_scale as scale
from tasks.build import load_recipe, recipe_names, recipe_path
from tasks.cli_options import DeepSpeedConfig, Json, LocalRank, Overrides, Resume, SkipBroken, emit
from tasks.cli_propagate import propagate
from tasks.cli_search import search
from tasks.cli_serve import serve

app = typer.Typer(
    name="mmssl",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look after files before they are trained on.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")

# Typer carries its own copy of click from some version on; the error type is reached through what both export.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

BAD_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG)


def show_version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        print(version("mmssl"))
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Self-supervised learning: from a folder of media to a measured encoder."""


@app.command()
def demo(
    modality: Annotated[
        str, typer.Option(help="What to learn from: image, video, audio, speech or image-text.")
    ] = "image",
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("demo-run"),
    as_json: Json = False,
) -> None:
    """Pre-train on media that come with the package and measure what was learned: minutes, offline."""
    from tasks.demo import demo as run

    emit(run(modality, out), as_json)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="The recipe to print.")] = None, as_json: Json = False
) -> None:
    """List the recipes, or print one page."""
    from mmssl.config import read_yaml

    if name is not None:
        path = recipe_path(name)
        print(json.dumps(read_yaml(path)) if as_json else path.read_text(encoding="utf-8"), end="\n" if as_json else "")
        return
    heads = {key: path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for key, path in recipe_names().items()}
    if as_json:
        print(json.dumps(heads))
    else:
        for key, head in heads.items():
            print(f"{key:20s} {head}")


@app.command()
def pretrain(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or a YAML path.")],
    overrides: Overrides = None,
    data: Annotated[Path | None, typer.Option(help="A folder of media or a manifest.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder to make.")] = None,
    split: Annotated[str | None, typer.Option(help="Which split of the data; 'train' if it has one.")] = None,
    resume: Resume = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="Print the settings and the cost, and train nothing.")] = False,
    deepspeed_config: DeepSpeedConfig = None,
    as_json: Json = False,
    local_rank: LocalRank = 0,
) -> None:
    """Pre-train an encoder on a folder of media."""
    from tasks.pretrain import dry_run
    from tasks.pretrain import pretrain as run

    resolved = load_recipe(recipe, parse_assignments(overrides or ()))
    if dry:
        emit(dry_run(resolved, data, split, deepspeed_config), as_json)
        return
    if data is None or out is None:
        raise UserError(f"pretrain needs --{'data' if data is None else 'out'} (or --dry-run to see the cost first)")
    emit(run(resolved, data, out, split=split, resume=resume, deepspeed_config=deepspeed_config), as_json)


for command in (measure.finetune, measure.predict, measure.knn, measure.embed, measure.show):
    app.command()(command)
app.command(name="linear-probe")(measure.linear_probe)
app.command()(propagate)
app.command(name="zero-shot")(joint.zero_shot)
app.command()(joint.retrieve)
app.command()(search)
app.command()(serve)
app.command()(scale.plan)
app.command()(scale.verify)
app.command()(scale.drill)


@data_app.command()
def check(
    path: Annotated[Path, typer.Argument(help="A folder or a manifest.")],
    modality: Annotated[
        str | None, typer.Option(help="Which media to look for; the first in shards, else image by default.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per core by default.")] = None,
    ledger: Annotated[Path | None, typer.Option(help="Write the broken files to this JSON-lines file.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one file, decoded as a whole.")] = 600.0,
    as_json: Json = False,
) -> None:
    """Decode everything, compare shards with their checksums; report what is broken and why. Exit code 3 if any is."""
    from tasks.data_check import check as run

    result = run(path, modality, workers, ledger, timeout=timeout)
    emit(result, as_json)
    if result.broken or result.damaged:
        raise typer.Exit(3)


@data_app.command()
def pack(
    path: Annotated[Path, typer.Argument(help="A folder or a manifest.")],
    out: Annotated[
        Path, typer.Argument(metavar="SHARDS", help="The folder for the shards: new, or begun by this command.")
    ],
    modality: Annotated[str | None, typer.Option(help="Which media to pack; image by default.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Pack the media that this recipe takes: pairs too.")] = None,
    per_shard: Annotated[int, typer.Option(min=1, help="At most so many samples in a shard.")] = 1000,
    max_shard_mb: Annotated[int, typer.Option(min=1, help="At most so many megabytes in a shard.")] = 512,
    workers: Annotated[int | None, typer.Option(min=1, help="Files at a time; one per core by default.")] = None,
    as_json: Json = False,
) -> None:
    """Pack files into tar shards (WebDataset) that are trained on as the files are; begun ones are gone on with."""
    from tasks.data_pack import pack as run

    result = run(path, out, modality, recipe, per_shard, max_shard_mb, workers)
    emit(result, as_json)
    if result.all_broken:
        raise typer.Exit(3)


@data_app.command()
def shrink(
    path: Annotated[Path, typer.Argument(help="A folder of videos, a manifest or one video.")],
    out: Annotated[Path, typer.Argument(help="The folder for the copies: new, empty or begun by this command.")],
    short_side: Annotated[int, typer.Option(help="Pixels of the shorter side; even. Nothing is enlarged.")] = 256,
    workers: Annotated[int | None, typer.Option(min=1, help="Files at a time; one per core by default.")] = None,
    as_json: Json = False,
) -> None:
    """Re-encode videos small and cheap to read, so that training waits less for data."""
    from tasks.data_shrink import shrink as run

    result = run(path, out, short_side, workers)
    emit(result, as_json)
    if result.all_broken:
        raise typer.Exit(3)


@data_app.command()
def stats(
    path: Annotated[Path, typer.Argument(help="A folder or a manifest.")],
    overrides: Overrides = None,
    modality: Annotated[str, typer.Option(help="Which media to look for.")] = "audio",
    recipe: Annotated[str | None, typer.Option(help="Take the modality and the other settings from this.")] = None,
    split: Annotated[str | None, typer.Option(help="Which split of the data; 'train' if it has one.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per core by default.")] = None,
    skip_broken: SkipBroken = False,
    as_json: Json = False,
) -> None:
    """Measure the mean and the deviation that signal.mean and signal.std are for."""
    from tasks.data_stats import stats as run

    settings = parse_assignments(overrides or ())
    emit(run(path, modality, recipe, settings, split, workers, skip_broken), as_json)


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code of DESIGN's table and never shows a traceback for what is foreseen."""
    if "" in arguments:
        complain("an argument is empty; is it a variable that is not set?")
        return 2
    try:
        code = app(list(arguments), prog_name="mmssl", standalone_mode=False)
        if code == 130:  # what Typer makes of Ctrl-C
            complain("interrupted")
        return code if isinstance(code, int) else 0
    except UsageError as error:
        complain(error.format_message() if hasattr(error, "format_message") else str(error))
        return 2
    except MmsslError as error:
        # The user's mistake is seen by every rank, anything else perhaps by one alone.
        if world().is_main or not isinstance(error, UserError):
            complain(str(error))
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        complain("interrupted")
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # whoever reads has gone; nothing more can be said
        return 1
    except OSError as error:
        complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return 2 if error.errno in BAD_PATH else 1
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        first = (str(error) or "out of memory").splitlines()[0]
        complain(f"out of memory ({first}); lower train.batch_size, signal.size or the model's sizes")
        return 1


def complain(sentence: str) -> None:
    """Say what is wrong, on stderr."""
    print(f"mmssl: {' '.join(sentence.split())}", file=sys.stderr, flush=True)
