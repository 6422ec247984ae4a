"""Changes of single patches: drawn for each from its sample's seed, off by default, and in training alone."""

import pickle

import numpy as np
import pytest
import torch

from mmssl.config import validate
from mmssl.data.dataset import Sample, collate
from mmssl.errors import UserError
from modalities.encoder import Encoder, EncoderConfig, typed
from modalities.image import Image
from modalities.image_settings import CropTokenizer, ImageSignal, ImageTokenizer
from modalities.patch_augment import LUMA, PatchAugment, augment_patches

IMAGE = Image()
ALL = {
    "flip": 0.5, "rotate": 20.0, "shear": 0.3, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "grey": 0.3,
    "colour_drop": 0.5,
}  # fmt: skip
MEAN, STD = torch.tensor((0.5, 0.4, 0.3)), torch.tensor((0.2, 0.25, 0.3))
CROPS = {"name": "crops", "patch_size": 8, "stride": 4, "blocks": (1,), "channels": (8,), "bottlenecks": (4,)}


def batch(count=4, first=0, **on):
    return {"seed": 977 * torch.arange(first, first + count)} | {
        f"patch_{name}": torch.full((count,), float(value)) for name, value in on.items()
    }


def patches(count=4, n=6, h=8, w=12):
    """Return normalised patches of pixels between 0.2 and 0.8."""
    return ((0.2 + 0.6 * torch.rand(count, n, h, w, 3)) - MEAN) / STD


def changed(x, **on):
    return augment_patches(x, batch(len(x), **on), MEAN, STD)


def raw(x):
    return x * STD + MEAN


def test_off_is_the_very_same():
    x = patches()
    assert augment_patches(x, batch(), MEAN, STD) is x
    assert PatchAugment().active == {}
    assert PatchAugment(grey=0.5).active == {"grey": 0.5}


@pytest.mark.parametrize("on", [{name: value} for name, value in ALL.items()] + [ALL], ids=lambda on: "-".join(on))
def test_what_is_drawn_depends_on_the_samples_seed_and_the_patch_alone(on):
    x = patches()
    whole = changed(x, **on)
    assert whole.shape == x.shape
    assert not torch.equal(whole, x)
    assert torch.equal(changed(x, **on), whole)
    order = torch.tensor([2, 0, 3, 1])
    given = {key: value[order] for key, value in batch(**on).items()}
    assert torch.equal(augment_patches(x[order], given, MEAN, STD), whole[order])
    alone = {key: value[2:3] for key, value in batch(**on).items()}
    torch.testing.assert_close(augment_patches(x[2:3], alone, MEAN, STD), whole[2:3])
    # Patches of one picture that are alike are changed in different ways, and so are those of another.
    alike = changed(x[:1, :1].expand_as(x), **on).flatten(0, 1).flatten(1)
    assert len(alike.unique(dim=0)) > 1
    other = {**batch(**on), "seed": batch(first=50)["seed"]}
    assert not torch.equal(augment_patches(x, other, MEAN, STD), whole)


def test_colour_drop_leaves_one_channel_and_the_mean_of_the_others():
    x = patches(64)
    kept = (changed(x, colour_drop=1) != 0).flatten(2, 3).any(2)
    assert torch.equal(kept.sum(-1), torch.ones(64, 6, dtype=torch.int64))
    shares = kept.float().mean((0, 1))
    assert (shares - 1 / 3).abs().max() < 0.1
    some = changed(x, colour_drop=0.25)
    touched = (some != x).flatten(2).any(2)
    assert abs(touched.float().mean() - 0.25) < 0.1
    assert torch.equal(some[~touched], x[~touched])


def test_flip_mirrors_left_to_right():
    x = patches()
    assert torch.equal(changed(x, flip=1), x.flip(3))


def test_grey_has_equal_channels_of_the_same_luma():
    x = patches()
    grey = raw(changed(x, grey=1))
    torch.testing.assert_close(grey, (raw(x) * torch.tensor(LUMA)).sum(-1, keepdim=True).expand_as(grey))


def test_brightness_multiplies_and_stays_in_range():
    x = patches()
    factor = raw(changed(x, brightness=0.2)) / raw(x)
    torch.testing.assert_close(factor, factor[:, :, :1, :1, :1].expand_as(factor))
    assert 0.8 <= factor.min() < 0.95
    assert 1.05 < factor.max() <= 1.2
    assert raw(changed(x, brightness=1)).max() <= 1 + 1e-6


