"""Pictures with four flat quarters: red top left, green top right, blue bottom left, yellow bottom right."""

import pickle
import struct
import warnings
import zlib

import numpy as np
import PIL.Image
import pytest
import torch
from PIL import ImageFile
from torchvision.transforms import InterpolationMode, v2

from mmssl.config import validate
from mmssl.data.guard import BrokenFile, guarded
from mmssl.errors import UserError
from modalities.image import Image, centre_box
from modalities.image_settings import ImageSignal, ImageTokenizer

H, W = 40, 64
COLOURS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], dtype=np.uint8)
QUARTERS = np.repeat(np.repeat(COLOURS, H // 2, 0), W // 2, 1)
IMAGE = Image()


def picture(mode="RGB"):
    return PIL.Image.fromarray(QUARTERS).convert(mode)


def noise(height, width, seed=0):
    # Smooth and busy parts at once, so that both the filter's width and its place show.
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return PIL.Image.fromarray(((pixels + np.linspace(0, 255, width)[None, :, None]) / 2).astype(np.uint8))


def quarters(image):
    """Return the colour in the middle of each quarter: int [2, 2, 3]."""
    x = np.asarray(image).astype(int)
    h, w = x.shape[:2]
    return x[h // 4 :: h // 2, w // 4 :: w // 2][:2, :2]


def decoded(path):
    image = IMAGE.decode(str(path))
    assert type(image) is PIL.Image.Image
    assert image.mode == "RGB"
    return image


def reason(path):
    with pytest.raises(BrokenFile) as caught:
        IMAGE.decode(str(path))
    return caught.value.reason


def png16(path, colour_type, samples):
    """Write a 16-bit PNG, which Pillow cannot for every colour type; ``samples`` uint16 [h, w, channels]."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    h, w, _ = samples.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", w, h, 16, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize(
    ("suffix", "tolerance"), [("png", 0), ("bmp", 0), ("tif", 0), ("gif", 0), ("webp", 12), ("jpg", 12), ("jfif", 12)]
)
def test_every_format(tmp_path, suffix, tolerance):
    path = tmp_path / f"x.{suffix}"
    picture().save(path, format="JPEG" if suffix == "jfif" else None)
    assert path.suffix in IMAGE.suffixes
    image = decoded(path)
    assert IMAGE.inspect(str(path)) == (H, W)
    assert np.abs(quarters(image) - COLOURS).max() <= tolerance


@pytest.mark.parametrize("suffix", ["P.png", "P.gif", "P.tif", "P.bmp", "CMYK.jpg", "CMYK.tif"])
def test_palettes_and_cmyk(tmp_path, suffix):
    picture(suffix.partition(".")[0]).save(tmp_path / suffix)
    assert np.abs(quarters(decoded(tmp_path / suffix)) - COLOURS).max() <= (12 if suffix == "CMYK.jpg" else 0)


@pytest.mark.parametrize(("mode", "suffix"), [("L", "png"), ("L", "jpg"), ("L", "tif"), ("LA", "png"), ("1", "png")])
def test_grey(tmp_path, mode, suffix):
    levels = np.array([[0, 255], [255, 0]] if mode == "1" else [[0, 80], [160, 255]], dtype=np.uint8)
    grey = np.repeat(np.repeat(levels, 20, 0), 32, 1)
    PIL.Image.fromarray(grey).convert(mode).save(tmp_path / f"x.{suffix}")
    assert np.abs(quarters(decoded(tmp_path / f"x.{suffix}")) - levels[..., None]).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_of_16_bits_is_scaled_not_clipped(tmp_path, suffix):
    levels = np.array([[0, 257 * 80], [257 * 160 + 100, 65535]], dtype=np.uint16)
    PIL.Image.fromarray(np.repeat(np.repeat(levels, 20, 0), 32, 1)).save(tmp_path / f"x.{suffix}")
    expected = np.array([[0, 80], [160, 255]])
    assert (quarters(decoded(tmp_path / f"x.{suffix}")) == expected[..., None]).all()


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (4, 2), (2, 3), (6, 4)])
def test_png_of_16_bits_of_every_colour_type(tmp_path, colour_type, channels):
    samples = np.full((8, 8, channels), 257 * 200, dtype=np.uint16)
    if channels in (2, 4):
        samples[..., -1] = 65535
    samples[:, 4:, 0] = 257 * 40
    png16(tmp_path / "x.png", colour_type, samples)
    x = np.asarray(decoded(tmp_path / "x.png"))
    assert x[0, 0].tolist() == [200, 200, 200]
    assert x[0, 7].tolist() == ([40, 40, 40] if channels < 3 else [40, 200, 200])


def test_integers_of_32_bits(tmp_path):
    PIL.Image.fromarray(np.full((8, 8), 257 * 100, dtype=np.int32)).save(tmp_path / "small.tif")
    PIL.Image.fromarray(np.full((8, 8), 10**6, dtype=np.int32)).save(tmp_path / "large.tif")
    assert (np.asarray(decoded(tmp_path / "small.tif")) == 100).all()
    assert reason(tmp_path / "large.tif") == "integer pixels of more than 16 bits, whose range is unknown"


def test_floats_are_refused(tmp_path):
    PIL.Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(tmp_path / "x.tif")
    assert reason(tmp_path / "x.tif") == "floating-point pixels, whose range is unknown"


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_alpha_lies_on_white(tmp_path, suffix):
    image = picture("RGBA")
    image.putalpha(PIL.Image.fromarray(np.repeat([[255, 0]], H, 0).repeat(W // 2, 1).astype(np.uint8)))
    image.save(tmp_path / f"x.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    expected = COLOURS.copy()
    expected[:, 1] = 255
    assert (quarters(decoded(tmp_path / f"x.{suffix}")) == expected).all()


def test_half_transparent_grey_is_mixed_with_white(tmp_path):
    PIL.Image.fromarray(np.full((8, 8, 2), [100, 128], dtype=np.uint8)).save(tmp_path / "x.png")
    assert np.abs(np.asarray(decoded(tmp_path / "x.png")).astype(int) - 177).max() <= 1


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_becomes_white(tmp_path, mode):
    image = picture(mode)
    red = image.getpixel((0, 0))
    image.save(tmp_path / "x.png", transparency=red)
    assert quarters(decoded(tmp_path / "x.png"))[0, 0].tolist() == [255, 255, 255]
    assert quarters(decoded(tmp_path / "x.png"))[0, 1].tolist() != [255, 255, 255]


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_the_first_frame_of_several(tmp_path, suffix):
    more = [PIL.Image.new("RGB", (W, H), colour) for colour in ("black", "white")]
    options = {"lossless": True} if suffix == "webp" else {}
    picture().save(tmp_path / f"x.{suffix}", save_all=True, append_images=more, **options)
    assert (quarters(decoded(tmp_path / f"x.{suffix}")) == COLOURS).all()


# What each EXIF orientation does to the stored picture (EXIF 2.32, tag 0x0112), as numpy would.
ORIENTED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("orientation", ORIENTED)
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_exif_orientation(tmp_path, suffix, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    picture().save(tmp_path / f"x.{suffix}", exif=exif)
    image = decoded(tmp_path / f"x.{suffix}")
    expected = ORIENTED[orientation](QUARTERS)
    assert IMAGE.inspect(str(tmp_path / f"x.{suffix}")) == expected.shape[:2]
    assert np.abs(quarters(image) - quarters(expected)).max() <= 12


def test_broken_exif_does_not_break_the_picture(tmp_path):
    for i, exif in enumerate([b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x02A\0\0\0"]):
        picture().save(tmp_path / f"{i}.jpg", exif=exif)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert np.abs(quarters(decoded(tmp_path / f"{i}.jpg")) - COLOURS).max() <= 12


def test_a_wrong_suffix_is_harmless(tmp_path):
    picture().save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.jpg")
    assert (quarters(decoded(tmp_path / "x.jpg")) == COLOURS).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "tif", "webp"])
def test_truncated(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    noise(H, W).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert reason(path) == "truncated" if suffix != "webp" else reason(path)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_what_is_no_picture(tmp_path):
    (tmp_path / "empty.png").touch()
    assert reason(tmp_path / "empty.png") == "empty file"
    for text in ("hello, I am a text", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"):
        (tmp_path / "text.jpg").write_text(text)
        assert reason(tmp_path / "text.jpg") == "not an image: cannot identify image file"
    assert reason(tmp_path / "gone.png") == "no such file"
    assert reason(tmp_path) == "is a folder"


@pytest.mark.parametrize(("height", "width"), [(14_000, 14_000), (13_000, 13_800), (60_000, 60_000)])
def test_absurdly_large_pictures_are_refused_by_their_header(tmp_path, height, width, monkeypatch):
    path = tmp_path / "x.bmp"
    PIL.Image.new("RGB", (8, 8)).save(path)
    data = bytearray(path.read_bytes())
    data[18:26] = struct.pack("<ii", width, height)
    path.write_bytes(data)
    for limit in (PIL.Image.MAX_IMAGE_PIXELS, None):
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
        assert reason(path) == "absurdly large: more than 178 million pixels"


def test_large_but_allowed_pictures_pass_without_a_warning(tmp_path, monkeypatch):
    picture().save(tmp_path / "x.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", H * W - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decoded(tmp_path / "x.png").size == (W, H)


def test_decode_is_picklable_and_guardable(tmp_path):
    picture().save(tmp_path / "x.png")
    decode = pickle.loads(pickle.dumps(IMAGE.decode))
    assert guarded(decode, str(tmp_path / "x.png"), 30.0).size == (W, H)


RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (97, 61), (224, 224), (256, 256), (33, 500), (1, 7)])
@pytest.mark.parametrize("size", [224, 32])
def test_evaluation_is_resize_and_centre_crop(shape, size):
    image = noise(*shape)
    ours = IMAGE.eval_transform(ImageSignal(size=size, **RAW))(image)
    # round(size / 0.875) is the side that torchvision is given in MAE's evaluation: 256 for 224.
    resize = v2.Resize(round(size / 0.875), interpolation=InterpolationMode.BICUBIC, antialias=True)
    theirs = v2.functional.pil_to_tensor(v2.CenterCrop(size)(resize(image))) / 255
    assert ours.shape == (3, size, size)
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize("size", [(32, 96), (96, 32), (48, 48)])
@pytest.mark.parametrize("ratio", [0.5, 0.875, 1.0])
@pytest.mark.parametrize("shape", [(100, 100), (100, 301), (301, 100)])
def test_the_centre_crop_keeps_aspect_and_place_and_fills_its_share(shape, size, ratio):
    left, top, right, bottom = centre_box(*shape, size, ratio)
    assert 0 <= left < right <= shape[1]
    assert 0 <= top < bottom <= shape[0]
    assert (right - left) / (bottom - top) == pytest.approx(size[1] / size[0], rel=0.02)
    assert (left + right) / 2 == pytest.approx(shape[1] / 2, abs=3.2)
    assert (top + bottom) / 2 == pytest.approx(shape[0] / 2, abs=3.2)
    assert max((right - left) / shape[1], (bottom - top) / shape[0]) == pytest.approx(ratio, abs=0.02)


def test_evaluation_of_an_oblong_keeps_rows_and_columns_apart():
    x = IMAGE.eval_transform(ImageSignal(size=(20, 32), resize_ratio=1.0, **RAW))(picture())
    assert x.shape == (3, 20, 32)
    assert (quarters(x.permute(1, 2, 0) * 255) == COLOURS).all()


def test_one_pixel_is_enough():
    signal = ImageSignal(size=16, **RAW)
    x = IMAGE.eval_transform(signal)(PIL.Image.new("RGB", (1, 1), (255, 0, 0)))
    assert torch.equal(x, torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 16, 16))


def test_normalised_and_back():
    signal = ImageSignal(size=(20, 32), resize_ratio=1.0)
    x = IMAGE.eval_transform(signal)(picture())
    assert x.is_contiguous()
    red = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0 - 0.406) / 0.225]
    assert x[:, 0, 0].tolist() == pytest.approx(red, rel=1e-5)
    back = IMAGE.picture(x, signal)
    assert back.dtype == np.uint8
    assert back.shape == (20, 32, 3)
    assert (quarters(back) == COLOURS).all()
    assert IMAGE.picture(torch.full((3, 2, 2), 99.0), signal).max() == 255


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": [0, 224]}, r"size: every number must be greater than 0, but got \[0, 224\]"),
        ({"size": "large"}, "size: input should be a valid tuple, but got 'large'"),
        ({"size": [224]}, "size.*1.*"),
        ({"crop_scale": [0.8, 0.2]}, r"crop_scale: is \[least, greatest\].*\[0\.8, 0\.2\]"),
        ({"crop_scale": [0.2, 1.5]}, "crop_scale: is a fraction"),
        ({"crop_ratio": [0, 1]}, r"crop_ratio: is \[least, greatest\]"),
        ({"std": [0.2, 0.2, 0.0]}, "std: every number must be greater than 0"),
        ({"resize_ratio": 1.1}, "resize_ratio: is the share"),
        ({"draft": "half"}, "draft: input should be a valid boolean"),
        ({"augment": {"blurr": None}}, "'augment.blurr' is not a key; did you mean 'augment.blur'"),
        ({"crop_scael": [0.2, 1]}, "'crop_scael' is not a key; did you mean 'crop_scale'"),
    ],
)
def test_wrong_settings_get_a_sentence(settings, message):
    with pytest.raises(UserError, match=message):
        validate(ImageSignal, settings, "recipe")


def test_one_number_is_a_square():
    assert ImageSignal(size=48).size == (48, 48)
    assert ImageTokenizer(patch_size=8).patch_size == (8, 8)
    with pytest.raises(UserError, match="patch_size: both sides must be greater than 0"):
        validate(ImageTokenizer, {"patch_size": -1}, "recipe")


def test_tokenizer_follows_its_settings():
    settings = ImageTokenizer(patch_size=(8, 16), positions="learned", target="raw")
    tokenizer = IMAGE.tokenizer(ImageSignal(size=(32, 64)), settings, dim=24)
    assert tokenizer.grid == (4, 4)
    assert tokenizer.patch_dim == 8 * 16 * 3
    assert tokenizer.positions.kind == "learned"
    assert tokenizer.target_kind == "raw"
    with pytest.raises(ValueError, match=r"size \[30, 64\] is not a multiple of patch size \[8, 16\]"):
        IMAGE.tokenizer(ImageSignal(size=(30, 64)), settings, dim=24)


@pytest.mark.parametrize("value", [0, 9, 255])
def test_an_orientation_that_does_not_exist_means_upright(tmp_path, value):
    exif = PIL.Image.Exif()
    exif[0x0112] = value
    path = tmp_path / "x.jpg"
    noise(30, 60).save(path, exif=exif, quality=95)
    assert decoded(path).size == (60, 30)
    signal = ImageSignal(size=(16, 48), buckets=[[48, 16]])
    assert IMAGE.bucket(str(path), signal) == 0


def test_a_picture_that_a_person_opened_is_turned_upright_too(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "x.png"
    noise(40, 60).save(path, exif=exif)
    transform = IMAGE.eval_transform(ImageSignal(size=24))
    assert torch.equal(transform(PIL.Image.open(path)), transform(decoded(path)))
