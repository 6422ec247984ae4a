"""Two looks at one file: which frames, which crops, and that both are treated alike where they should be."""

import pickle

import numpy as np
import PIL.Image
import pytest
import torch
from media import numbered, numbers, write_frames, write_video

from mmssl.data.guard import BrokenFile
from mmssl.errors import UserError
from modalities.image import Image
from modalities.image_settings import ImageSignal
from modalities.looks import FramePair
from modalities.video_sampling import TooShort, pair
from tasks.build import build_objective, load_recipe

IMAGE = Image()
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
WHOLE = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": False}


def rngs(*seeds):
    return [np.random.default_rng(seed) for seed in seeds]


def looks(path, seeds, size=(48, 64), **settings):
    signal = ImageSignal(size=size, **RAW, **settings)
    return IMAGE.views(signal)(str(path), rngs(*seeds), size)


def number(look):
    return numbers((look.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)[None])[0]


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("pairs") / "film.mp4", numbered(40), fps=10)


# Frames


def test_pairs_are_as_far_apart_as_asked_and_everything_is_as_likely():
    found = np.array([pair(12, 3, 5, np.random.default_rng(seed)) for seed in range(3000)])
    gaps, first = found[:, 1] - found[:, 0], found[:, 0]
    assert np.unique(gaps).tolist() == [3, 4, 5]
    assert np.bincount(gaps)[3:].min() > 900
    for gap in (3, 4, 5):
        counts = np.bincount(first[gaps == gap], minlength=12)
        assert (counts[: 12 - gap] > 60).all()
        assert counts[12 - gap :].sum() == 0
    assert pair(12, 3, 5).tolist() == [3, 7]


def test_a_short_video_has_shorter_gaps_or_none():
    gaps = {int(np.diff(pair(6, 3, 48, np.random.default_rng(seed)))[0]) for seed in range(100)}
    assert gaps == {3, 4, 5}
    assert pair(4, 3, 48, np.random.default_rng(0)).tolist() == [0, 3]
    with pytest.raises(TooShort, match="too short: 3 of the 4 frames that the closest pair spans"):
        pair(3, 3, 48)


@pytest.mark.parametrize(
    ("settings", "least", "most"),
    [
        ({"gap": (4, 8)}, 4, 8),
        ({"gap": (0.5, 1.2), "unit": "seconds"}, 5, 12),
        ({"gap": (0.01, 0.1), "unit": "seconds"}, 1, 1),
    ],
)
def test_a_past_and_a_later_frame_are_read(film, settings, least, most):
    found = looks(film, range(40), look={"kind": "frames", **settings}, **WHOLE)
    gaps = [number(view["signal"]) - number(view["past"]) for view in found]
    assert min(gaps) == least
    assert max(gaps) == most
    assert found[0].keys() == {"past", "signal"}
    assert found[0]["past"].shape == found[0]["signal"].shape == (3, 48, 64)


def test_both_frames_are_cropped_mirrored_and_augmented_alike(tmp_path):
    still = np.repeat(numbered(1), 8, 0)
    film = write_frames(tmp_path / "still", still)
    settings = {"look": {"kind": "frames", "gap": (2, 5)}, "augment": {"jitter": {"brightness": 0.4, "hue": 0.2}}}
    found = looks(film, range(12), (16, 16), **settings)
    for view in found:
        assert torch.equal(view["past"], view["signal"])
    assert not torch.equal(found[0]["signal"], found[1]["signal"])


def test_with_jitter_each_frame_has_a_crop_of_its_own(tmp_path, map_of_places):
    film = write_frames(tmp_path / "still", np.repeat(np.asarray(PIL.Image.open(map_of_places))[None], 6, 0))
    settings = {"look": {"kind": "frames", "gap": (2, 4), "jitter": True}, "crop_scale": (0.2, 0.9)}
    found = looks(film, range(40), (32, 32), **settings)
    pairs = [(box(view["past"]), box(view["signal"])) for view in found]
    assert all(abs(area(one) - area(other)) > 1 or one[:2] != other[:2] for one, other in pairs)
    assert 8 < sum(area(one) > area(other) for one, other in pairs) < 32
    assert all(one[4] == other[4] for one, other in pairs)  # mirrored alike
    (alone,) = looks(film, [7], (32, 32), **settings)
    assert all(torch.equal(found[7][name], alone[name]) for name in alone)


