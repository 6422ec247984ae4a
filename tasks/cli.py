"""The command line: words into function calls, results into tables or JSON, errors into one sentence and a code."""

import errno
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Protocol, cast

import typer
from rich.console import Console

from mmssl.config import parse_assignments
from mmssl.data.listing import Listing, list_files
from mmssl.distributed import world
from mmssl.errors import MmsslError, UserError, is_out_of_memory
from modalities.encoder import Encoder, load
from tasks.build import load_recipe, recipe_names, recipe_path

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

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
EncoderPath = Annotated[Path, typer.Argument(metavar="ENCODER", help="An encoder folder, a run folder or a file.")]
TrainData = Annotated[Path, typer.Option("--train", help="Training files: a folder or a manifest.")]
TestData = Annotated[Path, typer.Option("--test", help="Test files: a folder or a manifest.")]
TrainSplit = Annotated[str | None, typer.Option(help="Which split of --train; 'train' if it has one.")]
TestSplit = Annotated[str | None, typer.Option(help="Which split of --test; 'test' if it has one.")]
LabelColumn = Annotated[str, typer.Option(help="Manifest column with the labels.")]
SkipBroken = Annotated[bool, typer.Option("--skip-broken", help="Leave broken files out and report how many.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key.sub=value]...", help="Settings to change.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder to write the result to, as JSON.")]
LocalRank = Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)]


class Result(Protocol):
    """What a task returns."""

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        ...

    def render(self, console: Console) -> None:
        """Print for people."""
        ...


def emit(result: Result, as_json: bool) -> None:
    """Print a result on stdout, on rank 0 alone."""
    if not world().is_main:
        return
    if as_json:
        print(json.dumps(result.as_dict()))
    else:
        result.render(console())


def console() -> Console:
    """Return where people read results."""
    # A pipe has no width of its own; tables and sentences must not be cut at 80 columns in a log file.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def keep(result: Result, out: Path | None, name: str) -> None:
    """Write a result as ``name`` into the folder ``out``, if one is given."""
    if out is not None:
        from mmssl.files import write_json

        write_json(out / name, result.as_dict())


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
        list_files(train, kind.suffixes, kind.name, split=train_split, default_split="train"),
        list_files(test, kind.suffixes, kind.name, split=test_split, default_split="test"),
    )


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
    modality: Annotated[str, typer.Option(help="What to learn from.")] = "image",
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("demo-run"),
    as_json: Json = False,
) -> None:
    """Pre-train on pictures that come with the package and measure what was learned: minutes, offline."""
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
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="Print the settings and the cost, and train nothing.")] = False,
    deepspeed_config: Annotated[
        str | None, typer.Option("--deepspeed_config", "--deepspeed-config", help="A DeepSpeed JSON, or a name: zero2.")
    ] = None,
    as_json: Json = False,
    local_rank: LocalRank = 0,
) -> None:
    """Pre-train an encoder on a folder of media."""
    from tasks.pretrain import dry_run
    from tasks.pretrain import pretrain as run

    resolved = load_recipe(recipe, parse_assignments(overrides or ()))
    if dry:
        emit(dry_run(resolved, data, split), as_json)
        return
    if data is None or out is None:
        raise UserError(f"pretrain needs --{'data' if data is None else 'out'} (or --dry-run to see the cost first)")
    emit(run(resolved, data, out, split=split, resume=resume, deepspeed_config=deepspeed_config), as_json)


