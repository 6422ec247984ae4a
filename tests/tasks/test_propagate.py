"""Propagation through whole sequences: videos whose answer is known, the files that are written, every mistake."""

import csv
import json
import re

import numpy as np
import PIL.Image
import pytest
import torch
from marked import SIZE, moving_square, texture
from rich.console import Console

import mmssl
from mmssl.errors import MmsslError, UserError
from modalities.encoder import Encoder, EncoderConfig, typed
from tasks import propagate as over_data
from tasks.films import COLOURS
from tasks.following import Follower, checked, fitting, fresh
from tasks.propagate import propagate
from tasks.propagate_rows import pace
from tasks.propagate_scores import counted
from tasks.sequences import PALETTE, find_sequences, read_mask, write_mask
from tasks.tracks import PointTrack, area_labels, mask_of


def stripes(count=6):
    """A picture that stands still, with objects 1 and 3 whose edges are those of patches."""
    masks = np.zeros((count, *SIZE), np.uint8)
    masks[:, :, 8:24], masks[:, :, 40:56] = 1, 3
    return np.tile(texture(*SIZE), (count, 1, 1, 1)), masks


def write_davis(root, **sequences):
    for name, (frames, masks) in sequences.items():
        for i, frame in enumerate(frames):
            path = root / "JPEGImages" / "480p" / name / f"{i:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(frame).save(path)
        for i, mask in enumerate(masks):
            path = root / "Annotations" / "480p" / name / f"{i:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_mask(path, mask)
    return root