def test_a_pair_depends_on_its_own_generator_alone(film):
    together = looks(film, [3, 4], (16, 16), look={"kind": "frames", "gap": (2, 5)})
    (alone,) = looks(film, [4], (16, 16), look={"kind": "frames", "gap": (2, 5)})
    assert all(torch.equal(together[1][name], alone[name]) for name in alone)


def test_a_video_without_such_a_pair_is_broken(tmp_path):
    film = write_video(tmp_path / "short.mp4", numbered(4))
    with pytest.raises(BrokenFile, match="too short: 4 of the 5 frames that the closest pair spans"):
        looks(film, [0], look={"kind": "frames"})
    with pytest.raises(BrokenFile, match="too short"):
        IMAGE.example(str(film), ImageSignal(look={"kind": "frames"}), None)


def test_the_examples_later_frame_is_the_same_for_all_gaps(film):
    signal = ImageSignal(size=(48, 64), resize_ratio=1.0, look={"kind": "frames", "gap": (4, 8)}, **RAW)
    far = signal.model_copy(update={"look": FramePair(gap=(20, 20))})
    assert [number(look) for look in IMAGE.example(str(film), far, None).values()] == [6, 26]
    found = IMAGE.example(str(film), signal, None)
    assert (number(found["past"]), number(found["signal"])) == (20, 26)


def test_single_frames_come_from_everywhere(film):
    found = looks(film, range(300), look={"kind": "frame"}, **WHOLE)
    assert found[0].keys() == {"signal"}
    assert {number(view["signal"]) for view in found} == set(range(40))
    example = IMAGE.example(
        str(film), ImageSignal(size=(48, 64), resize_ratio=1.0, look={"kind": "frame"}, **RAW), None
    )
    assert number(example["signal"]) == 20


# Crops


@pytest.fixture(scope="module")
def map_of_places(tmp_path_factory):
    """A picture whose red is its column and whose green is its row."""
    rows, columns = np.mgrid[:200, :200]
    path = tmp_path_factory.mktemp("crops") / "map.png"
    PIL.Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8)).save(path)
    return path


def box(look):
    """Return left, top, right, bottom, and whether it is mirrored, of a crop of the map."""
    across, down = look[0].mean(0) * 255, look[1].mean(1) * 255
    sides = [(float(line[0]), float(line[-1])) for line in (across, down)]
    (left, right), (top, bottom) = map(sorted, sides)
    x, y = ((high - low) / (look.shape[-1] - 1) / 2 for low, high in ((left, right), (top, bottom)))
    return left - x, top - y, right + x, bottom + y, sides[0][0] > sides[0][1]


def area(b):
    return (b[2] - b[0]) * (b[3] - b[1])


def test_the_inner_crop_lies_within_the_outer_one(map_of_places):
    settings = {"look": {"kind": "crops", "inner_scale": (0.3, 0.6)}, "crop_scale": (0.3, 0.8)}
    mirrored, shares = set(), []
    for view in looks(map_of_places, range(60), (32, 32), **settings):
        outer, inner = box(view["past"]), box(view["signal"])
        assert inner[0] >= outer[0] - 2
        assert inner[1] >= outer[1] - 2
        assert inner[2] <= outer[2] + 2
        assert inner[3] <= outer[3] + 2
        shares.append(area(inner) / area(outer))
        mirrored.add((outer[4], inner[4]))
    assert 0.25 < min(shares) < 0.38
    assert 0.5 < max(shares) < 0.66
    assert len(mirrored) == 4  # each by itself


