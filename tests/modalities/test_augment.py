"""Augmentation against timm and torchvision on the same pictures, and what is drawn for it."""

import collections
import pickle

import numpy as np
import PIL.Image
import pytest
import torch
from timm.data import auto_augment as timm_augment
from timm.data import random_erasing as timm_erasing
from torchvision.transforms.v2 import functional as F

from mmssl.config import Piece, validate
from mmssl.errors import UserError
from modalities import augment
from modalities.augment import (
    JITTER,
    OPS,
    Augment,
    Blur,
    ColorJitter,
    Erase,
    RandAugment,
    Solarize,
    augment_picture,
    augment_signal,
)

H, W = 36, 52
FILL = (124, 116, 104)
EVERYTHING = Augment(
    randaugment=RandAugment(),
    jitter=ColorJitter(probability=1),
    grey=0.5,
    blur=Blur(probability=0.8),
    solarize=Solarize(probability=0.8),
    erase=Erase(probability=1),
)


def picture(seed=0):
    """Smooth and busy parts, a dull range, and another size each way."""
    rng, (rows, columns) = np.random.default_rng(seed), np.mgrid[:H, :W]
    waves = np.stack([rows / H, columns / W, (rows + columns) / (H + W)], -1)
    pixels = 30 + 150 * waves + rng.integers(0, 40, (H, W, 3)) * (columns > W // 2)[..., None]
    return PIL.Image.fromarray(pixels.astype(np.uint8))


def same(a, b):
    assert a.size == b.size
    assert a.mode == b.mode == "RGB"
    assert np.array_equal(np.asarray(a), np.asarray(b))


class Replay:
    """Stands in for the modules ``random`` and ``numpy.random`` in timm, with the numbers of one of our generators."""

    def __init__(self, rng):
        self.rng, self.random, self.uniform = rng, rng.random, rng.uniform

    def randint(self, low, high):
        return low + int(self.rng.integers(high - low + 1))


def by_timm(image, name, level, monkeypatch):
    """Let timm do one operation at a signed level."""
    sign = type("Sign", (), {"random": staticmethod(lambda: 1.0 if level < 0 else 0.0)})
    with monkeypatch.context() as patch:
        patch.setattr(timm_augment, "random", sign)
        hparams = {"img_mean": FILL, "interpolation": PIL.Image.Resampling.BICUBIC}
        return timm_augment.AugmentOp(name, prob=1.0, magnitude=abs(level), hparams=hparams)(image)


def recorded(monkeypatch):
    """Replace every operation by one that notes its name, level and fill, and changes nothing."""
    calls = []

    def recorder(name):
        def call(image, level, fill):
            calls.append((name, level, fill))
            return image

        return call

    monkeypatch.setattr(augment, "OPS", {name: recorder(name) for name in OPS})
    return calls


def test_nothing_is_done_or_drawn_by_default():
    rng, image, x = np.random.default_rng(3), picture(), torch.randn(3, 8, 8)
    before = rng.bit_generator.state
    for settings in (Augment(), Augment(jitter=ColorJitter(probability=0), erase=Erase(probability=0))):
        assert augment_picture(image, settings, rng) is image
        assert augment_signal(x, settings, rng) is x
        assert rng.bit_generator.state == before


def test_the_generator_alone_decides_and_the_input_stays():
    image, x = picture(), torch.randn(3, H, W)
    pixels, values = np.asarray(image).copy(), x.clone()
    settings = pickle.loads(pickle.dumps(EVERYTHING))
    first, again, other = (
        (augment_picture(image, s, rng), augment_signal(x, s, rng))
        for s, rng in zip((EVERYTHING, settings, EVERYTHING), map(np.random.default_rng, (7, 7, 8)), strict=True)
    )
    same(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    assert np.array_equal(pixels, np.asarray(image))
    assert torch.equal(values, x)
    assert hash(settings) == hash(EVERYTHING)


def test_the_operations_are_timms():
    assert list(OPS) == timm_augment._RAND_INCREASING_TRANSFORMS


@pytest.mark.parametrize("level", [-10.0, -9.0, -3.3, 0.0, 0.1, 5.0, 8.7, 10.0])
@pytest.mark.parametrize("name", OPS)
def test_each_operation_is_timms_bit_for_bit(name, level, monkeypatch):
    image = picture()
    ours = OPS[name](image, level, FILL)
    if name == "PosterizeIncreasing" and abs(level) == 10:
        # No bit is kept, for which timm calls a function of Pillow's that newer versions refuse to do it with.
        same(ours, PIL.Image.new("RGB", image.size))
    else:
        same(ours, by_timm(image, name, level, monkeypatch))
    if abs(level) > 3:
        assert not np.array_equal(np.asarray(ours), np.asarray(image))


def test_uncovered_parts_get_the_colour_asked_for():
    shifted = np.asarray(OPS["TranslateXRel"](picture(), 10, (1, 2, 3)))
    assert (shifted[:, -10:] == (1, 2, 3)).all()


def test_randaugment_is_its_operations_one_after_the_other(monkeypatch):
    image, settings = picture(), Augment(randaugment=RandAugment(ops=4))
    for seed in range(6):
        result = augment_picture(image, settings, np.random.default_rng(seed))
        with monkeypatch.context() as patch:
            calls = recorded(patch)
            augment_picture(image, settings, np.random.default_rng(seed))
        expected = image
        for name, level, fill in calls:
            assert fill == FILL
            expected = by_timm(expected, name, level, monkeypatch)
        same(result, expected)


def test_randaugment_draws_operations_and_strengths_as_timm_does(monkeypatch):
    calls, rng, draws = recorded(monkeypatch), np.random.default_rng(0), 4000
    settings, counts = Augment(randaugment=RandAugment(magnitude=6.0)), collections.Counter()
    for _ in range(draws):
        before = len(calls)
        augment_picture(picture, settings, rng)  # nothing looks at the picture
        counts[len(calls) - before] += 1
    for done, expected in ((0, 0.25), (1, 0.5), (2, 0.25)):
        assert counts[done] / draws == pytest.approx(expected, abs=0.03)
    names = collections.Counter(name for name, _, _ in calls)
    assert len(names) == len(OPS)
    assert max(abs(n / len(calls) - 1 / len(OPS)) for n in names.values()) < 0.016
    levels = np.array([level for _, level, _ in calls])
    assert np.abs(levels).mean() == pytest.approx(6.0, abs=0.04)
    assert np.abs(levels).std() == pytest.approx(0.5, abs=0.03)
    assert (levels > 0).mean() == pytest.approx(0.5, abs=0.03)


def test_strengths_stay_between_0_and_10(monkeypatch):
    calls, rng = recorded(monkeypatch), np.random.default_rng(0)
    augment_picture(picture(), Augment(randaugment=RandAugment(ops=400, magnitude_std=8)), rng)
    levels = np.abs([level for _, level, _ in calls])
    assert levels.max() == 10
    assert levels.min() == 0
    assert all(type(level) is float for _, level, _ in calls)


@pytest.mark.parametrize(
    ("name", "reference", "values"),
    [
        ("brightness", F.adjust_brightness, (0.0, 0.6, 1.0, 1.4, 2.0)),
        ("contrast", F.adjust_contrast, (0.0, 0.6, 1.0, 1.4, 2.0)),
        ("saturation", F.adjust_saturation, (0.0, 0.6, 1.0, 1.4, 2.0)),
        ("hue", F.adjust_hue, (-0.5, -0.1, -0.003, 0.0, 0.07, 0.5)),
    ],
)
def test_each_change_of_colour_is_torchvisions_bit_for_bit(name, reference, values):
    for value in values:
        same(JITTER[name][0](picture(), value), reference(picture(), value))


def test_jitter_draws_each_factor_from_its_range_in_random_order(monkeypatch):
    calls = []

    def recorder(name):
        return lambda image, value: calls.append((name, value)) or image

    monkeypatch.setattr(augment, "JITTER", {name: (recorder(name), neutral) for name, (_, neutral) in JITTER.items()})
    settings, rng = Augment(jitter=ColorJitter(contrast=0, saturation=0.2)), np.random.default_rng(0)
    for _ in range(2000):
        augment_picture(picture, settings, rng)
    drawn = {name: np.array([value for other, value in calls if other == name]) for name in JITTER}
    assert len(drawn["contrast"]) == 0
    for name, low, high in (("brightness", 0.6, 1.4), ("saturation", 0.8, 1.2), ("hue", -0.1, 0.1)):
        assert len(drawn[name]) / 2000 == pytest.approx(0.8, abs=0.04)
        assert low <= drawn[name].min() < low + 0.01 * (high - low)
        assert high >= drawn[name].max() > high - 0.01 * (high - low)
        assert drawn[name].mean() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))
    orders = collections.Counter(tuple(name for name, _ in calls[i : i + 3]) for i in range(0, len(calls), 3))
    assert len(orders) == 6
    assert min(orders.values()) / (len(calls) / 3) > 1 / 6 - 0.04


