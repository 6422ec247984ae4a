"""The commands that measure and use an encoder; ``tasks.cli`` puts them on the command line.

What a command needs is imported when it runs, so that the others start without it.
"""

from pathlib import Path
from typing import Annotated, cast

import typer

from mmssl.config import parse_assignments
from mmssl.data.listing import Listing, list_files
from mmssl.errors import UserError
from modalities.classifier import Classifier
from modalities.encoder import load
from tasks.build import default_device
from tasks.cli_options import (
    DeepSpeedConfig,
    EncoderPath,
    Json,
    LabelColumn,
    LocalRank,
    Out,
    Overrides,
    Resume,
    Signal,
    SkipBroken,
    TestData,
    TestSplit,
    TrainData,
    TrainSplit,
    emit,
    keep,
    pair,
    writable,
)


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
    protocol: Annotated[
        str, typer.Option(help="plain (few labels, small data); as published: mae, videomae, audiomae.")
    ] = "plain",
    validation: Annotated[
        str | None,
        typer.Option(help="Hold this share of the labelled training files out; keep the weights best on it."),
    ] = None,
    validation_split: Annotated[str | None, typer.Option(help="Which split of --train to measure on instead.")] = None,
    multi_label: Annotated[bool, typer.Option("--multi-label", help="A file has any number of labels.")] = False,
    separator: Annotated[str, typer.Option(help="What stands between the labels of a file.")] = "|",
    label_column: LabelColumn = "label",
    train_split: TrainSplit = None,
    test_split: TestSplit = None,
    skip_broken: SkipBroken = False,
    resume: Resume = False,
    deepspeed_config: DeepSpeedConfig = None,
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
        measured_on = list_files(train, kind, split=validation_split)
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


def predict(
    classifier: Annotated[Path, typer.Argument(metavar="CLASSIFIER", help="A fine-tuned run or its encoder folder.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILE_OR_FOLDER...", help="What to classify.")],
    top: Annotated[int, typer.Option(help="How many classes to name for each file.")] = 5,
    out: Annotated[Path | None, typer.Option(help="A .jsonl, .csv or .parquet file to write.")] = None,
    split: Annotated[str | None, typer.Option(help="Which split of a manifest; all of it by default.")] = None,
    signal: Signal = None,
    skip_broken: SkipBroken = False,
    as_json: Json = False,
) -> None:
    """Name the classes of files with a fine-tuned encoder."""
    from tasks.predict import predict as run

    loaded = Classifier(classifier, parse_assignments(signal or ())).to(default_device())
    emit(run(loaded, files, top=top, out=out, split=split, skip_broken=skip_broken), as_json, signal)