@app.command()
def finetune(
    encoder: EncoderPath,
    train: TrainData,
    test: TestData,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The run folder to make.")] = Path("runs/finetune"),
    labels: Annotated[str | None, typer.Option(help="Use this share of the training labels, such as 1%.")] = None,
    shots: Annotated[int | None, typer.Option(help="Use this many training labels per class.")] = None,
    seeds: Annotated[str | None, typer.Option(help="One run per seed, such as 0,1,2: mean and deviation.")] = None,
    scratch: Annotated[bool, typer.Option("--scratch", help="Start from random weights: the baseline.")] = False,
    protocol: Annotated[str, typer.Option(help="plain (few labels, small data), or mae as published.")] = "plain",
    validation: Annotated[
        str | None, typer.Option(help="Hold this share of the training files out and keep the weights best on it.")
    ] = None,
    validation_split: Annotated[str | None, typer.Option(help="Which split of --train to measure on instead.")] = None,
    multi_label: Annotated[bool, typer.Option("--multi-label", help="A file has any number of labels.")] = False,
    separator: Annotated[str, typer.Option(help="What stands between the labels of a file.")] = "|",
    label_column: LabelColumn = "label",
    train_split: TrainSplit = None,
    test_split: TestSplit = None,
    skip_broken: SkipBroken = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    deepspeed_config: Annotated[
        str | None, typer.Option("--deepspeed_config", "--deepspeed-config", help="A DeepSpeed JSON, or a name: zero2.")
    ] = None,
    as_json: Json = False,
    local_rank: LocalRank = 0,
) -> None:
    """Train an encoder and a classifier on labels, and test them; the result is what predict takes."""
    from tasks.finetune import FinetuneOptions, finetune_seeds, parse_seeds
    from tasks.finetune import finetune as run

    if validation is not None and validation_split is not None:
        raise UserError("--validation and --validation-split exclude each other")
    loaded, changes = load(encoder), parse_assignments(overrides or ())
    halves, kind = pair(loaded, train, test, train_split, test_split), loaded.kind
    measured_on: str | Listing | None = validation
    if validation_split is not None:
        measured_on = list_files(train, kind.suffixes, kind.name, split=validation_split)
    options: FinetuneOptions = {
        "label_column": label_column, "labels": labels, "shots": shots, "scratch": scratch, "protocol": protocol,
        "validation": measured_on, "multi_label": multi_label, "separator": separator, "skip_broken": skip_broken,
        "overrides": changes, "deepspeed_config": deepspeed_config,
    }  # fmt: skip
    chosen = parse_seeds(seeds, changes)
    if len(chosen) > 1:
        emit(finetune_seeds(loaded, *halves, out, chosen, resume, **options), as_json)
        return
    if chosen:
        options["overrides"] = {**changes, "train.seed": chosen[0]}
    emit(run(loaded, *halves, out, resume=resume, **options), as_json)


@app.command()
def predict(
    classifier: Annotated[Path, typer.Argument(metavar="CLASSIFIER", help="A fine-tuned run or its encoder folder.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILE_OR_FOLDER...", help="What to classify.")],
    top: Annotated[int, typer.Option(help="How many classes to name for each file.")] = 5,
    out: Annotated[Path | None, typer.Option(help="A .jsonl, .csv or .parquet file to write.")] = None,
    skip_broken: SkipBroken = False,
    as_json: Json = False,
) -> None:
    """Name the classes of files with a fine-tuned encoder."""
    from tasks.predict import predict as run

    result = run(classifier, files, top=top, out=out, skip_broken=skip_broken)
    if as_json:
        print(json.dumps(result.as_list()))
    else:
        result.render(console())