def test_contrast_leaves_the_mean_luma_and_saturation_every_luma():
    x, luma = patches(), torch.tensor(LUMA)
    contrast, saturation = (raw(changed(x, **{name: 0.2})) @ luma for name in ("contrast", "saturation"))
    torch.testing.assert_close(contrast.mean((2, 3)), (raw(x) @ luma).mean((2, 3)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(saturation, raw(x) @ luma, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(contrast, raw(x) @ luma, atol=1e-2)


def wedge(h, w):
    """Return the offset of every pixel from the middle, rows and columns: [h, w] each."""
    return torch.meshgrid(torch.arange(h) - (h - 1) / 2, torch.arange(w) - (w - 1) / 2, indexing="ij")


def slopes(x):
    """Return how steeply the middle of patches [B, N, p, q, 3] rises along rows and along columns."""
    middle = x[:, :, 6:10, 8:16, 0]
    return middle.diff(dim=2).mean((2, 3)), middle.diff(dim=3).mean((2, 3))


def test_rotation_turns_in_pixels_whatever_the_patchs_shape():
    _, columns = wedge(16, 24)
    ramp = columns[None, None, ..., None].expand(4, 6, 16, 24, 3)
    down, right = slopes(changed(ramp, rotate=30))
    torch.testing.assert_close(down.square() + right.square(), torch.ones(4, 6), rtol=1e-3, atol=1e-3)
    angles = torch.atan2(down, right).rad2deg()
    assert -30 <= angles.min() < -10
    assert 10 < angles.max() <= 30


def test_shear_shifts_sideways_by_pixels_per_row():
    rows, columns = wedge(16, 24)
    down, right = slopes(changed(columns[None, None, ..., None].expand(4, 6, 16, 24, 3), shear=0.25))
    torch.testing.assert_close(right, torch.ones(4, 6), rtol=1e-3, atol=1e-3)
    assert -0.25 <= down.min() < -0.08
    assert 0.08 < down.max() <= 0.25
    down, right = slopes(changed(rows[None, None, ..., None].expand(4, 6, 16, 24, 3), shear=0.25))
    torch.testing.assert_close((down, right), (torch.ones(4, 6), torch.zeros(4, 6)), rtol=1e-3, atol=1e-3)


def training_batch(photos, **augment):
    signal = ImageSignal(size=20, patch_augment=augment)
    views = pickle.loads(pickle.dumps(IMAGE.views(signal)))
    rngs = [np.random.default_rng(i) for i in range(3)]
    read = views(str(next(photos.rglob("*.png"))), rngs, (20, 20))
    return collate([Sample({**view, "seed": i}, []) for i, view in enumerate(read)])[0]


def test_training_has_the_keys_and_evaluation_and_fine_tuning_have_none(photos):
    tokenizer = IMAGE.tokenizer(ImageSignal(size=20), CropTokenizer(**CROPS), 8)
    plain, given = training_batch(photos), training_batch(photos, **ALL)
    assert {key for key in given if key.startswith("patch_")} == {f"patch_{name}" for name in ALL}
    assert not any(key.startswith("patch_") for key in plain)
    assert torch.equal(plain["signal"], given["signal"])
    cut = tokenizer.patches(given)
    assert not torch.equal(cut, tokenizer.patches(plain))
    assert torch.equal(tokenizer.patches({"signal": given["signal"]}), tokenizer.patches(plain))
    assert IMAGE.alone(ImageSignal(patch_augment=ALL)) == ImageSignal()
    backbone = {"name": "pixelcnn", "dim": 8, "depth": 1}
    model = {"tokenizer": CROPS, "backbone": backbone, "cls_token": False}
    config = typed(EncoderConfig, "image", "test")
    encoder = Encoder(config(modality="image", signal={"size": 20, "patch_augment": ALL}, model=model))
    assert PatchAugment(**encoder.preprocess["patch_augment"]).active == {}


def test_colours_are_those_of_the_pictures_own_statistics(photos):
    given = training_batch(photos, grey=1)
    signal = ImageSignal(size=20, mean=(0.5, 0.5, 0.5), std=(0.1, 0.2, 0.4))
    tokenizer = IMAGE.tokenizer(signal, CropTokenizer(**CROPS), 8)
    cut = tokenizer.patches(given).unflatten(2, (8, 8, 3))
    pixels = cut * torch.tensor(signal.std) + torch.tensor(signal.mean)
    torch.testing.assert_close(pixels, pixels[..., :1].expand_as(pixels))


def test_patches_that_do_not_overlap_have_no_such_changes():
    with pytest.raises(ValueError, match=r"signal\.patch_augment changes patches that overlap"):
        IMAGE.tokenizer(ImageSignal(size=16, patch_augment={"grey": 0.5}), ImageTokenizer(patch_size=8), 8)


@pytest.mark.parametrize("settings", [{"grey": 1.5}, {"rotate": -1}, {"color_drop": 1}])
def test_impossible_settings_are_told(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        validate(PatchAugment, settings, "recipe")
