"""Propagation through whole sequences: videos whose answer is known, the files that are written, every mistake."""

import csv
import json

import numpy as np
import PIL.Image
import pytest
import torch
from media import write_animation, write_frames, write_video

import mmssl
from mmssl.errors import UserError
from modalities.encoder import Encoder, EncoderConfig, typed
from tasks import propagate_source as over_source
from tasks.films import COLOURS
from tasks.first_mask import read_first_mask
from tasks.following import Follower, checked, fitting, fresh
from tasks.propagate import propagate
from tasks.propagate_source import propagate_source
from tasks.sequences import PALETTE, find_sequences, read_mask, write_mask
from tasks.tracks import PointTrack, area_labels, mask_of

SIZE = 48, 64


def texture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def moving_square(count=8, step=4, side=16):
    """A textured square goes right over a smooth background, ``step`` pixels per frame."""
    rows = np.mgrid[: SIZE[0], : SIZE[1]][0]
    background = np.stack([60 + rows, 90 + rows, 120 + rows], axis=-1).astype(np.uint8)
    frames, masks = np.tile(background, (count, 1, 1, 1)), np.zeros((count, *SIZE), np.uint8)
    for t in range(count):
        place = np.s_[t, 16 : 16 + side, 8 + step * t : 8 + step * t + side]
        frames[place], masks[place] = texture(side, side), 1
    return frames, masks


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
    track = PointTrack(find_sequences(data, "keypoints")[0], (40, 80))
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


# A person's own video


