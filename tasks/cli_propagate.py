"""The command that follows masks, keypoints and parts through videos; ``tasks.cli`` puts it on the command line."""

from pathlib import Path
from typing import Annotated

import typer

from mmssl.errors import UserError
from modalities.encoder import load
from tasks.build import default_device
from tasks.cli_options import EncoderPath, Json, emit


def propagate(
    encoder: EncoderPath,
    data: Annotated[
        Path | None, typer.Option(help="Annotated sequences, as DAVIS-2017, VIP or JHMDB have them.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Your own video, GIF or folder of frames; #t=START,END takes a piece.")
    ] = None,
    first_mask: Annotated[
        Path | None, typer.Option(help="--source: a PNG of the first frame, black but for what is to be followed.")
    ] = None,
    first_frame: Annotated[
        Path | None, typer.Option(help="--source: only write its first frame to this PNG, to draw the mask on.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="--data: masks, keypoints or parts. [masks]")] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            help="Compare what this block puts out, from 1, or from -1 for the last; or patches: pixels. [-1]"
        ),
    ] = None,
    short_side: Annotated[
        int | None,
        typer.Option(
            help="Resize frames to this shorter side, in pixels, before they are cut into patches: smaller is faster "
            "and coarser. [their own size; for --source at most 480]"
        ),
    ] = None,
    context: Annotated[int, typer.Option(help="How many frames before are compared, besides the first.")] = 7,
    radius: Annotated[int, typer.Option(help="How far away a similar token may be, in tokens; 0: anywhere.")] = 12,
    topk: Annotated[int, typer.Option(help="How many of the most similar tokens count.")] = 5,
    temperature: Annotated[float, typer.Option(help="Of the softmax that weighs them.")] = 0.1,
    scratch: Annotated[bool, typer.Option("--scratch", help="Take random weights: the baseline.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of --scratch and of the intervals.")] = 0,
    split: Annotated[str | None, typer.Option(help="--data: which list of sequences; 'val' if there is one.")] = None,
    resolution: Annotated[str | None, typer.Option(help="--data: which folder of frames; '480p' if there.")] = None,
    films: Annotated[bool | None, typer.Option("--films/--no-films", help="--data: draw films and sheets.")] = None,
    out: Annotated[Path, typer.Option(help="The folder for the results: new or empty.")] = Path("runs/propagate"),
    as_json: Json = False,
) -> None:
    """Follow masks, keypoints or parts of a video's first frame through the rest of it, and measure it."""
    from tasks.following import FollowOptions, parse_layer
    from tasks.propagate import propagate as over_data
    from tasks.propagate_source import propagate_source, write_first_frame

    of_data: dict[str, object] = {"kind": kind, "split": split, "resolution": resolution, "films": films}
    _check(data, source, first_mask, first_frame, of_data)
    if first_frame is not None:
        assert source is not None
        emit(write_first_frame(source, first_frame), as_json)
        return
    options: FollowOptions = {
        "layer": parse_layer(layer), "short_side": short_side, "context": context, "radius": radius, "topk": topk,
        "temperature": temperature,
    }  # fmt: skip
    loaded = load(encoder).to(default_device())
    if data is not None:
        result = over_data(
            loaded, data, kind or "masks", out, split=split, resolution=resolution, scratch=scratch, seed=seed,
            films=films is not False, encoder_name=str(encoder), **options,
        )  # fmt: skip
        emit(result, as_json)
        return
    assert source is not None
    assert first_mask is not None
    followed = propagate_source(
        loaded, source, first_mask, out, encoder_name=str(encoder), scratch=scratch, seed=seed, **options
    )
    emit(followed, as_json)


def _check(
    data: Path | None, source: str | None, mask: Path | None, frame: Path | None, of_data: dict[str, object]
) -> None:
    if (data is None) == (source is None):
        raise UserError(
            "propagate needs --data, annotated sequences, or --source, your own video"
            + ("; they exclude each other" if data is not None else "")
        )
    if source is None:
        for name, file in (("mask", mask), ("frame", frame)):
            if file is not None:
                raise UserError(f"--first-{name} is for --source; --data has its own annotations")
        return
    if mask is None and frame is None:
        raise UserError(
            "--source needs --first-mask, a PNG that marks what is to be followed; draw it on the first frame, which "
            "--first-frame FILE.png writes"
        )
    if mask is not None and frame is not None:
        raise UserError("--first-frame writes a frame to draw on, --first-mask is what was drawn; give one of them")
    for name, value in of_data.items():
        if value is not None:
            raise UserError(f"--{name} is for --data, not for --source")