@app.command()
def knn(
    encoder: EncoderPath,
    train: TrainData,
    test: TestData,
    k: Annotated[str, typer.Option(help="How many neighbours, separated by commas.")] = "10,20,100",
    temperature: Annotated[float, typer.Option(help="Of the neighbours' votes.")] = 0.07,
    label_column: LabelColumn = "label",
    train_split: TrainSplit = None,
    test_split: TestSplit = None,
    skip_broken: SkipBroken = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Classify test files by their nearest training files: no training at all."""
    from tasks.knn import knn as run

    try:
        counts = [int(number) for number in k.split(",")]
    except ValueError:
        raise UserError(f"--k {k}: give whole numbers separated by commas, such as 10,20,100") from None
    writable(out)
    loaded = load(encoder)
    listings = pair(loaded, train, test, train_split, test_split)
    result = run(loaded, *listings, label_column, counts, temperature, skip_broken=skip_broken)
    keep(result, out, "knn.json")
    emit(result, as_json)


@app.command(name="linear-probe")
def linear_probe(
    encoder: EncoderPath,
    train: TrainData,
    test: TestData,
    overrides: Overrides = None,
    protocol: Annotated[str, typer.Option(help="logistic, or as papers train it: mae, dino, attentive.")] = "logistic",
    per_layer: Annotated[bool, typer.Option("--per-layer", help="logistic: probe the output of every block.")] = False,
    batch_norm: Annotated[
        bool | None, typer.Option("--batch-norm/--no-batch-norm", help="Other protocols: normalise over the batch.")
    ] = None,
    label_column: LabelColumn = "label",
    train_split: TrainSplit = None,
    test_split: TestSplit = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the hold-out, intervals and training.")] = 0,
    skip_broken: SkipBroken = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Train a linear classifier on frozen features, and test it."""
    from tasks.probe_protocols import probe as run

    settings = parse_assignments(overrides or ())
    if batch_norm is not None:
        settings["objective.head.batch_norm"] = batch_norm
    writable(out)
    loaded = load(encoder)
    result = run(
        loaded, *pair(loaded, train, test, train_split, test_split), protocol, out, per_layer=per_layer,
        label_column=label_column, seed=seed, skip_broken=skip_broken, overrides=settings,
    )  # fmt: skip
    emit(result, as_json)


@app.command()
def embed(
    encoder: EncoderPath,
    data: Annotated[Path, typer.Argument(metavar="PATH", help="A file, a folder or a manifest.")],
    out: Annotated[Path, typer.Option(help="The parquet file to write: path, split, label, vector.")],
    split: Annotated[str | None, typer.Option(help="Which split of the data; all of it by default.")] = None,
    skip_broken: SkipBroken = False,
    as_json: Json = False,
) -> None:
    """Write one vector per file."""
    from tasks.embed import embed as run

    loaded = load(encoder)
    listing = list_files(data, loaded.kind.suffixes, loaded.kind.name, split=split)
    emit(run(loaded, listing, out, skip_broken=skip_broken), as_json)


@app.command()
def show(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A run, an encoder, or a parquet file of vectors.")],
    files: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="What to show it of.")] = None,
    *,
    out: Annotated[Path, typer.Option(help="The .png, or .html for many files, to write.")],
    panel: Annotated[
        str | None, typer.Option(help="reconstruction, attention, pca, tsne or neighbours; what suits the source.")
    ] = None,
    ratios: Annotated[str | None, typer.Option(help="reconstruction: mask ratios. [0.75,0.85,0.95]")] = None,
    mass: Annotated[float | None, typer.Option(help="attention: the share that marked patches hold. [0.6]")] = None,
    foreground: Annotated[bool | None, typer.Option("--foreground", help="pca: without the background.")] = None,
    color_by: Annotated[str | None, typer.Option(help="tsne: label or split. [label]")] = None,
    most: Annotated[int | None, typer.Option(help="tsne: vectors drawn at most. [5000]")] = None,
    data: Annotated[Path | None, typer.Option(help="neighbours: the folder or manifest to look in.")] = None,
    k: Annotated[int | None, typer.Option("-k", "--k", help="neighbours: how many. [8]")] = None,
    skip_broken: Annotated[
        bool | None, typer.Option("--skip-broken", help="neighbours: leave out broken files.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="reconstruction, tsne: of what is drawn by lot. [0]")] = None,
    as_json: Json = False,
) -> None:
    """Draw what was learned: reconstructions, attention, components, a map of vectors, nearest neighbours."""
    from tasks.show import ShowOptions
    from tasks.show import show as run

    try:
        shares = None if ratios is None else [float(ratio) for ratio in ratios.split(",")]
    except ValueError:
        raise UserError(f"--ratios {ratios}: give numbers separated by commas, such as 0.75,0.95") from None
    asked = {"ratios": shares, "mass": mass, "foreground": foreground, "color_by": color_by, "most": most, "data": data,
             "k": k, "skip_broken": skip_broken, "seed": seed}  # fmt: skip
    options = cast(ShowOptions, {name: value for name, value in asked.items() if value is not None})
    emit(run(source, files or (), out=out, panel=panel, **options), as_json)


@data_app.command()
def check(
    path: Annotated[Path, typer.Argument(help="A folder or a manifest.")],
    modality: Annotated[str, typer.Option(help="Which media to look for.")] = "image",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per core by default.")] = None,
    ledger: Annotated[Path | None, typer.Option(help="Write the broken files to this JSON-lines file.")] = None,
    as_json: Json = False,
) -> None:
    """Decode everything; report what is broken and why. Exit code 3 if anything is."""
    from tasks.data_check import check as run

    result = run(path, modality, workers, ledger)
    emit(result, as_json)
    if result.broken:
        raise typer.Exit(3)


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code of DESIGN's table and never shows a traceback for what is foreseen."""
    if "" in arguments:
        complain("an argument is empty; is it a variable that is not set?")
        return 2
    try:
        code = app(list(arguments), prog_name="mmssl", standalone_mode=False)
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
