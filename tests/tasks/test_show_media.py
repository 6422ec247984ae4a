"""Reconstructions of videos and sounds: strips, animations, axes, players and files to listen to, true to the media."""

import base64
import io
import json
import re

import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
from media import numbered, numbers, tone, write_sound, write_video

from mmssl.contracts import Moves, Sounds
from mmssl.errors import UserError
from modalities.encoder import MODALITIES, Encoder, EncoderConfig, load, typed
from tasks.build import build_objective, parse_recipe
from tasks.panels import Block, Line, Shot, arranged, read_signal
from tasks.panels_media import MOST_FRAMES, View, animate, beside, record, still, strip, view_of
from tasks.panels_page import draw, write_panel
from tasks.panels_reconstruction import attempts, reconstruction_panel, target_note, triplet
from tasks.panels_tokens import _border, attention_panel, pca_panel
from tasks.report import Axes, Medium, Pictures, as_medium, write_report
from tasks.show import show
from tasks.writer import export
from mmssl.run import Run

BACKBONE = {"dim": 16, "depth": 1, "num_heads": 2}
OBJECTIVE = {"name": "mae", "mask_ratio": 0.5, "decoder": {"dim": 16, "depth": 1, "num_heads": 2}}
RECIPES = {
    "video": {
        "modality": "video",
        "signal": {"frames": 8, "size": 32, "stride": 2},
        "model": {"tokenizer": {"patch_size": [2, 16, 16]}, "backbone": BACKBONE, "cls_token": False},
        "objective": {**OBJECTIVE, "mask": "tube"},
    },
    "audio": {
        "modality": "audio",
        "signal": {"sample_rate": 8000, "seconds": 0.64, "mels": 32},
        "model": {"tokenizer": {"patch_size": 16}, "backbone": BACKBONE},
        "objective": OBJECTIVE,
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders of an untrained MAE for videos and one for sounds."""
    torch.manual_seed(0)
    folders = {}
    for name, settings in RECIPES.items():
        run = Run(tmp_path_factory.mktemp(name) / "run")
        run.path.mkdir()
        recipe = parse_recipe(settings, name)
        objective = build_objective(recipe)
        state = objective.state_dict()
        run.config_file.write_text(recipe.as_yaml())
        export(run, recipe, objective, state, state)
        folders[name] = run.path
    return folders


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A video of 24 frames, 12 a second, that say which they are."""
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", numbered(24, 64, 64), fps=12, crf="10")


@pytest.fixture(scope="module")
def beep(tmp_path_factory):
    """A second of sound: half of it silence, then a tone of 1000 Hz."""
    wave = tone(1.0, 8000, 1000)
    wave[:4000] = 0
    return write_sound(tmp_path_factory.mktemp("beep") / "beep.wav", wave, 8000)


def attempted(folder, file, ratios=(0.5,), rates=None):
    from tasks.writer import load_objective

    recipe, objective = load_objective(folder)
    signal = read_signal(recipe, str(file))
    return recipe, attempts(recipe, objective, folder, [file.name], [signal], ratios, 0, rates)


def data_of(page, kind):
    """The files of a kind that a page holds."""
    return [base64.b64decode(content) for content in re.findall(rf'src="data:{kind};base64,([^"]+)"', page)]
