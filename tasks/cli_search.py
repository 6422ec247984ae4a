"""The command that finds files by words or by example; ``tasks.cli`` puts it on the command line."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tasks.build import default_device
from tasks.cli_options import Json, emit

SPEAK_SECONDS = 10.0
"""Where nobody sees a bar move, a line so often."""


def search(
    encoder: Annotated[
        Path,
        typer.Argument(metavar="ENCODER", help="A run folder with several towers, an encoder folder or a run folder."),
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to search: a folder or a manifest.")],
    query: Annotated[str | None, typer.Argument(metavar="WORDS", help="What to look for.")] = None,
    like: Annotated[
        str | None, typer.Option(help="A file that others are to be like, of any modality that the encoder reads.")
    ] = None,
    top: Annotated[int, typer.Option(help="How many files to find.")] = 20,
    out: Annotated[Path | None, typer.Option(help="A contact sheet, .html or .png.")] = None,
    index: Annotated[
        Path | None, typer.Option(help="Where vectors are kept, one file. [in the user's cache folder]")
    ] = None,
    modality: Annotated[
        str | None, typer.Option(help="That of the files, where several towers could read them.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Which split of a manifest. [all]")] = None,
    refresh: Annotated[bool, typer.Option(help="Look for new, changed and deleted files first.")] = True,
    as_json: Json = False,
) -> None:
    """Find files by words or by example, in an index that is brought up to date first."""
    from tasks.search import search as run
    from tasks.search_index import SearchIndex, check_asked, check_top

    check_asked(query, like)
    check_top(top)
    found = SearchIndex(encoder, folder, index, modality=modality, split=split).to(default_device())
    with _Bar() as bar:
        result = run(found, query=query, like=like, top=top, out=out, refresh=refresh, progress=bar)
    emit(result, as_json)


class _Bar:
    """Says on stderr how many files are embedded: a bar on a terminal, else a line now and then."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        columns = TextColumn("embedding"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn()
        self.bar = Progress(*columns, console=self.console, transient=True)
        self.task = self.bar.add_task("", total=None, visible=False)
        self.spoke = time.monotonic()

    def __enter__(self) -> "_Bar":
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.bar.stop()

    def __call__(self, done: int, total: int) -> None:
        self.bar.update(self.task, completed=done, total=total, visible=True)
        if not self.console.is_terminal and time.monotonic() - self.spoke > SPEAK_SECONDS:
            self.spoke = time.monotonic()
            self.console.print(f"embedding {done:,} of {total:,} files", soft_wrap=True)
