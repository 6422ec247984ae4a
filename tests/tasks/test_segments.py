"""J, F and the mean IoU against their definitions written out slowly, and against values known by hand."""

import math

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from tasks.segments import (
    VOID,
    boundary_f,
    confusion,
    davis_scores,
    draws,
    jaccard,
    mean_iou,
    object_ids,
    object_scores,
    part_scores,
    score,
    statistics,
)


def square(y, x, side=10, size=(40, 60)):
    mask = np.zeros(size, bool)
    mask[y : y + side, x : x + side] = True
    return mask


def slow_contour(mask):
    h, w = mask.shape
    edge = np.zeros((h, w), bool)
    for y in range(h):
        for x in range(w):
            right = x + 1 < w and mask[y, x] != mask[y, x + 1]
            below = y + 1 < h and mask[y, x] != mask[y + 1, x]
            both = x + 1 < w and y + 1 < h and mask[y, x] != mask[y + 1, x + 1]
            edge[y, x] = right or below or both
    return edge


def slow_f(truth, found, void=None, tolerance=0.008):
    """The definition by dilation with the disk x^2 + y^2 <= r^2, Perazzi et al., section 4."""
    if void is not None:
        truth, found = truth & ~void, found & ~void
    r = math.ceil(tolerance * np.linalg.norm(truth.shape))
    y, x = np.mgrid[-r : r + 1, -r : r + 1]
    disk = x**2 + y**2 <= r**2
    a, b = slow_contour(truth), slow_contour(found)
    if not a.any() or not b.any():
        return float(a.any() == b.any())
    precision, recall = (b & binary_dilation(a, disk)).sum() / b.sum(), (a & binary_dilation(b, disk)).sum() / a.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def blobs(rng, size, coarse):
    """Random masks of ``coarse`` pixels' grain, which touch the picture's borders."""
    h, w = size
    grains = rng.random((h // coarse + 1, w // coarse + 1)) < 0.4
    return np.kron(grains, np.ones((coarse, coarse), bool))[:h, :w]


@pytest.mark.parametrize("tolerance", [0.008, 0.03, 0.1])
@pytest.mark.parametrize("size", [(33, 47), (20, 91), (1, 8), (9, 1)])
def test_f_equals_the_definition_by_dilation(size, tolerance):
    rng = np.random.default_rng(0)
    for coarse in (1, 3, 8):
        truth, found, void = blobs(rng, size, coarse), blobs(rng, size, coarse), blobs(rng, size, 2)
        assert boundary_f(truth, found, tolerance=tolerance) == slow_f(truth, found, tolerance=tolerance)
        assert boundary_f(truth, found, void, tolerance) == slow_f(truth, found, void, tolerance)
        sparse = found & (rng.random(size) < 0.1)
        assert boundary_f(truth, sparse, tolerance=tolerance) == slow_f(truth, sparse, tolerance=tolerance)


@pytest.mark.parametrize("place", [(0, 0), (0, 50), (30, 0), (30, 50), (1, 1), (29, 49)])
def test_f_equals_the_definition_at_the_borders(place):
    truth, found = square(*place), square(12, 20)
    for a, b in ((truth, found), (found, truth), (truth, square(place[0] // 2, place[1] // 2))):
        assert boundary_f(a, b, tolerance=0.05) == slow_f(a, b, tolerance=0.05)


def test_j_of_a_shifted_square():
    """Ten by ten shifted by 3: 70 pixels in both, 130 in either."""
    assert jaccard(square(5, 5), square(5, 8)) == 70 / 130


def test_f_of_a_shift_within_and_beyond_the_tolerance():
    """A diagonal of 72 pixels at 0.04 makes 3 pixels."""
    assert boundary_f(square(5, 5), square(5, 8), tolerance=0.04) == 1
    # Four pixels to the right: the vertical sides lose each other, the horizontal ones only 1 pixel of their ends, and
    # what each has to say about the other is the same.
    beyond = boundary_f(square(5, 5), square(5, 9), tolerance=0.04)
    assert beyond == slow_f(square(5, 5), square(5, 9), tolerance=0.04)
    assert 0.4 < beyond < 0.7
    assert boundary_f(square(5, 5), square(25, 40), tolerance=0.04) == 0


def test_empty_masks():
    some, none = square(5, 5), np.zeros((40, 60), bool)
    assert (jaccard(none, none), boundary_f(none, none)) == (1, 1)
    assert (jaccard(some, none), boundary_f(some, none)) == (0, 0)
    assert (jaccard(none, some), boundary_f(none, some)) == (0, 0)


def test_a_mask_of_everything_has_no_contour():
    every = np.ones((40, 60), bool)
    assert boundary_f(every, every) == boundary_f(every, np.zeros_like(every)) == 1
    assert boundary_f(every, square(5, 5)) == 0


def test_what_lies_in_void_does_not_count():
    truth, found, void = square(5, 5), square(5, 5) | square(20, 40), square(20, 40)
    assert jaccard(truth, found) == 0.5
    assert jaccard(truth, found, void) == 1
    assert boundary_f(truth, found) < 1
    assert boundary_f(truth, found, void) == 1
    assert jaccard(void, void, void) == 1


def test_decay_by_hand():
    """Eight values are cut at 1, 3 (2.75), 5 (4.5 and a bit, rounded up), 6 (6.25) and 8."""
    values = np.array([1.0, 0.9, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2])
    got = statistics(values)
    assert got.mean == pytest.approx(4.7 / 8)
    assert got.recall == 4 / 8  # 0.5 itself is not above
    assert got.decay == pytest.approx((1.0 + 0.9 + 0.8) / 3 - (0.4 + 0.3 + 0.2) / 3)


def test_decay_rounds_halves_up_as_the_toolkit_does():
    """Three values are cut at 1, 2 (1.5), 2, 3 (2.5, which would be 2 if halves went to even numbers) and 3."""
    assert statistics(np.array([1.0, 0.4, 0.1])).decay == pytest.approx((1.0 + 0.4) / 2 - 0.1)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_few_frames_have_statistics_too(n):
    assert statistics(np.full(n, 0.8)) == pytest.approx((0.8, 1, 0))


def test_unknown_values_are_left_out_of_the_means_and_none_is_an_error():
    assert statistics(np.array([0.2, np.nan, 0.4])).mean == pytest.approx(0.3)
    assert math.isnan(statistics(np.array([np.nan])).mean)
    with pytest.raises(ValueError, match="at least one"):
        statistics(np.array([]))


def film(*squares):
    """Frames uint8 in which object i + 1 is at squares[i][frame], None where it is gone."""
    frames = np.zeros((len(squares[0]), 40, 60), np.uint8)
    for number, places in enumerate(squares, start=1):
        for frame, place in zip(frames, places, strict=True):
            if place is not None:
                frame[square(*place)] = number
    return frames


def test_objects_are_scored_without_the_first_and_the_last_frame():
    truth = film([(5, 5)] * 5, [(25, 40)] * 5)
    found = film([(25, 5), (5, 5), (5, 8), (5, 5), (25, 5)], [(25, 40), (25, 40), None, (25, 40), None])
    got = object_scores(truth, found)
    assert list(got) == [1, 2]
    assert got[1].jaccard.tolist() == [1, 70 / 130, 1]
    assert got[2].jaccard.tolist() == got[2].boundary.tolist() == [1, 0, 1]
    assert got[2].statistics()["J"] == pytest.approx((2 / 3, 2 / 3, -0.5))
    assert got[1].boundary[1] == slow_f(truth[2] == 1, found[2] == 1)


def test_a_vanished_object_is_right_where_nothing_is_found():
    truth = film([(5, 5), None, None, None])
    assert object_scores(truth, film([(5, 5), None, (5, 5), None]))[1].jaccard.tolist() == [1, 0]


def test_void_pixels_of_a_frame_are_left_out_of_its_scores():
    truth, found = film([(5, 5)] * 4), film([(5, 5), (5, 8), (5, 8), (5, 5)])
    truth[1][square(5, 8) & ~square(5, 5)] = VOID
    got = object_scores(truth, found)[1]
    assert got.jaccard.tolist() == [70 / 100, 70 / 130]
    assert got.boundary[0] == slow_f(truth[1] == 1, found[1] == 1, truth[1] == VOID)
    assert got.boundary[0] != got.boundary[1]


def test_objects_are_those_of_the_first_frame():
    first = np.array([[0, 3], [VOID, 1]], np.uint8)
    assert list(object_ids(first)) == [1, 2, 3]
    assert not object_ids(np.full((2, 2), VOID, np.uint8))


@pytest.mark.parametrize("t", [1, 2])
def test_too_few_frames_to_score_are_said(t):
    with pytest.raises(ValueError, match=f"need 3 annotated ones, not {t}"):
        object_scores(film([(5, 5)] * t), film([(5, 5)] * t))


def test_masks_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="of one shape"):
        object_scores(film([(5, 5)] * 4), film([(5, 5)] * 5))
    with pytest.raises(ValueError, match="t > 1"):
        confusion(np.zeros((1, 4, 4), np.uint8), np.zeros((1, 4, 4), np.uint8), 2)


def test_the_table_is_the_mean_over_objects_not_over_sequences():
    truth = film([(5, 5)] * 5, [(25, 40)] * 5)
    one = object_scores(truth, truth)
    other = object_scores(film([(5, 5)] * 5), film([(5, 5)] * 1 + [(25, 40)] * 4))
    got = davis_scores([one, other])
    assert got["J_mean"].value == got["F_mean"].value == got["J&F_mean"].value == pytest.approx(2 / 3)
    assert list(got) == ["J&F_mean", "J_mean", "J_recall", "J_decay", "F_mean", "F_recall", "F_decay"]
    # Drawing two of the two, one of them may be drawn twice.
    assert (got["J_mean"].low, got["J_mean"].high) == (0, 1)


def test_the_table_averages_each_statistic():
    rng = np.random.default_rng(0)
    films = [[film([(int(y), 5 + 2 * i) for y in rng.integers(3, 9, 6)]) for _ in range(2)] for i in range(3)]
    scored = [object_scores(*pair) for pair in films]
    got = davis_scores(scored, resamples=50)
    for measure in "JF":
        rows = [objects[1].statistics()[measure] for objects in scored]
        for name in ("mean", "recall", "decay"):
            mean = np.mean([getattr(row, name) for row in rows])
            assert got[f"{measure}_{name}"].value == pytest.approx(mean), (measure, name)
    assert got["J&F_mean"].value == pytest.approx((got["J_mean"].value + got["F_mean"].value) / 2)
    assert got["J_mean"].value != got["F_mean"].value
    assert davis_scores(scored, resamples=50) == got
    with pytest.raises(ValueError, match="needs an object"):
        davis_scores([*scored, {}])


def test_intervals_are_those_of_the_plain_bootstrap():
    values = np.random.default_rng(1).random(12)
    got = score(draws(12, resamples=4000) @ values / 12)
    rng = np.random.default_rng(2)
    low, high = np.quantile([rng.choice(values, 12).mean() for _ in range(4000)], [0.025, 0.975])
    assert got == pytest.approx((values.mean(), low, high), abs=0.015)


def test_confusion_counts_pixels_without_the_first_frame_and_void():
    truth = np.array([[[1, 1, 1, 1]], [[0, 1, 1, VOID]], [[2, 2, 7, 0]]], np.uint8)
    found = np.array([[[0, 0, 0, 0]], [[0, 1, 2, 1]], [[2, 0, 1, 0]]], np.uint8)
    assert confusion(truth, found, 3).tolist() == [[2, 0, 0], [0, 1, 1], [1, 0, 1]]
    with pytest.raises(ValueError, match="class 2 was found"):
        confusion(truth % 2, found, 2)


def test_mean_iou_leaves_out_classes_that_never_occur_and_counts_the_background():
    counts = np.array([[6, 0, 2, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    miou, per_class = mean_iou(counts)
    assert per_class[:3].tolist() == [6 / 9, 3 / 4, 0]
    assert math.isnan(per_class[3])
    assert miou == pytest.approx((6 / 9 + 3 / 4 + 0) / 3)


def test_parts_are_pooled_over_sequences():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 4, (2, 3, 5, 6, 7)).astype(np.uint8)
    each = [confusion(a, b, 5) for a, b in zip(truth, found, strict=True)]
    got, per_class = part_scores(each)
    assert got.value == pytest.approx(mean_iou(sum(each))[0])
    np.testing.assert_allclose(per_class, mean_iou(sum(each))[1])
    assert got.low < got.value < got.high
    assert part_scores([each[0]])[0] == pytest.approx((mean_iou(each[0])[0],) * 3)
