"""The masks that pictures come with, as an encoder would see them."""

from pathlib import Path

import numpy as np
from PIL import Image

from mmssl.errors import UserError, nearest
from modalities.encoder import Encoder
from tasks.first_mask import read_first_mask
from tasks.panels import Files
from tasks.panels_tokens import Bools


def read_masks(encoder: Encoder, files: Files, masks: Path) -> list[Bools]:
    """Return for each picture what of its evaluation crop is marked, bool [h, w].

    ``masks`` is one PNG for one picture, or a folder of PNGs with the pictures' names. Raises UserError for a picture
    without a mask, and for an encoder of something else than pictures.
    """
    if encoder.modality != "image":
        raise UserError(f"--masks are for pictures, but this encoder is one of modality {encoder.modality}")
    return [_read(encoder, path, _mask_of(path, name, files, masks)) for path, name in zip(*files, strict=True)]


def _mask_of(path: str, name: str, files: Files, masks: Path) -> Path:
    if not masks.is_dir():
        if len(files.paths) > 1:
            raise UserError(f"{masks} is one mask, but {len(files.paths)} files are shown; give a folder of masks")
        return masks
    places = [masks / Path(name).with_suffix(".png"), masks / f"{Path(path).stem}.png"]
    for place in places:
        if place.is_file():
            return place
    there = [place.stem for place in masks.glob("*.png")]
    raise UserError(f"{masks} holds no {places[-1].name} for {path}{nearest(Path(path).stem, there) if there else ''}")


def _read(encoder: Encoder, path: str, mask: Path) -> Bools:
    height, width = (int(side) for side in encoder.kind.inspect(path))
    marked = read_first_mask(mask, (height, width)).ids > 0
    picture = Image.fromarray(np.where(marked, 255, 0).astype(np.uint8)).convert("RGB")
    # Resized and cropped as the picture itself, and half marked is marked.
    seen: Bools = encoder.kind.picture(encoder.transform(picture), encoder.config.signal)[..., 0] > 127
    return seen