def test_grey_is_torchvisions_and_happens_as_often_as_asked():
    image, grey, rng = picture(), 0, np.random.default_rng(0)
    same(augment_picture(image, Augment(grey=1), rng), F.rgb_to_grayscale(image, num_output_channels=3))
    for _ in range(1000):
        grey += augment_picture(image, Augment(grey=0.2), rng) is not image
    assert grey / 1000 == pytest.approx(0.2, abs=0.04)


def test_solarize_is_torchvisions():
    for threshold in (0, 100, 128, 255):
        settings = Augment(solarize=Solarize(probability=1, threshold=threshold))
        same(augment_picture(picture(), settings, np.random.default_rng(0)), F.solarize(picture(), threshold))


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blur_is_close_to_torchvisions_away_from_the_border(sigma):
    # Pillow approximates the filter and repeats the border's pixels, where torchvision mirrors them.
    blurred = augment_picture(
        picture(), Augment(blur=Blur(probability=1, sigma=(sigma, sigma))), np.random.default_rng(0)
    )
    reference = F.gaussian_blur(picture(), [23, 23], [sigma, sigma])
    off = np.abs(np.asarray(blurred).astype(int) - np.asarray(reference).astype(int))[8:-8, 8:-8]
    change = np.abs(np.asarray(picture()).astype(int) - np.asarray(reference).astype(int))[8:-8, 8:-8]
    assert off.max() <= 3
    assert off.mean() < 0.15 * change.mean()