def test_a_video_is_followed_frame_by_frame(tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(over_source, "PIECE", 3 * 3 * SIZE[0] * SIZE[1])  # three frames at a time
    frames, masks = moving_square()
    write_video(tmp_path / "film.mp4", frames, fps=10, crf="1")
    PIL.Image.fromarray(masks[0] * 255).save(tmp_path / "mask.png")
    result = propagate_source(
        tiny_encoder(), tmp_path / "film.mp4", tmp_path / "mask.png", tmp_path / "out", layer="patches"
    )
    found = [read_mask(path) for path in sorted((tmp_path / "out" / "masks").iterdir())]
    assert len(found) == 8
    assert np.array_equal(found[0], masks[0])
    assert all((mask == truth).mean() > 0.97 for mask, truth in zip(found, masks, strict=True))
    assert result.areas["1"][0] == pytest.approx(256 / 3072)
    assert result.settings.short_side == 48
    with over_source.open_video(str(tmp_path / "out" / "overlay.mp4")) as film:
        assert (film.frames, film.size) == (8, SIZE)
        assert film.fps == pytest.approx(10)
        played = film.read([0, 7]).astype(float)
    # Red is laid over the square and nothing over the rest.
    assert played[1, 20:28, 40:48, 0].mean() > frames[7, 20:28, 40:48, 0].mean() + 30
    assert np.abs(played[1, :10] - frames[7, :10]).mean() < 5
    for name in ("sheet.png", "report.html", "propagate.json"):
        assert (tmp_path / "out" / name).is_file()


@pytest.mark.parametrize("form", ["folder", "film.gif", "piece"])
def test_folders_animations_and_pieces_are_videos_too(ask, saved, tmp_path, form):
    frames, masks = moving_square()
    if form == "folder":
        source = write_frames(tmp_path / "frames", frames[:, :47, :63])
        masks = masks[:, :47, :63]
    elif form == "piece":
        source, masks = f"{write_video(tmp_path / 'film.mp4', frames, fps=10, crf='1')}#t=0.2,0.7", masks[2:7]
    else:
        source = write_animation(tmp_path / form, frames)
    write_mask(tmp_path / "mask.png", masks[0])
    code, out, _ = ask(
        "propagate", saved, "--source", source, "--first-mask", tmp_path / "mask.png", "--layer", "patches",
        "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["frames"] == len(masks)
    found = [read_mask(path) for path in sorted((tmp_path / "out" / "masks").iterdir())]
    assert (found[4] == masks[4]).mean() > 0.95
    with over_source.open_video(str(tmp_path / "out" / "overlay.mp4")) as film:
        assert film.frames == len(masks)
        assert film.size == tuple(side - side % 2 for side in masks.shape[1:])


def test_what_is_stopped_leaves_whole_files(tiny_encoder, tmp_path, monkeypatch):
    frames, masks = moving_square()
    write_frames(tmp_path / "frames", frames)
    write_mask(tmp_path / "mask.png", masks[0])
    taken = []

    def stop_at_the_fifth(*words):
        taken.append(words)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return mask_of(*words)

    monkeypatch.setattr(over_source, "mask_of", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        propagate_source(tiny_encoder(), tmp_path / "frames", tmp_path / "mask.png", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["masks", "overlay.mp4"]
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 4
    with over_source.open_video(str(tmp_path / "out" / "overlay.mp4")) as film:
        assert film.frames == 4


def test_colours_survive_in_the_film(tmp_path):
    colour = np.array([210, 50, 20], np.uint8)
    with over_source.recording(tmp_path / "a.mp4", 25, SIZE) as record:
        record(np.full((*SIZE, 3), colour))
    with over_source.open_video(str(tmp_path / "a.mp4")) as film:
        assert np.abs(film.read([0]).mean((0, 1, 2)) - colour).max() < 4


def test_nothing_is_left_of_a_film_without_frames(tmp_path):
    with pytest.raises(ValueError, match="before"), over_source.recording(tmp_path / "a.mp4", 25, SIZE):
        raise ValueError("before the first frame")
    assert list(tmp_path.iterdir()) == []


def save(path, pixels, mode=None):
    image = PIL.Image.fromarray(pixels) if mode is None else PIL.Image.fromarray(pixels, mode)
    image.save(path)
    return path


def test_first_masks_of_every_kind(tmp_path):
    ids = np.zeros((6, 8), np.uint8)
    ids[1:3, 1:3], ids[3:5, 4:7] = 1, 2
    one = (ids > 0).astype(np.uint8)
    path = tmp_path / "m.png"
    write_mask(path, np.where(ids == 0, 255, ids).astype(np.uint8))
    assert np.array_equal(read_first_mask(path, (6, 8)).ids, ids)
    colours = np.array([[0, 0, 0], [0, 0, 255], [255, 0, 0]], np.uint8)
    assert np.array_equal(read_first_mask(save(path, colours[ids]), (6, 8)).ids, ids)
    assert np.array_equal(read_first_mask(save(path, ids * 100), (6, 8)).ids, ids * 100)
    assert np.array_equal(read_first_mask(save(path, ids * 127 + one), (6, 8)).ids, ids)  # 128 and 255
    for white in (one * 255, one.astype(bool), np.repeat(one[..., None] * 255, 3, axis=2)):
        assert np.array_equal(read_first_mask(save(path, white), (6, 8)).ids, one)
    see_through = np.dstack([np.full((6, 8, 3), 200, np.uint8), one * 255])
    assert np.array_equal(read_first_mask(save(path, see_through), (6, 8)).ids, one)


def test_soft_edges_of_a_white_object_are_cut_and_it_is_said(tmp_path):
    rows, columns = np.mgrid[:40, :40]
    soft = (255 * (12.5 - np.hypot(rows - 20, columns - 20)).clip(0, 8) / 8).astype(np.uint8)
    mask, notes = read_first_mask(save(tmp_path / "m.png", soft), (40, 40))
    assert np.array_equal(mask, soft >= 128)
    assert "soft edges" in notes[0]


def test_a_mask_of_the_same_proportions_is_scaled_and_it_is_said(tmp_path):
    small = np.zeros((6, 8), np.uint8)
    small[2:4, 3:6] = 5
    write_mask(tmp_path / "m.png", small)
    mask, notes = read_first_mask(tmp_path / "m.png", (12, 16))
    assert np.array_equal(mask, small.repeat(2, 0).repeat(2, 1))
    assert "8 x 6 to 16 x 12" in notes[0]


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.zeros((6, 8), np.uint8), "marks nothing"),
        (np.ones((8, 8), np.uint8), "other proportions"),
        (texture(6, 8), "48 colours"),
        (np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000, "below 255"),
    ],
)
def test_a_mask_that_says_nothing_clear_is_a_mistake(tmp_path, pixels, words):
    with pytest.raises(UserError, match=words):
        read_first_mask(save(tmp_path / "m.png", pixels), (6, 8))


# Mistakes


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--topk", "0"], "--topk must be at least 1"),
        (["--radius", "-1"], "--radius must be at least 0"),
        (["--context", "-1"], "--context must be at least 0"),
        (["--short-side", "0"], "--short-side must be at least 1"),
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


def test_a_folder_with_something_in_it_is_refused(ask, saved, square, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    code, _, err = ask("propagate", saved, "--data", square, "--out", tmp_path / "out")
    assert code == 2
    assert "not empty" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--data"),
        (["--source", "film.mp4"], "--first-mask"),
        (["--source", "film.mp4", "--first-mask", "m.png"], "no such video; did you mean 'films.mp4'?"),
        (["--source", "film.mp4", "--first-mask", "m.png", "--kind", "parts"], "--kind is for --data"),
        (["--source", "films.mp4", "--first-mask", "n.png"], "no such mask; did you mean 'm.png'?"),
    ],
)
def test_mistakes_with_ones_own_video(ask, saved, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "films.mp4", moving_square(2)[0])
    write_mask(tmp_path / "m.png", moving_square(1)[1][0])
    code, _, err = ask("propagate", saved, *words, "--out", tmp_path / "out")
    assert code == 2
    assert says in err
    assert not (tmp_path / "out").exists()


def test_a_single_frame_is_no_video(tiny_encoder, tmp_path):
    write_frames(tmp_path / "frames", moving_square(1)[0])
    with pytest.raises(UserError, match="one frame only"):
        propagate_source(tiny_encoder(), tmp_path / "frames", tmp_path / "m.png", tmp_path / "out")


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