def knn(
    encoder: EncoderPath,
    train: TrainData,
    test: TestData,
    k: Annotated[str, typer.Option(help="How many neighbours, separated by commas.")] = "10,20,100",
    temperature: Annotated[float, typer.Option(help="Of the softmax that weighs the neighbours' votes.")] = 0.07,
    label_column: LabelColumn = "label",
    train_split: TrainSplit = None,
    test_split: TestSplit = None,
    signal: Signal = None,
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
    loaded = load(encoder, parse_assignments(signal or ()))
    listings = pair(loaded, train, test, train_split, test_split)
    result = run(loaded, *listings, label_column, counts, temperature, skip_broken=skip_broken)
    keep(result, out, "knn.json", signal)
    emit(result, as_json, signal)


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
    frames: Annotated[
        Path | None,
        typer.Option(help="logistic: probe single moments of sounds; a table of path, start, end (seconds), label."),
    ] = None,
    max_frames: Annotated[
        int | None, typer.Option(min=3, help="--frames: fit at most so many training frames, drawn by lot. [50000]")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Manifest column with the labels [label]; --frames: its column [the only one].")
    ] = None,
    train_split: TrainSplit = None,
    test_split: TestSplit = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of the hold-out, the intervals and the training.")
    ] = 0,
    signal: Signal = None,
    skip_broken: SkipBroken = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Train a linear classifier on frozen features, and test it."""
    from tasks.frame_probe import MAX_FRAMES, frame_probe
    from tasks.frames import SoundFrames
    from tasks.probe_protocols import probe as run
    from tasks.segment_labels import read_segments

    settings = parse_assignments(overrides or ())
    if batch_norm is not None:
        settings["objective.head.batch_norm"] = batch_norm
    _check_frames(frames, max_frames, protocol, per_layer, list(settings))
    writable(out)
    loaded = load(encoder, parse_assignments(signal or ()))
    halves = pair(loaded, train, test, train_split, test_split)
    if frames is not None:
        _check_table(frames, train)
        labels = read_segments(frames, loaded.kind, label_column)
        probed = frame_probe(
            SoundFrames(loaded), *halves, labels, max_frames or MAX_FRAMES, seed, skip_broken=skip_broken
        )
        keep(probed, out, "linear-probe.json", signal)
        emit(probed, as_json, signal)
        return
    result = run(
        loaded, *halves, protocol, out, per_layer=per_layer,
        label_column=label_column or "label", seed=seed, skip_broken=skip_broken, overrides=settings,
    )  # fmt: skip
    emit(result, as_json, signal)


def _check_frames(
    frames: Path | None, max_frames: int | None, protocol: str, per_layer: bool, settings: list[str]
) -> None:
    if frames is None and max_frames is not None:
        raise UserError("--max-frames is for --frames; leave it out, or name a table of labels with --frames")
    others = [*(["--per-layer"] if per_layer else []), *settings]
    if protocol != "logistic":
        others.append(f"--protocol {protocol}")
    if frames is not None and others:
        raise UserError(f"--frames has the protocol logistic alone, on the encoder's output; leave out {others[0]}")


def _check_table(frames: Path, train: Path) -> None:
    """Raise UserError for a table of labels that lies with the training files, and not where it was said to."""
    beside = (train if train.is_dir() else train.parent) / frames.name
    if not frames.exists() and beside.is_file():
        raise UserError(f"{frames} does not exist; did you mean '{beside}'?")


def embed(
    encoder: EncoderPath,
    data: Annotated[Path, typer.Argument(metavar="PATH", help="A file, a folder or a manifest.")],
    out: Annotated[Path, typer.Option(help="The parquet file to write: path, split, label, vector.")],
    split: Annotated[str | None, typer.Option(help="Which split of the data; all of it by default.")] = None,
    frames: Annotated[
        bool, typer.Option("--frames", help="Sounds: a row for every moment, with its start and end in seconds.")
    ] = False,
    joint: Annotated[
        bool, typer.Option("--joint", help="A tower's: unit vectors of the space that compare with other modalities'.")
    ] = False,
    label_column: LabelColumn = "label",
    signal: Signal = None,
    skip_broken: SkipBroken = False,
    as_json: Json = False,
) -> None:
    """Write one vector per file, or one per moment."""
    from modalities.joint import JointEncoder
    from tasks.embed import embed as run
    from tasks.embed import embed_frames
    from tasks.files_bar import FilesBar
    from tasks.frames import SoundFrames

    if frames and joint:
        raise UserError("--joint compares whole files, and --frames is of their moments; leave one of them out")
    settings = parse_assignments(signal or ())
    tower = JointEncoder(encoder, settings) if joint else None
    loaded = load(encoder, settings) if tower is None else tower.encoder
    listing = list_files(data, loaded.kind, split=split)
    if frames:
        emit(embed_frames(SoundFrames(loaded), listing, out, label_column, skip_broken=skip_broken), as_json, signal)
    else:
        with FilesBar() as bar:
            result = run(tower or loaded, listing, out, label_column, skip_broken=skip_broken, progress=bar)
        emit(result, as_json, signal)


def show(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A run, an encoder, or a parquet file of vectors.")],
    files: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="What to show it of.")] = None,
    *,
    out: Annotated[
        Path, typer.Option(help="The .png, or .html for many files; reconstructions: .gif and .webp move, .wav sounds.")
    ],
    panel: Annotated[
        str | None, typer.Option(help="reconstruction, attention, pca, tsne or neighbours; what suits the source.")
    ] = None,
    ratios: Annotated[str | None, typer.Option(help="reconstruction: mask ratios. [0.75,0.85,0.95]")] = None,
    gaps: Annotated[
        str | None,
        typer.Option(help="reconstruction of pairs of frames: how far apart, in the unit of their training."),
    ] = None,
    mass: Annotated[float | None, typer.Option(help="attention: the share that marked patches hold. [0.6]")] = None,
    signal: Signal = None,
    masks: Annotated[
        Path | None, typer.Option(help="attention: PNGs of what is to be found, named as the files: Jaccard index.")
    ] = None,
    foreground: Annotated[bool | None, typer.Option("--foreground", help="pca: without the background.")] = None,
    color_by: Annotated[str | None, typer.Option(help="tsne: label or split. [label]")] = None,
    most: Annotated[int | None, typer.Option(help="tsne: vectors drawn at most. [5000]")] = None,
    data: Annotated[Path | None, typer.Option(help="neighbours: the folder or manifest to look in.")] = None,
    k: Annotated[int | None, typer.Option("-k", "--k", help="neighbours: how many. [8]")] = None,
    skip_broken: Annotated[
        bool | None, typer.Option("--skip-broken", help="neighbours: leave out broken files.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="reconstruction, tsne: seed of the masks or the map. [0]")] = None,
    as_json: Json = False,
) -> None:
    """Draw what was learned: reconstructions, attention, components, a map of vectors, nearest neighbours."""
    from tasks.show import ShowOptions
    from tasks.show import show as run

    asked = {"ratios": _numbers("ratios", ratios, "0.75,0.95"), "gaps": _numbers("gaps", gaps, "4,16"), "mass": mass,
             "signal": parse_assignments(signal) if signal else None, "masks": masks, "foreground": foreground,
             "color_by": color_by, "most": most, "data": data, "k": k, "skip_broken": skip_broken,
             "seed": seed}  # fmt: skip
    options = cast(ShowOptions, {name: value for name, value in asked.items() if value is not None})
    emit(run(source, files or (), out=out, panel=panel, **options), as_json)


def _numbers(option: str, text: str | None, such_as: str) -> list[float] | None:
    try:
        return None if text is None else [float(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"--{option} {text}: give numbers separated by commas, such as {such_as}") from None