def test_blur_draws_its_width_from_its_range():
    def rough(image):
        return np.abs(np.diff(np.asarray(image).astype(int), axis=1)).mean()

    settings = Augment(blur=Blur(probability=1, sigma=(0.5, 2)))
    drawn = [rough(augment_picture(picture(), settings, np.random.default_rng(seed))) for seed in range(40)]
    narrow, wide = (
        rough(augment_picture(picture(), Augment(blur=Blur(probability=1, sigma=(s, s))), np.random.default_rng(0)))
        for s in (0.5, 2)
    )
    assert wide <= min(drawn) < wide + 0.2 * (narrow - wide)
    assert narrow >= max(drawn) > narrow - 0.4 * (narrow - wide)


def test_the_whole_is_its_parts_in_the_order_of_the_fields():
    # What is off draws nothing, so one generator goes through the parts as it goes through the whole.
    for seed in range(8):
        rng, image = np.random.default_rng(seed), picture()
        for name in ("randaugment", "jitter", "grey", "blur", "solarize"):
            image = augment_picture(image, Augment(**{name: getattr(EVERYTHING, name)}), rng)
        same(augment_picture(picture(), EVERYTHING, np.random.default_rng(seed)), image)


@pytest.mark.parametrize("mode", ["pixel", "zero"])
@pytest.mark.parametrize("size", [(32, 48), (9, 5), (1, 1), (2, 60)])
def test_erasing_is_timms_bit_for_bit_on_the_same_draws(mode, size, monkeypatch):
    settings = Augment(erase=Erase(probability=0.7, mode=mode))
    theirs = timm_erasing.RandomErasing(
        0.7, max_area=1 / 3, max_aspect=3.3, mode={"pixel": "pixel", "zero": "const"}[mode], device="cpu"
    )
    signal, erased = torch.randn(3, *size), 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        with monkeypatch.context() as patch:
            patch.setattr(timm_erasing, "random", Replay(rng))
            if mode == "pixel":
                patch.setattr(
                    timm_erasing,
                    "_get_pixels",
                    lambda per_pixel, color, shape, rng=rng, **_: torch.from_numpy(
                        rng.standard_normal(shape, dtype=np.float32)
                    ),
                )
            expected = theirs(signal.clone())
        ours_rng = np.random.default_rng(seed)
        ours = augment_signal(signal, settings, ours_rng)
        assert torch.equal(ours, expected)
        assert ours_rng.random() == rng.random()  # as many draws
        erased += not torch.equal(ours, signal)
    assert erased > 10 or size in ((1, 1), (9, 5), (2, 60))