def write_points(root, name, frames, points):
    """Write a sequence whose one object has the points [t, k, 2]."""
    write_davis(root, **{name: (frames, [])})
    rows = [[[x, y, 1] for x, y in row] for row in points.tolist()]
    folder = root / "Keypoints" / name
    folder.mkdir(parents=True)
    content = {"points": [f"p{i}" for i in range(points.shape[1])], "objects": {"1": {"keypoints": rows}}}
    (folder / "keypoints.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def video_encoder():
    model = {"tokenizer": {"patch_size": (2, 4, 4)}, "backbone": {"dim": 32, "depth": 2, "num_heads": 4}}
    config = typed(EncoderConfig, "video", "test")
    return Encoder(config(modality="video", signal={"size": (16, 16), "frames": 4}, model=model))


@pytest.fixture
def encoders(tiny_encoder, video_encoder):
    return {"image": tiny_encoder(), "video": video_encoder}


@pytest.fixture
def saved(tiny_encoder, tmp_path):
    tiny_encoder().save(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def square(tmp_path):
    return write_davis(tmp_path / "square", square=moving_square())


# Known answers


@pytest.mark.parametrize("modality", ["image", "video"])
def test_a_textured_square_is_followed_by_its_pixels(encoders, modality, square, tmp_path):
    result = propagate(encoders[modality], square, out=tmp_path / "out", layer="patches", films=False)
    assert result.scores["J_mean"].value > 0.95
    assert result.scores["J_recall"].value == 1
    assert result.as_dict()["settings"]["layer"] == "patches"


def test_a_square_that_jumps_further_than_the_radius_is_lost(tiny_encoder, tmp_path):
    frames, masks = moving_square(4, step=12, side=8)
    data = write_davis(tmp_path / "data", jump=(frames, masks))
    near = propagate(tiny_encoder(), data, out=tmp_path / "a", layer="patches", films=False, radius=2)
    far = propagate(tiny_encoder(), data, out=tmp_path / "b", layer="patches", films=False, radius=3)
    assert near.scores["J_mean"].value < 0.1
    assert far.scores["J_mean"].value > 0.85


@pytest.mark.parametrize("modality", ["image", "video"])
@pytest.mark.parametrize("layer", [1, -1])
def test_a_picture_that_stands_still_scores_1(encoders, modality, layer, tmp_path):
    data = write_davis(tmp_path / "data", still=stripes())
    result = propagate(encoders[modality], data, out=tmp_path / "out", layer=layer, films=False)
    assert {name: score.value for name, score in result.scores.items()} == {
        "J&F_mean": 1, "J_mean": 1, "J_recall": 1, "J_decay": 0, "F_mean": 1, "F_recall": 1, "F_decay": 0,
    }  # fmt: skip
    assert result.as_dict()["settings"]["layer"] == (1 if layer == 1 else 2)


def test_parts_that_stand_still_have_a_mean_iou_of_1(tiny_encoder, tmp_path):
    data = write_davis(tmp_path / "data", still=stripes(3))
    result = propagate(tiny_encoder(), data, "parts", tmp_path / "out", films=False, topk=1)
    assert result.scores["mIoU"].value == 1
    assert result.classes == {"0": 1, "1": 1, "3": 1}


@pytest.mark.parametrize("modality", ["image", "video"])
def test_keypoints_of_a_moving_texture_are_found(encoders, modality, tmp_path):
    whole = texture(*SIZE)
    frames = np.stack([np.roll(whole, 4 * t, axis=1) for t in range(5)])
    first = np.array([[13.0, 12.0], [30.5, 21.25], [17.0, 33.0], [26.0, 38.5]])
    points = first + 4 * np.arange(5)[:, None, None] * np.array([1, 0])
    data = write_points(tmp_path / "data", "roll", frames, points)
    # What leaves at the right comes in at the left: everything has its like somewhere, but not nearby.
    options = {"layer": "patches", "radius": 0}
    result = propagate(encoders[modality], data, "keypoints", tmp_path / "out", films=False, **options)
    assert result.scores["PCK@0.1"].value == 1
    written = json.loads((tmp_path / "out" / "keypoints" / "roll.json").read_text())
    found = np.array(written["objects"]["1"]["keypoints"])
    assert np.abs(found[..., :2] - points).max() < 0.6
    assert found[..., 2].all()


def test_what_is_found_can_be_given_as_annotation(tiny_encoder, tmp_path):
    frames = np.stack([np.roll(texture(*SIZE), 4 * t, axis=1) for t in range(3)])
    data = write_points(tmp_path / "data", "roll", frames, np.array([[[20.0, 20.0], [28.0, 28.0]]] * 3))
    propagate(tiny_encoder(), data, "keypoints", tmp_path / "out", films=False)
    (tmp_path / "out" / "keypoints" / "roll.json").replace(data / "Keypoints" / "roll" / "keypoints.json")
    again = find_sequences(data, "keypoints")[0].points
    assert again.truth.shape == (3, 2, 2)
    assert np.array_equal(again.truth[0], [[20, 20], [28, 28]])


# Features and labels of tokens


@pytest.mark.parametrize("modality", ["image", "video"])
def test_features_are_those_of_the_block_without_what_stands_before_the_patches(encoders, modality):
    encoder, frames = encoders[modality], texture(2 * 8, 12).reshape(2, 8, 12, 3)
    signal = encoder.kind.stills(frames, (8, 12), encoder.config.signal, encoder.config.model.tokenizer)
    layers = encoder.eval().layers({"signal": signal})
    for layer, wanted in ((1, 0), (2, 1), (-1, 1), (None, 1)):
        follower = Follower(encoder, checked(encoder, {"layer": layer}), (8, 12))
        assert follower.grid == (2, 3)
        assert torch.equal(follower.features(frames), layers[wanted][:, 1:])
    pixels = Follower(encoder, checked(encoder, {"layer": "patches"}), (8, 12)).features(frames)
    assert torch.equal(pixels, encoder.tokenizer.patches({"signal": signal}))


def test_labels_are_shares_of_areas_whatever_the_sizes():
    mask = np.zeros((5, 7), np.uint8)
    mask[:, 3:], mask[0] = 2, 9
    labels = area_labels(mask, np.array([0, 2, 9], np.uint8), (2, 3)).reshape(2, 3, 3)
    assert torch.allclose(labels.sum(-1), torch.ones(2, 3))
    # The upper left token: rows 0 to 2.5, columns 0 to 7 / 3.
    assert torch.allclose(labels[0, 0], torch.tensor([0.6, 0, 0.4]))
    # The lower middle one, from column 7 / 3 on, has two thirds of a column of background.
    assert torch.allclose(labels[1, 1], torch.tensor([2 / 7, 5 / 7, 0]), atol=1e-6)


def test_masks_come_back_from_their_labels_with_their_numbers():
    ids = np.array([0, 7, 200], np.uint8)
    mask = np.zeros((12, 18), np.uint8)
    mask[:, 4:8], mask[:, 12:] = 7, 200
    assert np.array_equal(mask_of(area_labels(mask, ids, (6, 9)), ids, (6, 9), (12, 18)), mask)


@pytest.mark.parametrize(
    ("frame", "short_side", "size"),
    [
        ((480, 854), None, (480, 848)),
        ((480, 854), 240, (240, 432)),
        ((10, 400), 4, (16, 160)),
        ((33, 33), None, (32, 32)),
    ],
)
def test_frames_are_resized_to_the_next_multiple_of_the_patch(frame, short_side, size):
    assert fitting(frame, short_side, (16, 16)) == size


def test_random_weights_are_those_of_the_seed_and_leave_the_generator_alone(tiny_encoder):
    torch.manual_seed(7)
    encoder, state = tiny_encoder(), torch.get_rng_state()
    first, second, other = (fresh(encoder, seed).fingerprint() for seed in (0, 0, 1))
    assert first == second
    assert len({first, other, encoder.fingerprint()}) == 3
    assert torch.equal(torch.get_rng_state(), state)


def test_points_are_drawn_where_they_are_on_a_smaller_frame(tmp_path):
    # The middle of a pixel of the smaller frame, which shows 4 x 4 of the larger one.
    data = write_points(tmp_path / "data", "a", np.zeros((2, 40, 80, 3), np.uint8), np.full((2, 1, 2), 21.5))
    track = PointTrack(find_sequences(data, "keypoints")[0])
    drawn = track.true(0, np.zeros((10, 20, 3), np.uint8))
    assert (drawn[5, 5] == COLOURS[0]).all()
    assert np.array_equal(drawn[1:10, 1:10], drawn[1:10, 1:10][::-1, ::-1])


# Files


def test_masks_are_palette_pngs_of_every_frame(tiny_encoder, square, tmp_path):
    propagate(tiny_encoder(), square, out=tmp_path / "out", layer="patches")
    masks = sorted((tmp_path / "out" / "masks" / "square").iterdir())
    assert [path.name for path in masks] == [f"{i:05d}.png" for i in range(8)]
    truth = moving_square()[1]
    assert np.array_equal(read_mask(masks[0]), truth[0])
    assert (read_mask(masks[5]) == truth[5]).mean() > 0.99
    with PIL.Image.open(masks[5]) as image:
        assert image.mode == "P"
        assert image.getpalette()[3:6] == PALETTE[1].tolist()
    with PIL.Image.open(tmp_path / "out" / "films" / "square.webp") as film:
        assert film.n_frames == 8
    assert (tmp_path / "out" / "sheets" / "square.png").is_file()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "image/webp" in page
    assert "J over time" in page


def test_the_tables_are_those_of_the_official_toolkit(tiny_encoder, tmp_path):
    data = write_davis(tmp_path / "data", still=stripes(), square=moving_square())
    result = propagate(tiny_encoder(), data, out=tmp_path / "out", layer="patches", films=False)
    with (tmp_path / "out" / "global_results.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay"]
    assert float(rows[1][0]) == pytest.approx(result.scores["J&F_mean"].value, abs=1e-6)
    with (tmp_path / "out" / "per_sequence_results.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["Sequence", "J-Mean", "F-Mean"]
    # As in the toolkit, every number up to the largest counts as an object.
    assert [row[0] for row in rows[1:]] == ["square_1", "still_1", "still_2", "still_3"]


def test_void_is_followed_as_background_and_scored_as_void(tiny_encoder, tmp_path):
    frames, masks = stripes()
    masks[:, :, 24:32] = 255
    data = write_davis(tmp_path / "data", still=(frames, masks))
    propagate(tiny_encoder(), data, "parts", tmp_path / "out", films=False)
    for frame in (0, 3):
        assert set(np.unique(read_mask(tmp_path / "out" / "masks" / "still" / f"{frame:05d}.png"))) == {0, 1, 3}


def test_without_later_annotations_there_are_masks_and_no_scores(tiny_encoder, tmp_path, capsys):
    frames, masks = moving_square()
    data = write_davis(tmp_path / "data", square=(frames, masks[:1]))
    result = propagate(tiny_encoder(), data, out=tmp_path / "out", layer="patches")
    assert result.scores == {}
    assert "square" in result.notes[0]
    assert (read_mask(tmp_path / "out" / "masks" / "square" / "00005.png") == masks[5]).mean() > 0.99
    assert not (tmp_path / "out" / "global_results.csv").exists()


def test_what_is_followed_and_what_all_means_is_written(tiny_encoder, tmp_path, capsys):
    data = write_davis(tmp_path / "data", still=stripes(), square=moving_square())
    result = propagate(tiny_encoder(), data, out=tmp_path / "out", encoder_name="runs/mine", layer=-1)
    written = json.loads((tmp_path / "out" / "propagate.json").read_text())
    assert [written[key] for key in ("encoder", "data", "split", "complete")] == ["runs/mine", str(data), "", True]
    assert written["over"] == "the 4 objects"
    assert "block 2 (the last)" in str(result.settings)
    result.render(Console(width=200))
    assert "all: mean over the 4 objects of 2 sequences;" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "runs/mine" in page
    assert "The first and the last frame are not scored" in page
    assert len(re.findall('alt="frame .: found"', page)) == len(re.findall('alt="truth"', page)) == 8
    assert len(repr(result)) < 1500
    pixels = propagate(tiny_encoder(), data, "parts", tmp_path / "pixels", layer="patches", films=False)
    assert pixels.how().startswith("no weights: the pixels of the patches; frames in their own size")
    assert pixels.over == "the 3 classes (the background, 0, is one)"


def test_only_the_best_and_the_worst_sequence_are_shown_frame_by_frame(tiny_encoder, tmp_path):
    frames, masks = stripes()
    lost = masks.copy()
    lost[1:] = np.roll(lost[1:], 8, axis=2)
    half = masks.copy()
    half[2:3] = lost[2:3]
    data = write_davis(tmp_path / "data", a=(frames, half), b=(frames, lost), c=(frames, masks))
    result = propagate(tiny_encoder(), data, out=tmp_path / "out", layer="patches", topk=1)
    assert [row.value == 1 for row in result.sequences] == [False, False, True]
    page = (tmp_path / "out" / "report.html").read_text()
    assert re.findall(">(., the [a-z]*)<", page) == ["c, the best", "b, the worst"]
    assert page.count('alt="frame 4: found"') == 2


def test_speeds_and_numbers_read_well():
    assert [pace(speed) for speed in (0.132, 25.5)] == ["7.6 seconds per frame", "25.5 frames per second"]
    assert [counted(n, "sequence") for n in (1, 2, 1000)] == ["1 sequence", "2 sequences", "1,000 sequences"]


def test_points_that_are_never_seen_again_are_not_scored(tiny_encoder, tmp_path, capsys):
    points = np.full((3, 2, 2), 20.0)
    data = write_points(tmp_path / "data", "gone", np.zeros((3, *SIZE, 3), np.uint8), points)
    path = data / "Keypoints" / "gone" / "keypoints.json"
    content = json.loads(path.read_text())
    content["objects"]["1"]["keypoints"][1:] = [[[20, 20, 0]] * 2] * 2
    path.write_text(json.dumps(content))
    alone = propagate(tiny_encoder(), data, "keypoints", tmp_path / "alone", layer="patches")
    assert (alone.scores, alone.sequences[0].scored) == ({}, None)
    assert "none of their points is visible after the first frame: gone" in alone.notes[0]
    content["objects"]["2"] = {"keypoints": [[[20, 20, 1], [30, 30, 1]]] * 3}
    path.write_text(json.dumps(content))
    result = propagate(tiny_encoder(), data, "keypoints", tmp_path / "two", layer="patches")
    assert list(result.sequences[0].scored.parts) == ["2"]
    assert result.over == "the 2 kinds of points"
    result.render(Console(width=200))
    assert "nan" not in capsys.readouterr().out + (tmp_path / "two" / "report.html").read_text().split("</style>")[1]


def test_how_far_it_is_is_said_within_a_sequence(ask, saved, square, tmp_path, monkeypatch):
    monkeypatch.setattr(over_data, "SPEAK_EVERY", -1)
    _, _, err = ask("propagate", saved, "--data", square, "--layer", "patches", "--no-films", "--out", tmp_path / "out")
    assert [f"square: {n} of 8 frames" for n in range(2, 9)] == err.splitlines()[:7]


def test_the_command_prints_one_object_that_is_also_in_the_folder(ask, saved, square, tmp_path):
    words = ("propagate", saved, "--data", square, "--layer", "patches", "--no-films", "--out", tmp_path / "out")
    code, out, err = ask(*words, "--json")
    assert code == 0
    result = json.loads(out)
    assert result == json.loads((tmp_path / "out" / "propagate.json").read_text())
    assert result["task"] == "propagate"
    assert result["sequences"][0]["name"] == "square"
    assert result["sequences"][0]["curve"]["frames"] == [1, 2, 3, 4, 5, 6]
    assert set(result["scores"]["J&F_mean"]) == {"value", "low", "high"}
    assert result["sequences"][0]["parts"]["1"]["J_mean"] == pytest.approx(result["scores"]["J_mean"]["value"])
    assert "square" in err
    assert not (tmp_path / "out" / "films").exists()


def test_people_get_a_table(ask, saved, square, tmp_path):
    code, out, _ = ask("propagate", saved, "--data", square, "--no-films", "--scratch", "--out", tmp_path / "out")
    assert code == 0
    assert "J&F mean" in out
    assert "random weights, seed 0" in out


def test_it_is_part_of_the_public_api():
    assert mmssl.propagate is propagate


# Mistakes


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--topk", "0"], "--topk must be at least 1"),
        (["--radius", "-1"], "--radius must be at least 0"),
        (["--context", "-1"], "--context must be at least 0"),
        (["--short-side", "0"], "--short-side must be at least 1"),
        (["--short-side", "193"], "--short-side 193 is too large for frames of 64 x 48 pixels: at most 192"),
        (["--temperature", "0"], "--temperature must be above 0"),
        (["--layer", "99"], "this encoder has 2 blocks"),
        (["--layer", "0"], "this encoder has 2 blocks"),
        (["--layer", "-3"], "this encoder has 2 blocks"),
        (["--layer", "patch"], "did you mean 'patches'?"),
        (["--kind", "mask"], "did you mean 'masks'?"),
        (["--kind", "keypoints"], "no keypoints found"),
        (["--split", "train"], "no split 'train'"),
        (["--source", "film.mp4"], "exclude each other"),
        (["--first-mask", "mask.png"], "--first-mask is for --source"),
    ],
)
def test_mistakes_are_said_before_anything_is_computed(ask, saved, square, tmp_path, words, says):
    code, out, err = ask("propagate", saved, "--data", square, "--out", tmp_path / "out", *words)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_numbers_beyond_the_film_take_all_of_it(tiny_encoder, square, tmp_path):
    encoder = tiny_encoder()
    all_of_it, beyond = (
        propagate(encoder, square, out=tmp_path / name, films=False, context=context, radius=radius, topk=topk)
        for name, context, radius, topk in (("a", 8, 0, 2000), ("b", 10**20, 10**20, 10**20))
    )
    assert beyond.scores == all_of_it.scores


def test_an_encoder_that_has_diverged_is_said_to_be(ask, tiny_encoder, square, tmp_path):
    encoder = tiny_encoder()
    with torch.no_grad():
        next(iter(encoder.backbone.parameters())).fill_(torch.nan)
    encoder.save(tmp_path / "encoder")
    code, _, err = ask("propagate", tmp_path / "encoder", "--data", square, "--out", tmp_path / "out")
    assert code == 3
    assert "features of block 2 are NaN or infinite: its training has diverged" in err


@pytest.mark.parametrize("where", ["features", "start", "step"])
def test_out_of_memory_names_what_can_be_lowered(tiny_encoder, where, monkeypatch):
    def fail(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nmore")

    encoder = tiny_encoder()
    follower = Follower(encoder, checked(encoder, {}), SIZE)
    monkeypatch.setattr(*((follower, "features") if where == "features" else (follower._propagator, where)), fail)
    with pytest.raises(MmsslError, match=r"memory \(.*allocate memory\); lower --short-side or --context$"):
        frames, masks = moving_square(2)
        follower.start(frames[:1], area_labels(masks[0], np.array([0, 1], np.uint8), follower.grid))
        next(follower.follow(frames[1:]))


def test_a_break_in_a_later_sequence_keeps_what_was_done(ask, saved, tmp_path):
    data = write_davis(tmp_path / "data", a=stripes(), b=moving_square())
    frame = data / "JPEGImages" / "480p" / "b" / "00006.png"
    frame.write_bytes(frame.read_bytes()[:1000])
    out = tmp_path / "out"
    code, _, err = ask("propagate", saved, "--data", data, "--out", out, "--no-films")
    assert code == 3
    assert f"{frame}: truncated; the scores and files of the 1 sequence before it are in {out}" in err
    written = json.loads((out / "propagate.json").read_text())
    assert (written["complete"], [row["name"] for row in written["sequences"]]) == (False, ["a"])
    assert written["notes"] == ["only 1 of 2 sequences followed so far"]
    assert len(list((out / "masks" / "a").iterdir())) == 6
    assert len((out / "per_sequence_results.csv").read_text().splitlines()) == 4


def test_a_folder_with_something_in_it_is_refused(ask, saved, square, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    code, _, err = ask("propagate", saved, "--data", square, "--out", tmp_path / "out")
    assert code == 2
    assert "not empty" in err


def test_broken_files_are_named(ask, saved, square, tmp_path):
    frame = square / "JPEGImages" / "480p" / "square" / "00004.png"
    frame.write_bytes(frame.read_bytes()[:1000])
    code, _, err = ask("propagate", saved, "--data", square, "--out", tmp_path / "out")
    assert code == 3
    assert f"{frame}: truncated" in err
    (tmp_path / "film.mp4").write_bytes(b"no film at all")
    words = ("--source", tmp_path / "film.mp4", "--first-mask", tmp_path / "mask.png")
    code, _, err = ask("propagate", saved, *words, "--out", tmp_path / "other")
    assert code == 3
    assert "film.mp4: not a video" in err


def test_an_encoder_of_sounds_follows_nothing():
    model = {"tokenizer": {"patch_size": (8, 8)}, "backbone": {"dim": 16, "depth": 1, "num_heads": 2}}
    signal = {"sample_rate": 8000, "seconds": 0.32, "mels": 32}
    encoder = Encoder(typed(EncoderConfig, "audio", "test")(modality="audio", signal=signal, model=model))
    with pytest.raises(UserError, match="modality audio"):
        checked(encoder, {})
