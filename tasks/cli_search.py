"""The command that finds files by words or by example; ``tasks.cli`` puts it on the command line."""

from pathlib import Path
from typing import Annotated

import typer

from tasks.build import default_device
from tasks.cli_options import Json, emit


def search(
    encoder: Annotated[
        Path,
        typer.Argument(metavar="ENCODER", help="A run folder with several towers, an encoder folder or a run folder."),
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to search: a folder or a manifest.")],
    words: Annotated[list[str] | None, typer.Argument(metavar="[WORDS]...", help="What to look for.")] = None,
    like: Annotated[
        str | None,
        typer.Option(
            help="A file that others are to be like, of any modality that the encoder reads; clip.mp4#t=3,5 is a piece."
        ),
    ] = None,
    top: Annotated[int, typer.Option(help="How many files to find.")] = 20,
    out: Annotated[Path | None, typer.Option(help="A contact sheet, .html or .png.")] = None,
    index: Annotated[
        Path | None, typer.Option(help="Where vectors are kept, one file. [in the user's cache folder]")
    ] = None,
    modality: Annotated[
        str | None, typer.Option(help="That of the files, where several towers could read them.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Which split of a manifest; each has an index of its own. [all]")
    ] = None,
    refresh: Annotated[bool, typer.Option(help="Look for new, changed and deleted files first.")] = True,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Embed every file again, also those whose size and time are as they were.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Find files by words or by example, in an index that is brought up to date first."""
    from tasks.files_bar import FilesBar
    from tasks.search import search as run
    from tasks.search_index import SearchIndex, check_asked, check_top
    from tasks.stopping import stopping

    query = " ".join(words) if words else None
    check_asked(query, like)
    check_top(top)
    found = SearchIndex(encoder, folder, index, modality=modality, split=split).to(default_device())
    after = "of all others there is what was known before" if rebuild else "the same command goes on from there"
    with stopping(lambda: f"stopped; what was embedded is kept, and {after}"), FilesBar() as bar:
        result = run(found, query=query, like=like, top=top, out=out, refresh=refresh, rebuild=rebuild, progress=bar)
    emit(result, as_json)
