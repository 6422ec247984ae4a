"""Masks as people draw them: palettes, greys and colours, hard and soft, and every mistake."""

import io

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFilter
import pytest
from marked import texture

from mmssl.errors import UserError
from tasks.first_mask import read_first_mask
from tasks.sequences import write_mask

SIZE = 120, 160
LEFT, RIGHT = (20, 20, 70, 80), (60, 40, 110, 100)


def drawn(mode, *discs, smooth=8, ground=0):
    """Draw discs (box, colour) over each other, each pixel the mean of ``smooth`` x ``smooth`` smaller ones."""
    large = PIL.Image.new(mode, (SIZE[1] * smooth, SIZE[0] * smooth), ground)
    for box, colour in discs:
        PIL.ImageDraw.Draw(large).ellipse([smooth * side for side in box], fill=colour)
    return large.resize(SIZE[::-1], PIL.Image.Resampling.BOX)


def compressed(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return PIL.Image.open(file).convert(image.mode)


def numbers(*discs):
    """Return 1, 2 ... for the discs, as hard edges have them."""
    return np.asarray(drawn("L", *((box, number) for number, box in enumerate(discs, start=1)), smooth=1))


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
    mask, notes, _ = read_first_mask(save(tmp_path / "m.png", soft), (40, 40))
    assert np.array_equal(mask, soft >= 128)
    assert "soft edges" in notes[0]


def test_areas_of_nearly_one_colour_are_one_where_there_are_many(tmp_path):
    soft = np.array(drawn("L", (LEFT, 255)))
    soft[40:60, 35:55] = 250
    mask, _, _ = read_first_mask(save(tmp_path / "m.png", soft), SIZE)
    assert np.array_equal(mask, soft >= 128)


def test_a_thin_soft_stroke_is_cut_too(tmp_path):
    stroke = drawn("L", ((10, 10, 150, 11), 255))
    mask, notes, _ = read_first_mask(save(tmp_path / "m.png", np.asarray(stroke)), SIZE)
    assert np.array_equal(mask, np.asarray(stroke) >= 128)
    assert "cut at 128" in notes[0]


RED, BLUE, DARK = (255, 0, 0), (0, 90, 255), (128, 0, 0)


@pytest.mark.parametrize(
    ("image", "discs"),
    [
        (drawn("L", (LEFT, 255)), [LEFT]),
        (drawn("L", (LEFT, 255), smooth=2), [LEFT]),  # three greys between, few enough for objects
        (drawn("L", (LEFT, 255)).point(lambda grey: min(grey, 254)), [LEFT]),
        (drawn("L", (LEFT, 128), (RIGHT, 255)), [LEFT, RIGHT]),
        (drawn("RGB", (LEFT, BLUE), (RIGHT, RED)), [LEFT, RIGHT]),
        (drawn("RGB", (LEFT, (0, 128, 0)), (RIGHT, DARK)), [LEFT, RIGHT]),
        (drawn("RGB", (LEFT, BLUE), (RIGHT, RED)).quantize(64), [LEFT, RIGHT]),
        (compressed(drawn("L", (LEFT, 255), smooth=1), 80), [LEFT]),
        (compressed(drawn("RGB", (LEFT, BLUE), (RIGHT, RED), smooth=1), 40), [LEFT, RIGHT]),
        (drawn("L", (LEFT, 255)).filter(PIL.ImageFilter.GaussianBlur(4)), [LEFT]),
    ],
    ids=["white", "few", "254", "greys", "colours", "dark", "palette", "jpeg", "jpeg colours", "feather"],
)
def test_soft_edges_are_no_objects(tmp_path, image, discs):
    image.save(tmp_path / "m.png")
    mask, notes, _ = read_first_mask(tmp_path / "m.png", SIZE)
    held = np.unique(mask)[1:]
    assert len(held) == len(discs)
    assert ((mask != 0) == (numbers(*discs) != 0)).mean() > 0.98
    assert (np.searchsorted(held, mask, side="right") == numbers(*discs)).mean() > 0.98
    assert any("soft edges" in note for note in notes)


def test_hard_edges_stay_to_the_pixel_and_thin_lines_of_their_own_colour_too(tmp_path):
    lines = numbers(LEFT, RIGHT).copy()
    lines[5], lines[7:9, 3:5] = 3, 4
    colours = np.array([(0, 0, 0), BLUE, RED, (0, 255, 0), (255, 255, 0)], np.uint8)
    mask, notes, own = read_first_mask(save(tmp_path / "m.png", colours[lines]), SIZE)
    back = {number: np.flatnonzero((colours == colour).all(1))[0] for number, colour in own.items()}
    assert np.array_equal(np.array([0, *back.values()])[mask], lines)
    assert not any("soft edges" in note for note in notes)


def test_numbers_that_are_greys_stay_as_they_are_and_void_is_background(tmp_path):
    ids = numbers(LEFT, RIGHT).copy()
    ids[0, 1] = 3
    path = save(tmp_path / "m.png", ids)
    assert np.array_equal(read_first_mask(path, SIZE).ids, ids)
    void = ids.copy()
    void[:4] = 255
    mask, notes, _ = read_first_mask(save(path, void), SIZE)
    assert np.array_equal(mask, np.where(void == 255, 0, void))
    assert any("nobody knows" in note for note in notes)


def palette_png(path, indices, colours, **options):
    image = PIL.Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette(np.array(colours, np.uint8).tobytes())
    image.save(path, **options)
    return path


def test_the_background_of_a_palette_is_black_or_transparent_wherever_it_is(tmp_path):
    ids, path = numbers(LEFT, RIGHT), tmp_path / "m.png"
    turned = np.array([2, 0, 1])[ids]  # background is index 2
    mask, notes, own = read_first_mask(palette_png(path, turned, [RED, BLUE, (0, 0, 0)]), SIZE)
    assert np.array_equal(mask, np.array([0, 2, 1])[ids])
    assert own == {1: BLUE, 2: RED}
    assert "background is index 2, which is black" in notes[0]
    mask, notes, _ = read_first_mask(palette_png(path, turned, [RED, BLUE, (9, 9, 9)], transparency=2), SIZE)
    assert np.array_equal(mask, np.array([0, 2, 1])[ids])
    mask, notes, own = read_first_mask(palette_png(path, ids, [(200, 200, 200), BLUE, RED]), SIZE)
    assert np.array_equal(mask, ids)
    assert own == {1: BLUE, 2: RED}
    assert "no colour is black, so background is index 0" in notes[0]


def test_every_object_is_listed_with_its_share_and_what_looks_inverted_is_asked(tmp_path):
    ids = numbers(LEFT, RIGHT)
    colours = np.array([(0, 0, 0), BLUE, RED], np.uint8)
    _, notes, _ = read_first_mask(save(tmp_path / "m.png", colours[ids]), SIZE)
    shares = [f"{(ids == number).mean():.2%} of the frame" for number in (1, 2)]
    assert all(share in notes[-1] for share in shares)
    assert "1 (colour (0, 90, 255)" in notes[-1]
    inverted = np.where(ids == 0, 255, 0).astype(np.uint8)
    _, notes, own = read_first_mask(save(tmp_path / "m.png", inverted), SIZE)
    assert f"marks {(ids == 0).mean():.0%} of the frame; is it inverted?" in notes[-1]
    assert own == {}


def test_a_mask_of_the_same_proportions_is_scaled_and_it_is_said(tmp_path):
    small = np.zeros((6, 8), np.uint8)
    small[2:4, 3:6] = 5
    write_mask(tmp_path / "m.png", small)
    mask, notes, _ = read_first_mask(tmp_path / "m.png", (12, 16))
    assert np.array_equal(mask, small.repeat(2, 0).repeat(2, 1))
    assert "8 x 6 to 16 x 12" in notes[0]


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.zeros((6, 8), np.uint8), "marks nothing"),
        (np.ones((8, 8), np.uint8), "other proportions"),
        (texture(6, 8), "48 colours, which are not flat"),
        (np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000, "48 colours, which are not flat"),
    ],
)
def test_a_mask_that_says_nothing_clear_is_a_mistake(tmp_path, pixels, words):
    with pytest.raises(UserError, match=words):
        read_first_mask(save(tmp_path / "m.png", pixels), (6, 8))
