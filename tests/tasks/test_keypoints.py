"""PCK against its published definition written out slowly, and points through heat maps and back."""

import math

import numpy as np
import pytest

from tasks.keypoints import (
    from_heatmaps,
    pck,
    pck_scores,
    scales,
    tally,
    to_heatmaps,
    tracked,
)

GRID, SIZE = (14, 20), (224, 320)


def slow_pck(films, alphas):
    """The mean over joints of their share of frames, all films together, within alpha x 0.6 x the body's diagonal.

    As JHMDB is evaluated for label propagation: the first frame is given, and joints that have no label are left out.
    """
    joints = len(films[0][0][0])
    distances = [[] for _ in range(joints)]
    for truth, found, visible in films:
        for t in range(1, len(truth)):
            seen = [j for j in range(joints) if visible[0, j] and visible[t, j]]
            if not seen:
                continue
            xs, ys = [truth[t, j, 0] for j in seen], [truth[t, j, 1] for j in seen]
            box = 0.6 * math.dist((min(xs), min(ys)), (max(xs), max(ys)))
            for j in seen:
                distances[j].append(math.dist(truth[t, j], found[t, j]) / box)
    return {a: np.mean([np.mean(np.array(one) <= a) for one in distances if one]) for a in alphas}


@pytest.fixture
def films():
    rng = np.random.default_rng(0)
    made = []
    for t in (4, 9, 6):
        truth = rng.uniform(0, 100, (t, 5, 2))
        visible = rng.random((t, 5)) < 0.8
        visible[:, :2] = visible[0, 2 + t % 3] = True  # a box needs two points
        made.append((truth, truth + rng.normal(0, 12, truth.shape), visible))
    return made


def test_pck_equals_the_published_definition(films):
    alphas, names, body = (0.1, 0.2, 0.5), list("abcde"), np.ones(5, int)
    for film in films:
        truth, found, visible = film
        got = pck(truth, found, visible, scales(truth, visible, body), alphas)
        assert got == pytest.approx(slow_pck([film], alphas))
    counted = [(names, tally(a, b, seen, scales(a, seen, body), alphas)) for a, b, seen in films]
    pooled = pck_scores(counted, alphas)
    assert {f"PCK@{a:g}": v for a, v in slow_pck(films, alphas).items()} == pytest.approx(
        {name: one.value for name, one in pooled.items()}
    )
    assert all(one.low <= one.value <= one.high for one in pooled.values())
    assert 0 < pooled["PCK@0.1"].value < pooled["PCK@0.5"].value < 1


def test_a_point_at_the_distance_itself_is_right():
    """A box of 30 by 40 has the scale 30, so 0.1 of it are 3 pixels."""
    truth = np.tile([[0.0, 0.0], [30.0, 40.0]], (2, 1, 1))
    visible = np.ones((2, 2), bool)
    scale = scales(truth, visible, np.array([1, 1]))
    assert scale.tolist() == [[30, 30], [30, 30]]
    at, beyond = truth + np.array([3, 0]), truth + np.array([3.01, 0])
    assert pck(truth, at, visible, scale, [0.1]) == {0.1: 1}
    assert pck(truth, beyond, visible, scale, [0.1, 0.2]) == {0.1: 0, 0.2: 1}


def test_the_first_frame_is_left_out():
    truth = np.random.default_rng(0).uniform(0, 50, (2, 4, 2))
    found, visible = truth.copy(), np.ones((2, 4), bool)
    found[0] = 1000
    assert pck(truth, found, visible, scales(truth, visible, np.ones(4, int)), [0.1]) == {0.1: 1}


def test_points_that_were_not_given_or_cannot_be_seen_are_left_out_and_lost_ones_are_wrong():
    truth = np.random.default_rng(0).uniform(0, 50, (3, 3, 2))
    found = truth.copy()
    visible = np.array([[1, 1, 0], [1, 0, 1], [1, 1, 1]], bool)
    found[1, 0] = np.nan  # lost
    found[:, 2] = found[1, 1] = 999  # not given, not seen
    got = tally(truth, found, visible, np.full((3, 1), 100.0), [0.1])
    assert got.seen.tolist() == [2, 1, 0]
    assert got.right.tolist() == [[1, 1, 0]]
    assert pck(truth, found, visible, np.full((3, 1), 100.0), [0.1]) == {0.1: 0.75}
    assert tracked(visible).tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 0]]


def test_each_object_has_its_own_scale():
    truth = np.array([[[0, 0], [3, 4], [100, 100], [160, 180]]] * 2, float)
    visible = np.ones((2, 4), bool)
    visible[1, 3] = False
    got = scales(truth, visible, np.array([1, 1, 2, 2]))
    # One point alone has a box without extent.
    assert got.tolist() == [[3, 3, 60, 60], [3, 3, 0, 0]]
    visible[1, 2] = False
    assert np.isnan(scales(truth, visible, np.array([1, 1, 2, 2]))[1, 2:]).all()