def test_the_erased_part_is_one_rectangle_of_normal_numbers():
    rng, signal = np.random.default_rng(0), torch.full((3, 40, 60), 50.0)
    settings, areas = Augment(erase=Erase(probability=1)), []
    for _ in range(300):
        gone = augment_signal(signal, settings, rng) != 50
        rows, columns = gone.any(0).any(1).nonzero(), gone.any(0).any(0).nonzero()
        box = gone[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box.all()
        assert box.sum() == gone.sum()
        areas.append(gone[0].float().mean().item())
        assert 0.3 * 0.8 < box.shape[1] / box.shape[2] < 3.3 * 1.25
    values = augment_signal(signal, Augment(erase=Erase(probability=1, area=(0.5, 0.5))), rng)
    values = values[values != 50]
    assert abs(values.mean()) < 0.1
    assert values.std() == pytest.approx(1, abs=0.05)
    assert 0.015 < min(areas) < 0.04
    assert 0.3 < max(areas) < 0.35
    assert np.mean(areas) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"randaug": {}}, "'randaug' is not a key; did you mean 'randaugment'?"),
        ({"erase": {"mode": "pixels"}}, "erase.mode: 'pixels' is not valid; did you mean 'pixel'?"),
        ({"erase": {"area": [0.1, 2]}}, "erase.area: is a fraction of the signal's area, at most 1, but got"),
        ({"erase": {"ratio": [3, 0.3]}}, "erase.ratio: is [least, greatest], both greater than 0, but got [3.0, 0.3]"),
        ({"blur": {"sigma": [0, 2]}}, "blur.sigma: is [least, greatest], both greater than 0"),
        ({"randaugment": {"magnitude": 11}}, "randaugment.magnitude: "),
        ({"randaugment": {"fill": [0, 0, 256]}}, "randaugment.fill.2: "),
        ({"jitter": {"hue": 0.6}}, "jitter.hue: "),
        ({"grey": 1.5}, "grey: "),
    ],
)
def test_mistakes_get_a_sentence(settings, sentence):
    with pytest.raises(UserError) as caught:
        validate(Augment, settings, "r.yaml")
    assert str(caught.value).startswith(f"r.yaml: {sentence}")


def test_settings_survive_a_round_trip():
    assert Augment.model_validate(EVERYTHING.model_dump(mode="json")) == EVERYTHING
    assert Augment.model_validate({"erase": {}, "randaugment": {}}) == Augment(erase=Erase(), randaugment=RandAugment())
    assert isinstance(EVERYTHING, Piece)
