"""Data sets in every layout, made of 12 x 16 pictures; every mistake's sentence; masks written and read back."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest
from scipy.io import savemat

from mmssl.errors import UnusableData, UserError
from tasks.point_files import JOINTS
from tasks.sequences import PALETTE, find_sequences, read_mask, write_mask


def draw(path, size=(12, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(path)


def annotate(path, ids=(0, 1, 2), size=(12, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mask(path, np.resize(np.array(ids, np.uint8), size))


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@pytest.fixture
def davis(tmp_path):
    root = tmp_path / "DAVIS"
    for name, frames in (("bear", 3), ("camel", 2), ("dog", 2)):
        for i in range(frames):
            draw(root / "JPEGImages" / "480p" / name / f"{i:05}.jpg")
            annotate(root / "Annotations" / "480p" / name / f"{i:05}.png")
    write(root / "ImageSets" / "2017" / "val.txt", "dog", "bear", "")
    write(root / "ImageSets" / "2017" / "train.txt", "camel")
    return root


@pytest.fixture
def vip(tmp_path):
    root = tmp_path / "VIP"
    for name in ("videos1", "videos7"):
        for i in (1, 26, 51):
            draw(root / "Images" / name / f"{i:012}.jpg")
            annotate(root / "Annotations" / "Category_ids" / name / f"{i:012}.png")
    write(root / "lists" / "val_videos.txt", "videos7")
    return root


KEYS = {
    "size": [16, 12],
    "frames": 2,
    "points": ["nose", "tail"],
    "objects": {
        "1": {"keypoints": [[[1, 2, 1], [3.5, 4, 0]], [[2, 2, 1], [4, 4, 1]]]},
        "2": {"keypoints": [[[9, 8, 1], [7, 6, 1]], [[9, 7, 1], [8, 6, 1]]]},
    },
}


@pytest.fixture
def keys(tmp_path):
    root = tmp_path / "vos"
    for name in ("bear", "otter"):
        for i in range(2):
            draw(root / "JPEGImages" / "480p" / name / f"{i:05}.jpg")
        write(root / "Keypoints" / name / "keypoints.json", json.dumps(KEYS))
    write(root / "ImageSets" / "val.txt", "bear")
    return root


@pytest.fixture
def jhmdb(tmp_path):
    root = tmp_path / "JHMDB"
    for action, name in (("catch", "ball_1"), ("catch", "ball_2"), ("wave", "hand_1")):
        for i in range(1, 4):
            draw(root / "Rename_Images" / action / name / f"{i:05}.png")
        places = np.random.default_rng(len(name)).uniform(1, 12, (2, 15, 3))
        places[:, 0, 0], places[:, 1, :], places[:, 2, 0] = (1, 12), 40, (16.6, 5)
        folder = root / "joint_positions" / action / name
        folder.mkdir(parents=True)
        savemat(folder / "joint_positions.mat", {"pos_img": places, "viewpoint": "S"})
    return root


def names(sequences):
    return [one.name for one in sequences]


@pytest.mark.parametrize("kind", ["masks", "parts"])
def test_davis(davis, kind):
    found = find_sequences(davis, kind)
    assert names(found) == ["dog", "bear"]
    assert [path.name for path in found[1].frames] == ["00000.jpg", "00001.jpg", "00002.jpg"]
    assert [path.relative_to(davis).as_posix() for path in found[0].masks] == [
        "Annotations/480p/dog/00000.png",
        "Annotations/480p/dog/00001.png",
    ]
    assert found[0].points is None
    assert names(find_sequences(davis, kind, split="train")) == ["camel"]


def test_the_data_set_may_lie_in_the_folder_that_is_given(davis):
    assert names(find_sequences(davis.parent, "masks")) == ["dog", "bear"]


def test_several_data_sets_in_a_folder_are_not_chosen_from(davis, vip):
    assert names(find_sequences(davis.parent, "masks")) == ["dog", "bear"]  # VIP has no masks of objects
    with pytest.raises(UserError, match=r"several data sets \(DAVIS-2017 in DAVIS, VIP in VIP\), so give"):
        find_sequences(davis.parent, "parts")


def test_without_lists_everything_is_taken(davis):
    (davis / "ImageSets" / "2017" / "val.txt").rename(davis / "ImageSets" / "2017" / "test-dev.txt")
    assert names(find_sequences(davis, "masks")) == ["bear", "camel", "dog"]
    assert names(find_sequences(davis, "masks", split="test-dev")) == ["dog", "bear"]


def test_lists_of_2017_come_before_those_of_no_year(davis):
    write(davis / "ImageSets" / "val.txt", "camel")
    write(davis / "ImageSets" / "mine.txt", "camel")
    assert names(find_sequences(davis, "masks")) == ["dog", "bear"]
    assert names(find_sequences(davis, "masks", split="mine")) == ["camel"]


def test_frames_are_in_the_order_of_their_numbers(davis):
    folder = davis / "JPEGImages" / "480p" / "dog"
    draw(folder / "10.jpg")
    draw(folder / "2.jpg")
    draw(folder / "._00000.jpg")
    (folder / "notes.txt").write_text("no frame")
    frames = find_sequences(davis, "masks")[0].frames
    assert [path.name for path in frames] == ["00000.jpg", "00001.jpg", "2.jpg", "10.jpg"]


def test_only_the_first_frame_needs_an_annotation(davis):
    (davis / "Annotations" / "480p" / "bear" / "00001.png").unlink()
    first, second, third = find_sequences(davis, "masks")[1].masks
    assert (first.name, second, third.name) == ("00000.png", None, "00002.png")


def test_resolutions(davis):
    for i in range(2):
        draw(davis / "JPEGImages" / "1080p" / "goat" / f"{i}.jpg", (24, 32))
        annotate(davis / "Annotations" / "1080p" / "goat" / f"{i}.png", size=(24, 32))
    assert names(find_sequences(davis, "masks")) == ["dog", "bear"]
    write(davis / "ImageSets" / "goats.txt", "goat")
    assert names(find_sequences(davis, "masks", "goats", "1080p")) == ["goat"]
    with pytest.raises(UserError, match=r"JPEGImages: no resolution '1080'; did you mean '1080p'\?"):
        find_sequences(davis, "masks", resolution="1080")
    (davis / "JPEGImages" / "480p").rename(davis / "JPEGImages" / "full")
    with pytest.raises(UserError, match="--resolution must name one of the folders there: 1080p, full"):
        find_sequences(davis, "masks")


def test_the_only_resolution_needs_no_name(davis):
    for kind in ("JPEGImages", "Annotations"):
        (davis / kind / "480p").rename(davis / kind / "full")
    assert names(find_sequences(davis, "masks")) == ["dog", "bear"]


def test_vip(vip):
    (found,) = find_sequences(vip, "parts")
    assert found.name == "videos7"
    assert (
        [path.stem for path in found.frames]
        == [path.stem for path in found.masks]
        == [
            "000000000001",
            "000000000026",
            "000000000051",
        ]
    )
    with pytest.raises(UserError, match="no choice of resolution '480p'"):
        find_sequences(vip, "parts", resolution="480p")


def test_keypoints(keys):
    (found,) = find_sequences(keys, "keypoints")
    assert (found.name, len(found.frames), found.masks) == ("bear", 2, ())
    points = found.points
    assert points.truth.tolist() == [[[1, 2], [3.5, 4], [9, 8], [7, 6]], [[2, 2], [4, 4], [9, 7], [8, 6]]]
    assert points.visible.tolist() == [[True, False, True, True], [True] * 4]
    assert points.kinds == ("nose", "tail", "nose", "tail")
    assert points.names == ("1.nose", "1.tail", "2.nose", "2.tail")
    assert points.objects.tolist() == [1, 1, 2, 2]


def test_jhmdb(jhmdb):
    found = find_sequences(jhmdb, "keypoints")
    assert names(found) == ["catch-ball_1", "catch-ball_2", "wave-hand_1"]
    assert {(one.split, one.size) for one in found} == {("", (12, 16))}
    points = found[0].points
    assert points.truth.shape == (3, 15, 2)
    assert points.names == points.kinds == JOINTS
    assert set(points.objects) == {1}
    assert points.truth[0, 0].tolist() == [0, 11]  # Matlab counts from 1
    # What lies outside the first frame cannot be followed; later it is known all the same.
    assert points.visible[:, 1].tolist() == [False, True, True]
    assert points.visible[0, [0, 2]].tolist() == [True, False]  # the picture ends at x = 15.5
    assert points.visible[0, 3:].all()


def test_jhmdb_takes_the_videos_of_a_list(jhmdb, tmp_path):
    mine = tmp_path / "mine.txt"
    write(mine, "elsewhere/Rename_Images/wave/hand_1 elsewhere/hand_1/joint_positions.mat", "ball_2", "", "ball_1 2")
    found = find_sequences(jhmdb, "keypoints", split=str(mine))
    assert names(found) == ["wave-hand_1", "catch-ball_2", "catch-ball_1"]
    assert {one.split for one in found} == {str(mine)}
    write(jhmdb / "splits" / "test.txt", "ball_3")
    with pytest.raises(UserError, match=r"lists 'ball_3', but no such folder of frames .*; did you mean 'ball_2'"):
        find_sequences(jhmdb, "keypoints", split="splits/test.txt")
    with pytest.raises(UserError, match=r"no text file 'split/test.txt' that lists videos; did you mean 'splits/test"):
        find_sequences(jhmdb, "keypoints", split="split/test.txt")
    for line, says in (("wave/ball_1", "did you mean 'wave/hand_1'"), ("/", "lists '/', but no such folder")):
        write(mine, line)
        with pytest.raises(UserError, match=says):
            find_sequences(jhmdb, "keypoints", split=str(mine))


def test_clips_of_the_same_name_in_two_actions_are_told_apart(jhmdb, tmp_path):
    for kind in ("Rename_Images", "joint_positions"):
        shutil.copytree(jhmdb / kind / "catch" / "ball_1", jhmdb / kind / "wave" / "ball_1")
        (jhmdb / kind / "wave" / "hand_1").rename(jhmdb / kind / "wave" / "a hand")
    assert names(find_sequences(jhmdb, "keypoints")) == ["catch-ball_1", "catch-ball_2", "wave-a hand", "wave-ball_1"]
    mine = tmp_path / "mine.txt"
    write(mine, "wave/ball_1", "a hand", "x/Rename_Images/catch/ball_1 1")
    found = find_sequences(jhmdb, "keypoints", split=str(mine))
    assert names(found) == ["wave-ball_1", "wave-a hand", "catch-ball_1"]
    assert found[0].frames[0].parent == jhmdb / "Rename_Images" / "wave" / "ball_1"
    write(mine, "ball_2", "ball_1")
    with pytest.raises(UserError, match=r"lists 'ball_1', which several actions have, .* catch/ball_1, wave/ball_1$"):
        find_sequences(jhmdb, "keypoints", split=str(mine))
    write(mine, "ball_2", "catch/ball_2")
    with pytest.raises(UserError, match="lists 'ball_2' more than once"):
        find_sequences(jhmdb, "keypoints", split=str(mine))


def test_folders_that_are_not_there_or_hold_something_else(davis, tmp_path):
    with pytest.raises(UserError, match=r"DAVOS: no such folder; did you mean 'DAVIS'\?"):
        find_sequences(tmp_path / "DAVOS", "masks")
    with pytest.raises(UserError, match=r"val.txt: is not a folder$"):
        find_sequences(davis / "ImageSets" / "2017" / "val.txt", "masks")
    with pytest.raises(UserError, match=r"no masks found: .* laid out as DAVIS-2017 \(JPEGImages, Annotations\)$"):
        find_sequences(davis / "JPEGImages", "masks")
    with pytest.raises(UserError, match=r"DAVIS-2017 with keypoints \(JPEGImages, Keypoints\) or JHMDB \(Rename_"):
        find_sequences(davis, "keypoints")


def test_splits_that_are_not_there(davis):
    with pytest.raises(UserError, match=r"no split 'vale'; did you mean 'val'\?"):
        find_sequences(davis, "masks", split="vale")
    with pytest.raises(UserError, match=r"no split 'xyz'; valid: train, val"):
        find_sequences(davis, "masks", split="xyz")
    for path in (davis / "ImageSets" / "2017").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"no split 'val': there are no lists of splits"):
        find_sequences(davis, "masks", split="val")


def test_lists_that_name_nothing_or_something_else(davis):
    val = davis / "ImageSets" / "2017" / "val.txt"
    write(val, "bear", "cammel")
    with pytest.raises(UserError, match=r"val.txt: lists 'cammel', but no such folder .*; did you mean 'camel'\?"):
        find_sequences(davis, "masks")
    write(val, "")
    with pytest.raises(UserError, match=r"val.txt: lists no sequence"):
        find_sequences(davis, "masks")
    write(val, "bear", "dog", "bear")
    with pytest.raises(UserError, match=r"val.txt: lists 'bear' more than once"):
        find_sequences(davis, "masks")
    for line in ("480p/bear", "/"):
        write(val, line)
        with pytest.raises(UserError, match=f"lists '{line}', but no such folder"):
            find_sequences(davis, "masks")
    val.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UnusableData, match=r"val.txt: "):
        find_sequences(davis, "masks")


def test_a_line_of_a_list_is_a_name_that_may_hold_spaces(davis):
    for kind in ("JPEGImages", "Annotations"):
        (davis / kind / "480p" / "dog").rename(davis / kind / "480p" / "my dog")
    write(davis / "ImageSets" / "2017" / "val.txt", "my dog ", "bear")
    assert [(one.name, one.split) for one in find_sequences(davis, "masks")] == [("my dog", "val"), ("bear", "val")]


def test_annotations_without_a_frame_and_frames_that_are_the_same(davis):
    annotations = davis / "Annotations" / "480p" / "dog"
    annotate(annotations / "1.png")
    annotate(annotations / "00007.png")
    with pytest.raises(UserError, match=r"480p/dog: 2 of its files are of no frame in .*dog, first 00007.png"):
        find_sequences(davis, "masks")
    draw(davis / "JPEGImages" / "480p" / "dog" / "00001.png")
    with pytest.raises(UserError, match=r"480p/dog: 00001.jpg, 00001.png would be the same frame"):
        find_sequences(davis, "masks")


def test_no_frames_at_all(davis):
    (davis / "ImageSets" / "2017" / "val.txt").unlink()
    (davis / "JPEGImages" / "480p").rename(davis / "kept")
    (davis / "JPEGImages" / "480p").mkdir()
    with pytest.raises(UserError, match="no folder of frames is there"):
        find_sequences(davis, "masks")


def test_sequences_that_cannot_be_followed(davis):
    frames, masks = (davis / kind / "480p" / "dog" for kind in ("JPEGImages", "Annotations"))
    annotate(masks / "00001.png", size=(12, 15))
    with pytest.raises(UserError, match=r"dog/00001.png: has 15 x 12 pixels, but its frame has 16 x 12"):
        find_sequences(davis, "masks")
    annotate(masks / "00000.png", ids=(0, 255))
    annotate(masks / "00001.png")
    with pytest.raises(UserError, match=r"00000.png: the first mask holds no object, only 0 and 255 \(0 is background"):
        find_sequences(davis, "masks")
    (masks / "00000.png").unlink()
    with pytest.raises(UserError, match=r"dog: has no annotation 00000.png of the first frame, .*dog/00000.jpg"):
        find_sequences(davis, "masks")
    draw(frames / "00001.jpg", (12, 20))
    with pytest.raises(UserError, match=r"00001.jpg: has 20 x 12 pixels, but 00000.jpg has 16 x 12"):
        find_sequences(davis, "masks")
    (frames / "00001.jpg").write_bytes(b"no picture")
    with pytest.raises(UnusableData, match=r"dog/00001.jpg: not an image"):
        find_sequences(davis, "masks")
    (frames / "00001.jpg").unlink()
    with pytest.raises(UserError, match=r"dog: at least 2 frames are needed, but 1 found"):
        find_sequences(davis, "masks")


def test_keypoints_that_do_not_fit(keys):
    path = keys / "Keypoints" / "bear" / "keypoints.json"
    draw(keys / "JPEGImages" / "480p" / "bear" / "00002.jpg")
    with pytest.raises(UserError, match=r"keypoints.json: has keypoints of 2 frames, but .*bear has 3"):
        find_sequences(keys, "keypoints")
    (keys / "JPEGImages" / "480p" / "bear" / "00002.jpg").unlink()
    unseen = {"points": ["nose"], "objects": {"1": {"keypoints": [[[1, 2, 0]], [[1, 2, 1]]]}}}
    write(path, json.dumps(unseen))
    with pytest.raises(UserError, match="no keypoint is visible in the first frame"):
        find_sequences(keys, "keypoints")
    write(path, json.dumps({"points": ["nose"], "objects": {"1": {"keypoints": [[[1, 2]], [[1, 2]]]}}}))
    with pytest.raises(UnusableData, match=r"keypoints.json: object 1: keypoints should be \[x, y, vis"):
        find_sequences(keys, "keypoints")
    for broken in ("{", "{}", "[]"):
        write(path, broken)
        with pytest.raises(UnusableData, match=r"bear/keypoints.json: "):
            find_sequences(keys, "keypoints")
    path.unlink()
    with pytest.raises(UserError, match=r"keypoints.json: no such file, so the frames in .*bear have no keypoints"):
        find_sequences(keys, "keypoints")


def point_file(*objects, names=("nose", "tail")):
    return {"points": list(names), "objects": {name: {"keypoints": rows} for name, rows in objects}}


ROWS = [[[1, 2, 1], [3, 4, 1]], [[1, 2, 1], [3, 4, 1]]]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], 'a list "points" of names'),
        ({"objects": {"1": {"keypoints": ROWS}}}, 'a list "points" of names'),
        (point_file(), "at least one of them"),
        (point_file(("0", ROWS)), "1 to 255, but one is '0'"),
        (point_file(("256", ROWS)), "1 to 255, but one is '256'"),
        (point_file(("01", ROWS)), "1 to 255, but one is '01'"),
        (point_file(("dog", ROWS)), "1 to 255, but one is 'dog'"),
        (point_file(("1", ROWS), names=("nose",)), 'object 1 has 2 points, but "points" names 1'),
        (point_file(("1", ROWS), ("2", ROWS[:1])), "there are 2 of object 1, 1 of object 2"),
        ({"points": ["nose"], "objects": {"3": {}}}, "object 3: keypoints should be"),
        (point_file(("1", [ROWS[0], [[1, 2, 1]]])), "object 1: keypoints should be"),
        (point_file(("1", [])), "object 1: keypoints should be"),
        (point_file(("7", [ROWS[0], [[1, 2, 1], [float("nan"), 4, 1]]])), r"'tail' .* frame 1, .*\(nan, 4.0\)"),
        (point_file(("7", [[[float("inf"), 2, 1], [3, 4, 1]], ROWS[0]])), r"7: 'nose' .* frame 0, .*\(inf, 2.0\)"),
    ],
)  # fmt: skip
def test_keypoint_files_with_something_wrong_say_what(keys, content, says):
    write(keys / "Keypoints" / "bear" / "keypoints.json", json.dumps(content))
    with pytest.raises(UnusableData, match=f"bear/keypoints.json: .*{says}"):
        find_sequences(keys, "keypoints")


def test_points_that_begin_outside_the_picture_are_not_followed(keys):
    rows = [[[15.6, 2, 1], [15.4, 11.4, 1]], [[99, 2, 1], [None, None, 0]]]
    write(keys / "Keypoints" / "bear" / "keypoints.json", json.dumps(point_file(("1", rows))))
    assert find_sequences(keys, "keypoints")[0].points.visible.tolist() == [[False, True], [True, False]]


def test_joint_positions_that_do_not_fit(jhmdb):
    path = jhmdb / "joint_positions" / "catch" / "ball_1" / "joint_positions.mat"
    savemat(path, {"pos_img": np.ones((2, 14, 3))})
    with pytest.raises(UnusableData, match=r"pos_img should be \[2, 15, frames\], but is \[2, 14, 3\]"):
        find_sequences(jhmdb, "keypoints")
    savemat(path, {"viewpoint": "S"})
    with pytest.raises(UnusableData, match=r"pos_img should be"):
        find_sequences(jhmdb, "keypoints")
    path.write_bytes(b"nothing")
    with pytest.raises(UnusableData, match=r"joint_positions.mat: "):
        find_sequences(jhmdb, "keypoints")


def test_masks_come_back_as_they_were_written(tmp_path):
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    write_mask(tmp_path / "m.png", mask)
    assert [path.name for path in tmp_path.iterdir()] == ["m.png"]
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), mask)
    with PIL.Image.open(tmp_path / "m.png") as image:
        assert (image.mode, image.format, image.info) == ("P", "PNG", {})
        np.testing.assert_array_equal(np.asarray(image), mask)
        np.testing.assert_array_equal(np.reshape(image.getpalette(), (256, 3)), PALETTE)
    write_mask(tmp_path / "m.png", np.ones((3, 5), np.uint8))
    assert read_mask(tmp_path / "m.png").tolist() == [[1] * 5] * 3


def test_the_palette_is_that_of_pascal_voc():
    """The first colours as its development kit lists them, and the last."""
    listed = [
        (0, 0, 0),
        (128, 0, 0),
        (0, 128, 0),
        (128, 128, 0),
        (0, 0, 128),
        (128, 0, 128),
        (0, 128, 128),
        (128, 128, 128),
        (64, 0, 0),
        (192, 0, 0),
        (64, 128, 0),
    ]
    assert [tuple(colour) for colour in PALETTE[: len(listed)]] == listed
    assert tuple(PALETTE[255]) == (224, 224, 192)
    assert len(np.unique(PALETTE, axis=0)) == 256


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "LA", "I;16", "1"])
def test_masks_of_every_mode_give_numbers_not_colours(tmp_path, mode):
    ids = np.array([[0, 1, 2, 3], [7, 22, 254, 255]], np.uint8)
    if mode == "1":
        ids = ids.clip(max=1)
        image = PIL.Image.fromarray(ids.astype(bool))
    elif mode in ("RGB", "RGBA"):
        image = PIL.Image.fromarray(PALETTE[ids]).convert(mode)
    elif mode == "P":
        image = PIL.Image.fromarray(ids)
        image.putpalette([9] * 768)  # whatever its colours are
    else:
        image = PIL.Image.fromarray(ids.astype(np.uint16) if mode == "I;16" else ids)
        image = image.convert(mode) if mode == "LA" else image
    image.save(tmp_path / "m.png")
    got = read_mask(tmp_path / "m.png")
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, ids)


def test_pictures_that_are_no_masks(tmp_path):
    path = tmp_path / "m.png"
    PIL.Image.fromarray(np.full((4, 4, 3), (200, 30, 31), np.uint8)).save(path)
    with pytest.raises(UserError, match=r"its colour \(200, 30, 31\) stands for no object: save the mask as a palette"):
        read_mask(path)
    PIL.Image.fromarray(np.full((4, 4), 300, np.uint16)).save(path)
    with pytest.raises(UserError, match="holds the number 300"):
        read_mask(path)
    PIL.Image.fromarray(np.zeros((4, 4), np.uint8)).save(path, format="JPEG")
    with pytest.raises(UserError, match=r"should be a PNG, .* but it is a JPEG"):
        read_mask(path)
    path.write_bytes(b"")
    with pytest.raises(UnusableData, match=r"m.png: empty file"):
        read_mask(path)
    with pytest.raises(UserError, match=r"n.png: no such mask; did you mean 'm.png'\?"):
        read_mask(tmp_path / "n.png")