def test_crops_that_are_not_nested_are_drawn_alike(map_of_places):
    settings = {"look": {"kind": "crops", "nested": False}, "crop_scale": (0.2, 0.9)}
    found = [(box(view["past"]), box(view["signal"])) for view in looks(map_of_places, range(60), (32, 32), **settings)]
    larger = sum(area(one) > area(other) for one, other in found)
    assert 15 < larger < 45


def test_a_pair_of_crops_depends_on_its_own_generator_alone(tmp_path, map_of_places):
    photo = tmp_path / "photo.jpg"
    PIL.Image.open(map_of_places).resize((1600, 1600)).save(photo, quality=95)
    settings = {"look": {"kind": "crops"}}
    together, (alone,) = looks(photo, [3, 4], (16, 16), **settings), looks(photo, [4], (16, 16), **settings)
    assert all(torch.equal(together[1][name], alone[name]) for name in alone)


def test_the_example_of_crops_is_the_middle_of_the_middle(map_of_places):
    found = IMAGE.example(str(map_of_places), ImageSignal(size=(64, 64), look={"kind": "crops"}, **RAW), None)
    outer, inner = box(found["past"]), box(found["signal"])
    np.testing.assert_allclose(area(inner) / area(outer), 0.25, atol=0.02)
    assert inner[:2] > outer[:2]


# Settings


def test_settings_say_what_is_trained_on_and_what_an_encoder_keeps():
    kinds = None, {"kind": "frames"}, {"kind": "crops"}, {"kind": "frame"}
    single, frames, crops, frame = (ImageSignal(look=look) for look in kinds)
    assert [IMAGE.source(signal).name for signal in (single, frames, crops, frame)] == ["image", "video"] * 2
    assert [IMAGE.inputs(signal) for signal in (single, frames)] == [("signal",), ("signal", "past")]
    assert [IMAGE.inputs(signal) for signal in (frame, crops)] == [("signal",), ("signal", "past")]
    assert IMAGE.alone(frames) == IMAGE.alone(crops) == single
    for signal in (single, frames, crops, frame):
        pickle.loads(pickle.dumps(IMAGE.views(signal)))


@pytest.mark.parametrize(
    ("recipe", "settings", "sentence"),
    [
        ("siam-mae-tiny", {"signal.look.gab": 3}, "'signal.look.gab' is not a key; did you mean 'signal.look.gap'?"),
        ("siam-mae-tiny", {"signal.look.gap": [8, 2]}, "signal.look.gap: is [least, greatest], but got [8.0, 2.0]"),
        ("siam-mae-tiny", {"signal.look.kind": "cropz"}, "look.kind: 'cropz' is not valid; did you mean 'crops'?"),
        ("siam-mae-tiny", {"signal.look.unit": "second"}, "look.unit: 'second' is not valid; did you mean 'seconds'?"),
        ("image-mae-tiny", {"signal.look.gap": [1, 2]}, "'signal.look.kind' is missing"),
        ("siam-mae-tiny", {"signal.buckets": [[96, 48]]}, "buckets are for pictures"),
        ("siam-mae-tiny", {"objective.decoder.attention": "cross-self"}, "did you mean 'cross_self'?"),
        ("crop-mae-tiny", {"signal.look.inner_scale": [0.3, 2]}, "signal.look.inner_scale"),
        ("crop-mae-tiny", {"signal.look.gap": [1, 2]}, "'signal.look.gap' is not a key"),
    ],
)  # fmt: skip
def test_mistakes_in_a_pair_are_named(recipe, settings, sentence):
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, settings)
    assert sentence in str(caught.value)


def test_objectives_and_looks_must_fit_together():
    with pytest.raises(UserError, match=r"'siam_mae' learns from signal and past, but modality image .* gives signal;"):
        build_objective(load_recipe("siam-mae-tiny", {"signal.look": None}))
    with pytest.raises(UserError, match=r"'mae' learns from signal, but modality image .* gives signal and past"):
        build_objective(load_recipe("image-mae-tiny", {"signal.look": {"kind": "crops"}}))
