"""Overlays, dots, sheets: the right pixels in the right colours."""

import numpy as np
import pytest

from tasks.films import (
    ALIKE,
    COLOURS,
    GREY,
    PALETTE,
    RIM,
    STRENGTH,
    dots,
    outline,
    overlay,
    palette,
    resized_mask,
    sheet,
    shrunk,
    spread,
)  # fmt: skip
from tasks.panels_page import draw


def test_the_inside_is_tinted_the_outline_is_full_with_a_dark_rim_and_the_rest_untouched():
    frame, mask = np.full((20, 30, 3), 100, np.uint8), np.zeros((20, 30), np.uint8)
    mask[5:15, 10:20] = 2
    drawn = overlay(frame, mask)
    assert (drawn[4, 10:20] == RIM).all()
    assert (drawn[16:] == 100).all()
    assert (drawn[:, :9] == 100).all()
    assert (drawn[10, 15] == np.round((1 - STRENGTH) * 100 + STRENGTH * COLOURS[1])).all()
    assert (drawn[5, 10:20] == COLOURS[1]).all()
    assert (frame == 100).all()


def test_an_outline_lies_inside_its_object_and_is_wider_on_large_frames():
    mask = np.zeros((30, 40), np.uint8)
    mask[10:20, 10:20], mask[10:20, 20:25] = 1, 2
    edge = outline(mask)
    assert not edge[mask == 0].any()
    assert edge[15, [10, 19, 20, 24]].all()
    assert not edge[15, [11, 18, 22]].any()
    large = outline(mask.repeat(12, 0).repeat(12, 1))
    assert large[180, [120, 121]].all()
    assert not large[180, [119, 122]].any()


def test_an_object_that_fills_the_frame_has_no_outline_at_its_border():
    assert not outline(np.ones((5, 6), np.uint8)).any()


def test_colours_belong_to_numbers_and_come_again():
    assert (PALETTE[[1, 1 + len(COLOURS)]] == COLOURS[0]).all()
    assert (PALETTE[255] == GREY).all()
    apart = np.linalg.norm(COLOURS[:, None].astype(float) - COLOURS, axis=-1) + 1000 * np.eye(len(COLOURS))
    assert apart.min() > 60


def test_a_persons_colours_are_taken_and_dark_ones_made_brighter():
    table = palette({2: (0, 0, 64), 5: (255, 200, 0)})
    assert table[2].tolist() == [0, 0, 220]
    assert table[5].tolist() == [255, 200, 0]
    assert (np.delete(table, [2, 5], 0) == np.delete(PALETTE, [2, 5], 0)).all()


@pytest.mark.parametrize(
    "own", [{1: (64, 0, 0), 2: (128, 0, 0)}, {1: (0, 0, 0)}, {1: (200, 0, 0), 2: (200, 0, ALIKE - 1)}]
)
def test_colours_that_could_not_be_told_apart_are_not_taken(own):
    assert (palette(own) == PALETTE).all()


def test_dots_are_filled_or_crosses_with_a_white_rim():
    frame = np.zeros((60, 80, 3), np.uint8)
    drawn = dots(
        frame, np.array([[20.0, 30.0], [50.0, 30.0], [np.nan, 3.0]]), np.array([1, 2, 1]), np.array([True, False, True])
    )
    assert (drawn[30, 20] == COLOURS[0]).all()
    assert (drawn[30, 23] > 200).all()
    # The middle and the arms of the cross; between these is the frame.
    assert (drawn[30, 50] == COLOURS[1]).all()
    assert (drawn[[28, 32], [48, 52]] == COLOURS[1]).all()
    assert not drawn[30, 54].any()
    assert not drawn[:20].any()


@pytest.mark.parametrize("place", [(-30.0, 5.0), (79.5, 59.5), (5.0, -30.0), (300.0, 300.0), (0.0, 0.0)])
def test_dots_at_and_beyond_the_border(place):
    drawn = dots(np.zeros((60, 80, 3), np.uint8), np.array([place]), np.array([1]))
    assert drawn.any() == (-2 <= place[0] <= 82 and -2 <= place[1] <= 62)


def test_frames_shrink_and_never_grow():
    assert shrunk(np.zeros((480, 854, 3), np.uint8), 427).shape == (240, 427, 3)
    assert shrunk(np.zeros((10, 20, 3), np.uint8), 427).shape == (10, 20, 3)
    assert resized_mask(np.full((4, 6), 7, np.uint8), np.zeros((2, 3, 3), np.uint8)).tolist() == [[7] * 3] * 2


@pytest.mark.parametrize(
    ("count", "chosen"), [(1, [0]), (3, [0, 1, 2]), (8, list(range(8))), (15, list(range(0, 15, 2)))]
)
def test_frames_are_spread_from_the_first_to_the_last(count, chosen):
    assert spread(count) == chosen


def test_a_sheet_has_every_frame_in_its_row_and_leaves_gaps():
    red, blue = np.full((30, 40, 3), (255, 0, 0), np.uint8), np.full((30, 40, 3), (0, 0, 255), np.uint8)
    panel = sheet("name", "note", [0, 3, 6, 9, 12], {"found": [red] * 5, "truth": [blue, None, blue, None, None]})
    assert [len(block.lines[0].shots) for block in panel.blocks] == [4, 1]
    assert panel.blocks[1].lines[0].shots[0].caption == "frame 12"
    page = draw(panel)
    side = 240 * 320  # pictures are enlarged by whole factors to the room that they have
    assert (page == (255, 0, 0)).all(-1).sum() == 5 * side
    assert (page == (0, 0, 255)).all(-1).sum() == 2 * side
