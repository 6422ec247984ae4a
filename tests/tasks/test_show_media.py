"""Reconstructions of videos and sounds: strips, animations, axes, players and files to listen to, true to the media."""

import base64
import io
import re

import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
from media import numbered, numbers, tone, write_sound, write_video

from mmssl.data.listing import list_files
from mmssl.errors import UserError
from mmssl.run import Run
from modalities.abilities import Moves, Sounds
from modalities.encoder import MODALITIES, load
from tasks.build import build_objective, parse_recipe
from tasks.panels import Block, Line, Panel, Shot, arranged, read_example
from tasks.panels_media import MOST_FRAMES, animate, beside, record, still, strip, view_of
from tasks.panels_page import draw
from tasks.panels_reconstruction import attempts, target_note, triplet
from tasks.panels_tokens import _border
from tasks.report import Axes, Medium, as_medium, write_report
from tasks.run_report import reconstructions
from tasks.show import show
from tasks.writer import export, load_objective

BACKBONE = {"dim": 16, "depth": 1, "num_heads": 2}
OBJECTIVE = {"name": "mae", "mask_ratio": 0.5, "decoder": {"dim": 16, "depth": 1, "num_heads": 2}}
RECIPES = {
    "video": {
        "train": {"steps": 1},
        "modality": "video",
        "signal": {"frames": 8, "size": 32, "stride": 2},
        "model": {"tokenizer": {"patch_size": [2, 16, 16]}, "backbone": BACKBONE, "cls_token": False},
        "objective": {**OBJECTIVE, "mask": "tube"},
    },
    "audio": {
        "train": {"steps": 1},
        "modality": "audio",
        "signal": {"sample_rate": 8000, "seconds": 0.64, "mels": 32, "longest": 2},
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
    recipe, objective = load_objective(folder)
    example = read_example(recipe, str(file))
    return recipe, attempts(recipe, objective, folder, [file.name], [example], ratios, 0, rates)


def data_of(page, kind):
    """The files of a kind that a page holds."""
    return [base64.b64decode(content) for content in re.findall(rf'src="data:{kind};base64,([^"]+)"', page)]


def played(content):
    """The frames of an animation, RGB, and how many milliseconds each is shown."""
    frames, durations = [], []
    with PIL.Image.open(io.BytesIO(content)) as image:
        for i in range(image.n_frames):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB")))
            durations.append(image.info["duration"])
    return frames, durations


# Videos


def test_a_strip_has_the_clips_frames_in_order(runs, clip):
    recipe, (found,) = attempted(runs["video"], clip)
    kind, settings = MODALITIES["video"], recipe.signal
    frames = kind.motion(found.at[0].stages[0], settings)
    assert numbers(frames) == list(range(4, 20, 2))  # the middle clip
    original, masked, _ = triplet(recipe, found.at[0])
    assert original.shape == (32, 8 * 33 - 1, 3)
    parts = [original[:, i * 33 : i * 33 + 32] for i in range(8)]
    np.testing.assert_array_equal(np.stack(parts), frames)
    assert (original[:, 32::33] == 255).all()
    # What is hidden is hidden in all frames (a tube), and what is seen is as it was.
    grey = kind.motion(torch.zeros(3, 1, 1, 1), settings)[0, 0, 0]
    hidden = (np.stack([masked[:, i * 33 : i * 33 + 32] for i in range(8)]) == grey).all(-1)
    assert (hidden == hidden[0]).all()
    assert hidden.mean() == 0.5
    np.testing.assert_array_equal(masked[:, :32][~hidden[0]], original[:, :32][~hidden[0]])


def test_of_a_long_clip_every_so_many_frames_are_in_the_strip():
    frames = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    shown = strip(frames)[0, ::5, 0].tolist()
    assert shown == [0, 3, 6, 9, 12, 15, 18]
    assert len(shown) <= MOST_FRAMES
    assert strip(frames[:8]).shape == (4, 8 * 5 - 1, 3)


def test_what_is_drawn_per_token_lies_on_the_frames_of_its_time(runs, clip):
    encoder = load(runs["video"])
    view = view_of(encoder, encoder.read(str(clip)))
    assert view.grid == (4, 2, 2)
    assert numbers(np.stack(np.split(view.picture, 4, axis=1))) == [4, 8, 12, 16]
    spread = view.spread(np.arange(16))
    for i, frame in enumerate(np.split(spread, 4, axis=1)):
        np.testing.assert_array_equal(frame, np.kron(np.arange(4).reshape(2, 2) + 4 * i, np.ones((16, 16))))
    assert view.shown().shape == (32, 4 * 33 - 1, 3)


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_an_animation_has_every_frame_at_the_clips_pace(runs, clip, tmp_path, suffix):
    out = tmp_path / f"x{suffix}"
    result = show(runs["video"], [clip], out=out, ratios=[0.5, 0.75])
    assert result.note.startswith("6 frames per second")  # 12 of the file, every other one
    pages, found = played(out.read_bytes())
    assert len(pages) == 8
    assert abs(sum(found) - 8000 / 6) <= 10
    assert max(found) - min(found) <= 10
    # The original stands left, 192 pixels high and wide, below title, note, name and caption.
    recipe, made = attempted(runs["video"], clip)
    frames = MODALITIES["video"].motion(made[0].at[0].stages[0], recipe.signal).repeat(6, 1).repeat(6, 2).astype(int)
    tops = [y for y in range(pages[0].shape[0] - 192) if np.abs(pages[3][y : y + 192, 24:216] - frames[3]).mean() < 9]
    assert len(tops) >= 2  # one for each ratio
    for page, frame in zip(pages, frames, strict=True):
        assert np.abs(page[tops[0] : tops[0] + 192, 24:216] - frame).mean() < 9


def test_a_page_plays_what_its_strips_show(runs, clip, tmp_path):
    show(runs["video"], [clip], out=tmp_path / "x.html", ratios=[0.5])
    page = (tmp_path / "x.html").read_text()
    (film,) = data_of(page, "image/webp")
    recipe, made = attempted(runs["video"], clip)
    expected = beside([MODALITIES["video"].motion(x, recipe.signal) for x in made[0].at[0].stages])
    np.testing.assert_array_equal(np.stack(played(film)[0]), expected)  # small: without loss
    assert len(data_of(page, "image/png")) == 3
    assert page.count('<ol class="strip stacked"') == 1
    assert "brightness and contrast of each colour in each hidden patch" in page
    assert "<audio" not in page


def test_moments_are_rounded_so_that_the_whole_lasts_as_long_as_it_should():
    frames = [np.full((8, 8, 3), 10 * i, np.uint8) for i in range(14)]
    for form, unit in (("GIF", 10), ("WEBP", 1)):
        _, durations = played(animate(frames, 7.0, form))
        assert len(durations) == 14
        assert sum(durations) == 2000
        assert set(durations) <= {140, 150} if unit == 10 else {142, 143}


def test_one_animation_has_one_pace(runs, clip, tmp_path):
    other = write_video(tmp_path / "fast.mp4", numbered(24, 64, 64), fps=24)
    with pytest.raises(UserError, match=r"clip.mp4 and .*fast.mp4 have 6 and 12 frames per second"):
        show(runs["video"], [clip, other], out=tmp_path / "x.webp")
    quick = write_video(tmp_path / "quick.mp4", numbered(24, 64, 64), fps=120)
    with pytest.raises(UserError, match=r"a GIF has at most 50 frames per second, but these have 60; take \.webp"):
        show(runs["video"], [quick], out=tmp_path / "x.gif", ratios=[0.5])
    assert not list(tmp_path.glob("x.*"))


def test_time_has_no_border():
    assert _border((4, 4, 4), (0,)).reshape(4, 16).sum(1).tolist() == [12] * 4
    assert _border((3, 5), (1,)).reshape(3, 5).all(1).tolist() == [True, False, True]
    assert _border((3, 3), ()).sum() == 8


# Sounds


def test_a_sound_is_written_at_its_rate_and_length_and_is_loud_where_it_was(runs, beep, tmp_path):
    out = tmp_path / "new" / "x.wav"
    result = show(runs["audio"], [beep], out=out)
    assert result.facts["ratios"] == [0.5]  # what it was trained with
    assert "estimated (Griffin-Lim)" in result.note
    samples, rate = soundfile.read(out)
    recipe, made = attempted(runs["audio"], beep)
    assert rate == 8000
    assert len(samples) == 95 * 80 + 200  # six whole patches: 96 windows
    kind = MODALITIES["audio"]
    wanted, _ = kind.sound(made[0].at[0].stages[2], recipe.signal)
    np.testing.assert_allclose(samples, (wanted / max(1, wanted.abs().max())).numpy(), atol=1e-4)
    page = tmp_path / "x.html"
    show(runs["audio"], [beep], out=page, ratios=[0.5])
    original, predicted = (soundfile.read(io.BytesIO(file)) for file in data_of(page.read_text(), "audio/flac"))
    assert original[1] == predicted[1] == 8000
    silence, loud = (original[0][part].std() for part in (slice(400, 3600), slice(4400, 7000)))
    assert loud > 50 * silence
    spectrum = np.abs(np.fft.rfft(original[0][4400:7000]))
    assert spectrum.argmax() * 8000 / 2600 == pytest.approx(1000, abs=20)
    np.testing.assert_allclose(predicted[0], samples, atol=0.02)


def test_what_is_too_loud_is_made_fainter_alike():
    waves = [torch.tensor([0.5, -2.0]), torch.tensor([1.0, 0.25])]
    first, second = (soundfile.read(io.BytesIO(file))[0] for file in record(waves, 8000, "WAV"))
    np.testing.assert_allclose(first, [0.25, -1], atol=1e-4)
    np.testing.assert_allclose(second, [0.5, 0.125], atol=1e-4)
    (alone,) = record([torch.tensor([0.5, 0.25])], 8000, "FLAC")
    np.testing.assert_allclose(soundfile.read(io.BytesIO(alone))[0], [0.5, 0.25], atol=1e-4)


def test_axes_stand_where_the_sound_is(runs, beep, tmp_path):
    recipe, made = attempted(runs["audio"], beep)
    original = as_medium(still(MODALITIES["audio"], made[0].at[0].stages[0], recipe.signal))
    ticks = {word: at for side in original.axes for at, word in side}
    loud = original.picture.astype(int).sum(2)
    assert abs(loud[:, 60:].mean(1).argmax() - ticks["1000 Hz"]) <= 1  # the tone
    begins = int((loud.max(0) > 300).argmax())
    assert abs(begins - ticks["0.4 s"] - 10) <= 3  # at half a second, 10 frames later
    # The page has them at the same places, whatever it is scaled to.
    show(runs["audio"], [beep], out=tmp_path / "x.html", ratios=[0.5])
    height, width = original.picture.shape[:2]
    found = re.findall(r'class="tick (.)" style="\w+: ([\d.]+)%">([\d.]+ \w+)<', (tmp_path / "x.html").read_text())
    assert {side for side, _, _ in found} == {"x", "y"}
    for side, place, word in found:
        share = ticks[word] / width if side == "x" else 1 - ticks[word] / height
        assert float(place) == pytest.approx(100 * share, abs=0.01)


def test_axes_in_a_picture_are_scaled_with_it():
    picture = np.full((20, 60, 3), 77, np.uint8)
    shot = Shot("c", Medium(picture, Axes([(0, "0 s"), (30, "1 s")], [(5, "9 Hz")])))
    page = draw(Panel("T", "", arranged([Block("x", [Line("", [shot])])])))
    dark = np.argwhere((page == 77).all(2))
    (top, left), (bottom, right) = dark.min(0), dark.max(0)
    assert (bottom - top + 1, right - left + 1) == (180, 540)
    below, beside_ = page[bottom + 3, :, 0], page[:, left - 3, 0]
    assert np.flatnonzero(below == 128).tolist() == [left, left + 270]
    assert np.flatnonzero(beside_ == 128).tolist() == [top + 45]


def test_masked_patches_are_hidden_in_the_spectrogram(runs, beep):
    _, made = attempted(runs["audio"], beep, (0.25, 0.75))
    for one, share in zip(made[0].at, (0.25, 0.75), strict=True):
        hidden = one.made.hidden[0].reshape(2, 16, 6, 16).transpose(1, 2).flatten(2)
        assert set(hidden.mean(2).flatten().tolist()) == {0.0, 1.0}
        assert hidden.mean() == share
        original, masked, predicted = one.stages
        seen = one.made.hidden == 0
        assert torch.equal(masked[seen], original[seen])
        assert torch.equal(predicted[seen], original[seen])
        assert not masked[~seen].any()


# Both


@pytest.mark.parametrize("name", ["video", "audio"])
@pytest.mark.parametrize("panel", ["reconstruction", "attention", "pca"])
def test_every_panel_is_drawn(runs, clip, beep, tmp_path, name, panel):
    for suffix in (".png", ".html"):
        out = tmp_path / f"x{suffix}"
        show(runs[name], [clip if name == "video" else beep], out=out, panel=panel)
        assert out.stat().st_size > 1000


def test_wide_pictures_go_below_each_other_with_their_labels():
    wide, small = np.zeros((4, 16, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)

    def block(picture):
        lines = [
            Line("heat", [Shot("in", picture), Shot("one\ntwo", picture)]),
            Line("lit", [None, Shot("9", picture)]),
        ]
        return Block("b", lines)

    assert arranged([block(small)]) == [block(small)]
    (turned,) = arranged([block(wide)])
    captions = [[shot and shot.caption for shot in line.shots] for line in turned.lines]
    assert captions == [["in", None], ["one, two", "lit: 9"]]


def test_what_must_be_said_depends_on_the_target(runs):
    recipes = {name: load_objective(folder)[0] for name, folder in runs.items()}
    assert "of each colour in each hidden patch are" in target_note(recipes["video"])
    assert "of each hidden patch are" in target_note(recipes["audio"])
    recipes["audio"].model.tokenizer.__dict__["target"] = "raw"
    assert target_note(recipes["audio"]) == ""


def test_modalities_say_what_they_can():
    assert {name for name, kind in MODALITIES.items() if isinstance(kind, Moves)} == {"video"}
    assert {name for name, kind in MODALITIES.items() if isinstance(kind, Sounds)} == {"audio"}


def test_mistakes_are_one_sentence(ask, runs, clip, beep, tmp_path):
    for given, sentence in {
        (runs["audio"], beep, "--out", "x.gif"): "audio does not move, so the name must end in .png, .html or .wav",
        (
            runs["video"],
            clip,
            "--out",
            "x.wav",
        ): "video cannot be heard, so the name must end in .png, .html, .gif or .webp",
        (runs["audio"], beep, "--out", "x.wav", "--ratios", "0.5,0.75"): "holds one sound, but 2 --ratios were given",
        (runs["audio"], beep, beep, "--out", "x.wav"): "shows at most 1 file, but 2 were given",
        (runs["video"], clip, "--out", "x.webp", "--panel", "pca"): "pca is shown as a picture or as a page",
        (runs["video"], clip, "--out", "x.mp4"): "the name must end in .png or .html, or for reconstructions of videos",
    }.items():
        words = [tmp_path / word if str(word).startswith("x.") else word for word in given]
        code, out, err = ask("show", *words)
        assert (code, out) == (2, ""), err
        assert sentence in err
        assert err.count("\n") == 1
        assert list(tmp_path.iterdir()) == []


def test_of_a_long_sound_the_middle_piece_is_shown_and_the_note_says_so(runs, beep, tmp_path):
    long = write_sound(tmp_path / "long.wav", np.concatenate([tone(1.9, 8000, hz) for hz in (300, 1000, 3000)]), 8000)
    for panel in ("reconstruction", "attention"):
        note = show(runs["audio"], [long], out=tmp_path / "x.png", panel=panel).note
        assert "the middle part is shown" in note
        assert "the middle part" not in show(runs["audio"], [beep], out=tmp_path / "x.png", panel=panel).note
    show(runs["audio"], [long], out=tmp_path / "x.html", ratios=[0.5])
    original, _ = (
        soundfile.read(io.BytesIO(file))[0] for file in data_of((tmp_path / "x.html").read_text(), "audio/flac")
    )
    assert np.abs(np.fft.rfft(original)).argmax() * 8000 / len(original) == pytest.approx(1000, abs=20)


def test_a_runs_report_plays_its_files(runs, clip, beep, tmp_path):
    for name, file in (("video", clip), ("audio", beep)):
        recipe, objective = load_objective(runs[name])
        (section,) = reconstructions(recipe, objective, list_files(file, MODALITIES[name]), held_out=True)
        assert section.note.startswith("Files that were not trained on; MAE saw only what the masked pictures show.")
        write_report(tmp_path / "report.html", "t", "s", [section])
        page = (tmp_path / "report.html").read_text()
        if name == "video":
            assert section.columns == ["input", "masked", "reconstruction", "in motion"]
            assert len(played(data_of(page, "image/webp")[0])[0]) == 8
        else:
            assert section.columns == ["input", "masked", "reconstruction"]
            assert [len(soundfile.read(io.BytesIO(file))[0]) for file in data_of(page, "audio/flac")] == [7800] * 2
            assert "(Griffin-Lim)" in section.note
        assert 'class="groups per-1 stacked"' in page
        assert "media-src data:" in page
