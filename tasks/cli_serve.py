"""The command that serves an encoder over HTTP; ``tasks.cli`` puts it on the command line."""

from pathlib import Path
from typing import Annotated

import typer

from mmssl.errors import UserError
from tasks.cli_options import EncoderPath

MIB = 2**20


def serve(
    encoder: EncoderPath,
    data: Annotated[Path | None, typer.Option(help="Files that can be searched: a folder or a manifest.")] = None,
    index: Annotated[Path | None, typer.Option(help="Their index. [in the user's cache folder]")] = None,
    refresh: Annotated[bool, typer.Option(help="Bring the index up to date first.")] = True,
    modality: Annotated[str | None, typer.Option(help="That of --data, where several towers could read it.")] = None,
    host: Annotated[str, typer.Option(help="Where to listen; any but this machine's own needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any free one.")] = 8000,
    token: Annotated[
        str | None, typer.Option(help="What requests must bring along. MMSSL_TOKEN keeps it out of the process list.")
    ] = None,
    max_mb: Annotated[float, typer.Option(help="MB (2^20 bytes) of a request.")] = 16,
    max_megapixels: Annotated[float, typer.Option(help="Million pixels of a picture or a frame.")] = 50,
    max_seconds: Annotated[float, typer.Option(help="Length of a sound or a video.")] = 600,
    max_classes: Annotated[int, typer.Option(help="Class names in a request.")] = 200,
    max_queue: Annotated[int, typer.Option(help="Requests at a time; more are told to come again (429).")] = 64,
    max_request_seconds: Annotated[float, typer.Option(help="For a request as a whole.")] = 30,
    max_decode_seconds: Annotated[float, typer.Option(help="For reading an upload.")] = 10,
    max_decode_mb: Annotated[int, typer.Option(help="Memory for reading an upload.")] = 2048,
    decoders: Annotated[int, typer.Option(help="Uploads that are read at a time, each in its own process.")] = 2,
    batch: Annotated[int, typer.Option(help="Requests that go through the model together.")] = 32,
    window_ms: Annotated[float, typer.Option(help="How long a request waits for others to go with.")] = 4,
) -> None:
    """Answer over HTTP: zero-shot names, vectors and search, with a page for the browser and its documentation."""
    try:
        from tasks.files_bar import FilesBar
        from tasks.serve import serve as run
        from tasks.serve_limits import Limits
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs {error.name}, which comes with: pip install 'mmssl[serve]'") from None

    limits = Limits(
        body=round(max_mb * MIB),
        pixels=round(max_megapixels * 1e6),
        seconds=max_seconds,
        classes=max_classes,
        queue=max_queue,
        request_seconds=max_request_seconds,
        decode_seconds=max_decode_seconds,
        decode_memory=max_decode_mb * MIB,
        decoders=decoders,
        batch=batch,
        window=window_ms / 1000,
    )
    with FilesBar() as bar:
        run(
            encoder,
            data=data,
            index=index,
            modality=modality,
            refresh=refresh,
            progress=bar,
            host=host,
            port=port,
            token=token,
            limits=limits,
        )