def test_a_scale_of_nothing_takes_the_exact_place():
    truth, visible = np.ones((2, 1, 2)), np.ones((2, 1), bool)
    scale = scales(truth, visible, np.array([1]))
    assert pck(truth, truth, visible, scale, [0.1]) == {0.1: 1}
    assert pck(truth, truth + 0.01, visible, scale, [0.1]) == {0.1: 0}


def test_nothing_to_see_is_not_a_score():
    truth, visible = np.ones((2, 1, 2)), np.zeros((2, 1), bool)
    assert math.isnan(pck(truth, truth, visible, np.ones((2, 1)), [0.1])[0.1])


def test_points_of_a_kind_are_counted_together():
    """Two of four 'a', none of one 'b'."""
    truth = np.zeros((2, 3, 2))
    one = truth + np.array([[0, 0], [9, 9], [9, 9]])
    other = truth[:, :2] + np.array([[9, 9], [0, 0]])
    ones = np.ones((2, 3), bool)
    counted = [
        (("a", "a", "b"), tally(truth, one, ones, np.ones((2, 1)), [0.5])),
        (("a", "a"), tally(truth[:, :2], other, ones[:, :2], np.ones((2, 1)), [0.5])),
    ]
    assert pck_scores(counted, [0.5])["PCK@0.5"].value == (0.5 + 0) / 2


def test_points_of_other_shapes_are_refused():
    truth = np.zeros((3, 2, 2))
    with pytest.raises(ValueError, match=r"\[t, k, 2\]"):
        tally(truth, truth[:2], np.ones((3, 2), bool), np.ones((3, 1)))


@pytest.mark.parametrize("size", [SIZE, (300, 217)])
def test_points_come_back_from_heat_maps_between_tokens_too(size):
    height, width = size
    tokens = np.array([width / GRID[1], height / GRID[0]])
    inner = np.random.default_rng(0).uniform(tokens, [width, height] - tokens - 1, (500, 2))
    heat = to_heatmaps(inner, np.ones(500, bool), GRID, size)
    assert heat.shape == (14 * 20, 501)
    assert heat.dtype == np.float32
    back, found = from_heatmaps(heat, GRID, size)
    assert found.all()
    assert np.hypot(*((back - inner) / tokens).T).max() < 0.1


def test_points_on_the_border_come_back_at_most_half_a_token_inside():
    edge = np.array([[0, 0], [319, 0], [0, 223], [319, 223], [160, 0], [0, 100], [319, 90]], float)
    back, _ = from_heatmaps(to_heatmaps(edge, np.ones(7, bool), GRID, SIZE), GRID, SIZE)
    assert np.abs(back - edge).max() / 16 < 0.6


def test_the_peak_is_at_the_point_itself():
    """Token (3, 5) of 16 pixels a side has its centre at x = 87.5, y = 55.5."""
    heat = to_heatmaps(np.array([[87.5, 55.5]]), np.array([True]), GRID, SIZE, sigma=0.5).reshape(14, 20, 2)
    assert heat[3, 5].tolist() == [0, 1]
    assert heat[3, 6, 1] == heat[3, 4, 1] == heat[2, 5, 1] == pytest.approx(math.exp(-2))
    np.testing.assert_allclose(heat[..., 0], 1 - heat[..., 1], atol=1e-6)
    wider = to_heatmaps(np.array([[87.5, 55.5]]), np.array([True]), GRID, SIZE, sigma=1.0).reshape(14, 20, 2)
    assert wider[3, 6, 1] == pytest.approx(math.exp(-0.5))


def test_the_background_is_what_the_strongest_point_leaves():
    points = np.array([[87.5, 55.5], [95.5, 55.5]])
    heat = to_heatmaps(points, np.ones(2, bool), GRID, SIZE)
    np.testing.assert_allclose(heat[:, 0], 1 - heat[:, 1:].max(1), atol=1e-6)


def test_points_that_cannot_be_seen_have_no_heat_and_are_not_found():
    points = np.array([[100.0, 100.0], [np.nan, np.nan], [50.0, 60.0]])
    visible = np.array([True, False, False])
    heat = to_heatmaps(points, visible, GRID, SIZE)
    assert not heat[:, 2:].any()
    back, found = from_heatmaps(heat, GRID, SIZE)
    assert found.tolist() == [True, False, False]
    assert np.isnan(back[1:]).all()
    np.testing.assert_allclose(back[0], points[0], atol=2)
    assert not to_heatmaps(points, ~np.ones(3, bool), GRID, SIZE)[:, 1:].any()


def test_the_strongest_places_are_weighted():
    heat = np.zeros((4 * 4, 2), np.float32)
    heat[[0, 1], 1] = [1, 3]
    back, _ = from_heatmaps(heat, (4, 4), (4, 4))
    assert back.tolist() == [[0.75, 0]]
