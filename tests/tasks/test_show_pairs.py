"""What is shown of runs that were trained on pairs of frames, and of the encoders that they leave behind."""

import numpy as np
import PIL.Image
import pytest
from media import numbered, write_frames

from mmssl.errors import UserError
from modalities.encoder import MODALITIES
from tasks.panels import read_example
from tasks.panels_reconstruction import attempts, reconstruction_panel
from tasks.pretrain import pretrain
from tasks.show import show
from tasks.writer import load_objective


@pytest.fixture(scope="module")
def pairs(materials, tmp_path_factory):
    recipe, folder, settings = materials["pairs"]
    out = tmp_path_factory.mktemp("pairs") / "run"
    pretrain(recipe, folder, out, settings | {"train.steps": 2})
    return out, sorted((folder / "train" / "forwards").glob("*.mp4"))[:2]


def test_a_run_of_pairs_shows_the_past_and_frames_as_far_apart_as_asked(pairs, tmp_path):
    run, films = pairs
    recipe, objective = load_objective(run)
    one = read_example(recipe, str(films[0]))
    made = attempts(recipe, objective, run, ["x"], [one], (0.75,), 0)
    (block,) = reconstruction_panel(recipe, made).blocks
    captions = [shot.caption for line in block.lines for shot in line.shots]
    assert captions == ["past", "original", "75 % masked\n4 of 16 seen", "reconstruction"]
    shown = [shot.picture for line in block.lines for shot in line.shots]
    np.testing.assert_array_equal(shown[1], MODALITIES["image"].picture(one["signal"], recipe.signal))
    result = show(run, films, out=tmp_path / "gaps.png", gaps=(2, 4), ratios=(0.5,))
    assert "SiamMAE saw only what the masked pictures, and those called past, show." in result.note
    show(run, films, out=tmp_path / "one.png", ratios=(0.5,))
    twice, once = (np.prod(PIL.Image.open(tmp_path / name).size) for name in ("gaps.png", "one.png"))
    assert twice > 1.3 * once
    with pytest.raises(UserError, match="--gaps are above 0"):
        show(run, films, out=tmp_path / "x.png", gaps=(0,))
    report = (run / "report.html").read_text()
    assert 'alt="past, example 1"' in report
    assert 'alt="masked, example 1"' in report


def test_what_is_not_of_pairs_has_no_gaps(materials, tmp_path):
    recipe, folder, settings = materials["image"]
    run = pretrain(recipe, folder, tmp_path / "run", settings | {"train.steps": 1}).run
    with pytest.raises(UserError, match="--gaps are for runs that were trained on pairs of frames"):
        show(run, sorted(folder.rglob("*.png"))[:1], out=tmp_path / "x.png", gaps=(2,))


def test_an_encoder_trained_on_pairs_shows_pictures(pairs, photos, tmp_path):
    run, _ = pairs
    pictures = sorted(photos.rglob("*.png"))[:2]
    for panel in ("attention", "pca"):
        assert show(run, pictures, out=tmp_path / f"{panel}.png", panel=panel).files == [str(p) for p in pictures]


def test_folders_of_pictures_are_said_to_be_taken_as_videos(materials, tmp_path, capsys):
    recipe, _, settings = materials["pairs"]
    write_frames(tmp_path / "photos", numbered(8, 32, 40))
    pretrain(recipe, tmp_path / "photos", tmp_path / "run", settings | {"train.steps": 1})
    assert "1 of 1 files is a folder of numbered pictures, taken as one video each" in capsys.readouterr().err


def test_an_encoder_is_shown_at_another_size(pairs, photos, tmp_path):
    run, _ = pairs
    picture = sorted(photos.rglob("*.png"))[0]
    for size in (16, 32):
        show(run, [picture], out=tmp_path / f"{size}.html", panel="pca", signal={"signal.size": [size, size]})
    assert 'width="32"' in (tmp_path / "32.html").read_text()
    assert 'width="32"' not in (tmp_path / "16.html").read_text()
