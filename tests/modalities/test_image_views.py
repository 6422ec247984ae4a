"""Training crops: drawn as the field does, decoded once, never far from what Pillow makes of the whole picture."""

import math
import pickle

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest
import torch
from PIL.JpegImagePlugin import JpegImageFile

from mmssl.data.guard import BrokenFile, guarded
from modalities import image_views
from modalities.augment import Augment, Erase, RandAugment
from modalities.image import Image
from modalities.image_settings import ImageSignal
from modalities.image_views import crop_box, draft_scale, stored_box, upright

IMAGE = Image()
BICUBIC = PIL.Image.Resampling.BICUBIC
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
ORIENTATIONS = range(1, 9)


def scene(height, width, grain=12, seed=0):
    """Waves of every length, a sharp edge and some grain: what photographs are made of. No symmetry."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [rng.uniform(-1, 1, 3) / k * np.sin(k * (x * a + y * b) + c)[..., None]
             for k in (0.02, 0.05, 0.11, 0.23) for a, b, c in rng.uniform(-1, 1, (2, 3))]  # fmt: skip
    pixels = 120 + 1.5 * sum(waves) + 60 * (x > 0.6 * width + 0.2 * y)[..., None]
    pixels += rng.normal(0, grain, (height, width, 1))
    return PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def saved(path, image, orientation=1, **options):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, **({"quality": 95} | options if path.suffix == ".jpg" else options))
    return str(path)


def slow(path, signal, seed, orientation=1):
    """The slow twin: Pillow decodes the whole file, cuts the box out, resizes it and mirrors it."""
    image, rng = IMAGE.decode(path), np.random.default_rng(seed)
    height, width = signal.size
    part = image.crop(crop_box(image.height, image.width, signal, rng, width / height))
    # Both passes round to bytes. Stored rows come first here; some versions of Pillow choose the order by the shape.
    first = (part.width, height) if orientation > 4 else (width, part.height)
    x = np.array(part.resize(first, BICUBIC).resize((width, height), BICUBIC))
    x = x[:, ::-1] if rng.random() < 0.5 and signal.flip else x
    return torch.from_numpy(x.copy()).permute(2, 0, 1) / 255


def fast(path, signal, *seeds):
    views = IMAGE.views(signal)(path, [np.random.default_rng(seed) for seed in seeds], signal.size)
    crops = [view["signal"] for view in views]
    for x in crops:
        assert x.dtype == torch.float32
        assert x.shape == (3, *signal.size)
        assert x.is_contiguous()
    return crops


def assert_same(path, signal, seed, orientation=1):
    steps = (fast(path, signal, seed)[0] - slow(path, signal, seed, orientation)).abs() * 255
    # The kernels' weights have 16 bits, Pillow's have 22: one value in a few hundred is rounded the other way, and
    # where a picture is enlarged one in 100 000 twice.
    assert steps.max() < 2.01
    assert (steps > 1.01).sum() <= 1 + 1e-4 * steps.numel()
    assert steps.mean() < 0.02


def test_training_crops_follow_the_recipe():
    signal = ImageSignal(crop_scale=(0.3, 0.6), crop_ratio=(0.5, 2.0))
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box(400, 500, signal, rng) for _ in range(4000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share, ratio = w * h / (400 * 500), w / h
    assert 0.295 < share.min() < 0.31
    assert 0.59 < share.max() < 0.605
    assert 0.49 < ratio.min() < 0.55
    assert 1.8 < ratio.max() < 2.02
    # The tries that do not fit lean towards small crops, hence the margin.
    assert abs(share.mean() - 0.45) < 0.015
    assert boxes[:, 0].min() == 0
    assert boxes[:, 2:].max(0).tolist() == [500, 400]
    assert abs((boxes[:, 0] + boxes[:, 2]).mean() / 2 - 250) < 3


def test_aspect_ratios_are_log_uniform():
    # Small crops always fit, so nothing is rejected and the distribution is exact.
    signal = ImageSignal(crop_scale=(0.05, 0.1), crop_ratio=(0.25, 4.0))
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box(1000, 1000, signal, rng) for _ in range(4000)])
    logs = np.log((boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1])) / math.log(4)
    assert np.quantile(logs, [0.25, 0.5, 0.75]) == pytest.approx([-0.5, 0, 0.5], abs=0.06)


@pytest.mark.parametrize(("shape", "expected"), [((30, 3000), (1480, 0, 1520, 30)), ((3000, 30), (0, 1480, 30, 1520))])
def test_pictures_too_long_for_any_crop_give_their_centre(shape, expected):
    signal = ImageSignal(crop_scale=(0.9, 1.0))
    assert crop_box(*shape, signal, np.random.default_rng(0)) == expected


@pytest.mark.parametrize("shape", [(97, 133), (301, 40), (30, 31), (1, 1), (3, 200), (260, 260)])
@pytest.mark.parametrize("size", [(32, 32), (48, 24), (30, 31)])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_crop_is_its_box_resized_and_flipped(tmp_path, shape, size, suffix):
    path = saved(tmp_path / f"x.{suffix}", scene(*shape))
    for seed in range(6):
        assert_same(path, ImageSignal(size=size, draft=False, **RAW), seed)


def test_every_other_crop_is_mirrored_and_the_boxes_stay_the_same_without(tmp_path):
    path, mirrored = saved(tmp_path / "x.png", scene(40, 50)), 0
    for seed in range(60):
        (with_flip,), (without,) = (fast(path, ImageSignal(size=16, flip=flip), seed) for flip in (True, False))
        mirrored += torch.equal(with_flip.flip(-1), without)
        assert torch.equal(with_flip, without) or torch.equal(with_flip.flip(-1), without)
    assert 18 < mirrored < 42


def test_values_are_normalised(tmp_path):
    path = saved(tmp_path / "x.png", scene(40, 50))
    (raw,), (x,) = fast(path, ImageSignal(size=16, **RAW), 0), fast(path, ImageSignal(size=16), 0)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(x, (raw - mean) / std, rtol=0, atol=2e-6)


def test_draws_come_from_the_generator_alone(tmp_path):
    path, signal = saved(tmp_path / "x.jpg", scene(60, 80)), ImageSignal(size=32)
    views = IMAGE.views(signal)
    first = views(path, [np.random.default_rng(5)], (32, 32))[0]["signal"]
    np.random.seed(1)
    torch.manual_seed(1)
    again = pickle.loads(pickle.dumps(views))(path, [np.random.default_rng(5)], (32, 32))[0]["signal"]
    assert torch.equal(first, again)
    assert not torch.equal(first, fast(path, signal, 6)[0])


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_several_views_read_the_file_once_and_do_not_know_of_each_other(tmp_path, suffix, monkeypatch):
    path, signal = saved(tmp_path / f"x.{suffix}", scene(400, 500)), ImageSignal(size=(48, 40))
    alone = [fast(path, signal, seed)[0] for seed in range(5)]
    opened, count = image_views.opened, []
    monkeypatch.setattr(image_views, "opened", lambda path: count.append(path) or opened(path))
    together = fast(path, signal, *range(5))
    assert count == [path]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_view_has_the_size_asked_for_and_its_aspect(tmp_path):
    path = saved(tmp_path / "x.png", scene(64, 128))
    signal = ImageSignal(size=32, buckets=[[16, 32]], crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False, **RAW)
    x = IMAGE.views(signal)(path, [np.random.default_rng(0)], (16, 32))[0]["signal"]
    whole = np.array(IMAGE.decode(path).resize((32, 16), BICUBIC))
    assert (x * 255 - torch.from_numpy(whole).permute(2, 0, 1)).abs().max() < 1.01


JPEGS = [
    ("RGB", {"subsampling": 0}),
    ("RGB", {"subsampling": 1}),
    ("RGB", {"subsampling": 2}),
    ("RGB", {"progressive": True}),
    ("RGB", {"keep_rgb": True}),
    ("RGB", {"restart_marker_blocks": 3}),
    ("L", {}),
    ("CMYK", {}),
]


@pytest.mark.parametrize(("mode", "options"), JPEGS)
def test_every_kind_of_jpeg_has_the_pixels_that_pillow_gives(tmp_path, mode, options):
    path = saved(tmp_path / "x.jpg", scene(83, 101).convert(mode), **options)
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": False}
    signal = ImageSignal(size=(83, 101), **whole, **RAW)
    (x,) = fast(path, signal, 0)
    # A crop of its own size is not resampled, so this is to the bit.
    assert np.array_equal((x * 255).round().permute(1, 2, 0).numpy(), np.asarray(IMAGE.decode(path)))
    assert_same(path, ImageSignal(size=32, draft=False, **RAW), 1)


@pytest.mark.parametrize(("mode", "options"), JPEGS)
def test_every_kind_of_jpeg_can_be_drafted(tmp_path, mode, options):
    path = saved(tmp_path / "x.jpg", scene(283, 401).convert(mode), **options)
    signal = ImageSignal(size=24, **RAW)
    assert (fast(path, signal, 1)[0] - slow(path, signal, 1)).abs().mean() * 255 < 2


def test_a_picture_of_several_frames_gives_its_first(tmp_path):
    path = tmp_path / "x.jpg"
    scene(200, 280).save(path, format="MPO", save_all=True, append_images=[scene(200, 280, seed=1)])
    assert_same(str(path), ImageSignal(size=24, draft=False, **RAW), 0)
    signal = ImageSignal(size=24, **RAW)
    assert (fast(str(path), signal, 0)[0] - slow(str(path), signal, 0)).abs().mean() * 255 < 2


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_crops_are_upright(tmp_path, suffix, orientation):
    path = saved(tmp_path / f"x.{suffix}", scene(90, 130), orientation)
    for seed in range(4):
        order = orientation if suffix == "jpg" else 1
        assert_same(path, ImageSignal(size=(24, 40), draft=False, **RAW), seed, order)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_boxes_and_pixels_are_turned_alike(orientation):
    stored = torch.arange(5 * 7).view(1, 5, 7)
    left, top, right, bottom = stored_box((1, 2, 4, 5), orientation, (7, 5))
    assert torch.equal(
        upright(stored[:, top:bottom, left:right], orientation), upright(stored, orientation)[:, 2:5, 1:4]
    )


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_drafted_crop_is_close_and_in_its_place(tmp_path, orientation, monkeypatch):
    drafted = []
    draft = JpegImageFile.draft
    monkeypatch.setattr(JpegImageFile, "draft", lambda image, *to: (draft(image, *to), drafted.append(image.size)))
    # Uneven sides, so that the last pixel of the reduced picture is only a part of one.
    path = saved(tmp_path / "x.jpg", scene(603, 901), orientation, quality=90)
    for seed, size in enumerate([(110, 90), (64, 50), (27, 27)]):
        signal = ImageSignal(size=size, **RAW)
        exact = slow(path, signal, seed)
        wrong = fast(path, signal, seed)[0] - exact
        assert wrong.abs().mean() * 255 < 1.5
        assert abs(wrong.mean()) * 255 < 0.2
        # The shift that explains the difference best, in pixels of the crop: least squares on the gradient.
        for axis in (-1, -2):
            slope = torch.gradient(exact, dim=axis)[0]
            assert abs((wrong * slope).sum() / (slope * slope).sum()) < 0.01
    assert drafted == [(451, 302), (226, 151), (113, 76)]


def test_small_pictures_and_those_without_draft_are_decoded_in_full(tmp_path, monkeypatch):
    monkeypatch.setattr(JpegImageFile, "draft", lambda *_: pytest.fail("drafted"))
    small, whole = ImageSignal(size=32), ImageSignal(size=32, draft=False)
    assert fast(saved(tmp_path / "small.jpg", scene(90, 120)), small, 0)[0].shape == (3, 32, 32)
    assert fast(saved(tmp_path / "large.jpg", scene(400, 500)), whole, 0)[0].shape == (3, 32, 32)


@pytest.mark.parametrize("shape", [(3000, 4000), (768, 1024), (500, 5000), (5000, 450), (300, 10000), (64, 64)])
@pytest.mark.parametrize("size", [(224, 224), (96, 96), (128, 64), (32, 96)])
@pytest.mark.parametrize("crop_scale", [(0.08, 1.0), (0.2, 1.0), (0.9, 1.0)])
def test_no_crop_of_a_drafted_picture_is_smaller_than_the_signal(shape, size, crop_scale):
    signal = ImageSignal(size=size, crop_scale=crop_scale)
    scale, rng = draft_scale(*shape, signal, size), np.random.default_rng(0)
    boxes = np.array([crop_box(*shape, signal, rng, size[1] / size[0]) for _ in range(300)])
    room = min((boxes[:, 3] - boxes[:, 1]).min() / size[0], (boxes[:, 2] - boxes[:, 0]).min() / size[1])
    assert scale == 1 or room >= scale


@pytest.mark.parametrize(
    ("shape", "size", "scale"),
    [
        ((3000, 4000), 224, 4),
        ((4000, 3000), 224, 4),
        ((1200, 1600), 224, 2),
        ((768, 1024), 224, 1),
        ((768, 1024), 96, 2),
        ((3000, 4000), (112, 448), 4),
        ((3000, 4000), 32, 8),
    ],
)
def test_large_pictures_are_drafted(shape, size, scale):
    signal = ImageSignal(size=size)
    assert draft_scale(*shape, signal, signal.size) == scale
    assert draft_scale(*shape, ImageSignal(size=size, draft=False), signal.size) == 1


def test_broken_files_have_the_reasons_that_evaluation_gives(tmp_path):
    whole = open(saved(tmp_path / "whole.jpg", scene(400, 500)), "rb").read()  # noqa: PTH123, SIM115
    cases = {
        "cut.jpg": whole[: len(whole) // 2],
        "empty.jpg": b"",
        "text.jpg": b"hello",
        "headless.jpg": whole[:700],
        "damaged.jpg": whole[:200] + b"\xff\xc4\0\x05" + whole[204:],
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    for name in [*cases, "gone.jpg"]:
        path = str(tmp_path / name)
        with pytest.raises(BrokenFile) as evaluation:
            IMAGE.decode(path)
        for draft in (True, False):
            views = IMAGE.views(ImageSignal(size=32, draft=draft))
            with pytest.raises(BrokenFile) as training:
                guarded(lambda path, views=views: views(path, [np.random.default_rng(0)], (32, 32)), path, None)
            assert training.value.reason == evaluation.value.reason, name


def test_a_jpeg_that_only_pillow_reads_is_used(tmp_path, monkeypatch):
    path, signal = saved(tmp_path / "x.jpg", scene(60, 80)), ImageSignal(size=24)
    (x,) = fast(path, signal, 0)

    def refuse(*_):
        raise RuntimeError("not in this build")

    monkeypatch.setattr(image_views, "decode_jpeg", refuse)
    assert torch.equal(fast(path, signal, 0)[0], x)


def test_augmentation_follows_crop_and_flip_and_is_off_by_default(tmp_path):
    path = saved(tmp_path / "x.png", scene(60, 80))
    plain = fast(path, ImageSignal(size=32, **RAW), 3)[0]
    grey = fast(path, ImageSignal(size=32, augment=Augment(grey=1.0), **RAW), 3)[0]
    # The same crop, mirrored the same way, without its colours.
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    assert (grey - (plain * weights).sum(0)).abs().max() < 1.01 / 255
    erased = fast(path, ImageSignal(size=32, augment=Augment(erase=Erase(probability=1.0, mode="zero"))), 3)[0]
    hole = erased == 0
    assert 0.01 < hole.float().mean() < 0.4
    assert torch.equal(erased[~hole], fast(path, ImageSignal(size=32), 3)[0][~hole])
    strong = ImageSignal(size=32, augment=Augment(randaugment=RandAugment()))
    assert torch.equal(fast(path, strong, 3)[0], fast(path, strong, 3)[0])


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_the_bucket_is_that_of_the_upright_picture(tmp_path, suffix, orientation):
    path = saved(tmp_path / f"x.{suffix}", scene(30, 60), orientation)
    signal = ImageSignal(size=32, buckets=[[16, 32], [32, 16]])
    assert IMAGE.bucket(path, signal) == (2 if orientation > 4 else 1)
    assert IMAGE.inspect(path) == ((60, 30) if orientation > 4 else (30, 60))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif"])
def test_the_bucket_is_found_without_a_pixel(tmp_path, suffix, monkeypatch):
    scene(30, 60).save(tmp_path / f"x.{suffix}")
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    assert IMAGE.bucket(str(tmp_path / f"x.{suffix}"), ImageSignal(size=32, buckets=[[16, 32]])) == 1


def test_a_file_without_a_header_is_in_the_first_bucket(tmp_path):
    (tmp_path / "x.jpg").write_text("hello")
    assert IMAGE.bucket(str(tmp_path / "x.jpg"), ImageSignal(buckets=[[16, 32]])) == 0
    assert IMAGE.bucket(str(tmp_path / "gone.jpg"), ImageSignal(buckets=[[16, 32]])) == 0
