"""The commands that compare modalities with what CLIP left behind; ``tasks.cli`` puts them on the command line."""

import os
from pathlib import Path
from typing import Annotated

import typer

from mmssl.data.listing import list_files
from mmssl.errors import UserError, sibling
from modalities.joint import joint_encoders
from tasks.build import default_device
from tasks.cli_options import Json, LabelColumn, SkipBroken, emit

JointPath = Annotated[
    Path, typer.Argument(metavar="ENCODER", help="A run folder with several towers (objective clip).")
]


def zero_shot(
    encoder: JointPath,
    files: Annotated[list[Path] | None, typer.Argument(metavar="FILE_OR_FOLDER...", help="What to classify.")] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="Names separated by commas, or a text file with one per line; --test: its labels by default."
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            help="A sentence with {} where the name goes, or a set of them: photo, drawing, video, sound; several are "
            "averaged. ['{}']"
        ),
    ] = None,
    top: Annotated[int | None, typer.Option(help="How many classes to name for each file. [5]")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="A best score below this, from 0 to 1, means: none of the classes.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="What similarities are divided by. [as learned]")] = None,
    modality: Annotated[
        str | None, typer.Option(help="That of the files, where several towers could read them.")
    ] = None,
    test: Annotated[Path | None, typer.Option(help="A folder or manifest with labels: measure accuracy on it.")] = None,
    label_column: LabelColumn = "label",
    split: Annotated[
        str | None, typer.Option(help="Which split; --test: 'test' if it has one, files: all of a manifest.")
    ] = None,
    skip_broken: SkipBroken = False,
    out: Annotated[
        Path | None, typer.Option(help="A .jsonl, .csv or .parquet file to write; --test: a folder for the report.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Name files by class names alone, or measure on labelled files how often that is right."""
    from tasks.zero_shot import name_files
    from tasks.zero_shot import zero_shot as run
    from tasks.zero_shot_classifier import ZeroShotClassifier, reader

    given = files or []
    _check(given, classes, top, test)
    names = None if classes is None else parse_classes(classes)
    towers = joint_encoders(encoder)
    tower = reader(towers, encoder, modality, given if test is None else [])
    if test is not None:
        listing = list_files(test, tower.encoder.kind, split=split, default_split="test")
        names = sorted(set(listing.labels(label_column))) if names is None else names
    assert names is not None
    classify = ZeroShotClassifier(
        towers, names, template, modality=tower.modality, temperature=temperature, threshold=threshold
    ).to(default_device())
    if test is not None:
        emit(run(classify, listing, label_column, out, skip_broken=skip_broken), as_json)
        return
    emit(
        name_files(classify, given, top=5 if top is None else top, out=out, split=split, skip_broken=skip_broken),
        as_json,
    )


def _check(files: list[Path], classes: str | None, top: int | None, test: Path | None) -> None:
    if bool(files) == (test is not None):
        raise UserError(
            "zero-shot needs files to classify, or --test, a folder or manifest with labels"
            + ("; they exclude each other" if files else "")
        )
    if test is None and classes is None:
        raise UserError("zero-shot needs --classes, names such as cat,dog or a text file with one per line")
    if test is not None and top is not None:
        raise UserError("--top is for files; --test has the accuracies of the best and, of more classes, the best five")


def parse_classes(text: str) -> list[str]:
    """Return the names in "a,b,c", or in a text file the line of each; UserError for a file that cannot be read."""
    path = Path(text)
    # Not Path.is_file, which fails for a name that is too long for one.
    if path.suffix.lower() != ".txt" and ("," in text or not os.path.isfile(path)):  # noqa: PTH113
        return [name.strip() for name in text.split(",")]
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist{sibling(path)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    return [line.strip() for line in lines if line.strip()]


def retrieve(
    encoder: JointPath,
    data: Annotated[
        Path, typer.Option(help="A manifest of what belongs together, or a folder of files with the same names.")
    ],
    split: Annotated[str | None, typer.Option(help="Which split of --data; 'test' if it has one.")] = None,
    between: Annotated[
        str | None,
        typer.Option(
            help="Two modalities, such as image,text, in the rows that have both. [the first tower with each other]"
        ),
    ] = None,
    gallery: Annotated[Path | None, typer.Option(help="A PNG of some queries with the best answers to them.")] = None,
    skip_broken: SkipBroken = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the result as JSON, the gallery and a report.")] = None,
    as_json: Json = False,
) -> None:
    """Find what belongs together: recall among the best 1, 5 and 10, both ways."""
    from tasks.retrieve import retrieve as run

    towers = {name: tower.to(default_device()) for name, tower in joint_encoders(encoder).items()}
    two = None if between is None else [name.strip() for name in between.split(",")]
    emit(run(towers, data, split, two, gallery, out, skip_broken=skip_broken), as_json)
