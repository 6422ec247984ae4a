import itertools

import pytest
import torch
from torch.nn import functional as F

from mmssl import propagation
from mmssl.propagation import Propagator, blend, dense_propagate, dense_window, nearest


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def soft(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def by_hand(query, sources, grid, radius, topk):
    """Sort all candidates of every token by similarity, then distance, reading order and frame, in plain loops."""
    rows, columns = grid
    products = [(query @ source.T).tolist() for source in sources]
    found = []
    for mine, (y, x) in enumerate(itertools.product(range(rows), range(columns))):
        candidates = []
        for frame, product in enumerate(products):
            for token, (v, u) in enumerate(itertools.product(range(rows), range(columns))):
                if radius == 0 or max(abs(v - y), abs(u - x)) <= radius:
                    distance = (v - y) ** 2 + (u - x) ** 2
                    candidates.append((-product[mine][token], distance, token, frame))
        found.append([(frame, token) for _, _, token, frame in sorted(candidates)[:topk]])
    return found


GRIDS = [(1, 1), (1, 9), (9, 1), (5, 7), (7, 5), (2, 17), (13, 11), (3, 130)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("radius", [0, 1, 3, 200, 10**20])
@pytest.mark.parametrize("topk", [1, 5, 40, 2000])
def test_the_fast_path_gives_the_labels_of_its_dense_twin(grid, radius, topk):
    tokens = grid[0] * grid[1]
    for frames in (1, 3):
        query, sources, labels = unit(tokens, 8), unit(frames, tokens, 8, seed=2), soft(frames, tokens, 4)
        fast = blend(nearest(query, list(sources), grid, radius, topk), labels, 0.1)
        slow = dense_propagate(query, list(sources), list(labels), dense_window(grid, radius), topk, 0.1)
        assert (fast - slow).abs().max() <= 1e-6


@pytest.mark.parametrize("band_tokens", [1, 7, 40])
def test_bands_of_any_size_give_the_same(monkeypatch, band_tokens):
    query, sources = unit(60, 8), list(unit(2, 60, 8, seed=2))
    whole = nearest(query, sources, (6, 10), 2, 4)
    monkeypatch.setattr(propagation, "BAND_TOKENS", band_tokens)
    banded = nearest(query, sources, (6, 10), 2, 4)
    assert torch.equal(whole.token, banded.token)
    assert torch.equal(whole.frame, banded.frame)
    assert torch.allclose(whole.values, banded.values, atol=1e-6)


@pytest.mark.parametrize("grid", [(4, 6), (6, 4), (1, 8)], ids=str)
@pytest.mark.parametrize("radius", [0, 2])
@pytest.mark.parametrize("topk", [1, 5, 11])
def test_equal_similarities_go_to_the_nearest_place_then_in_reading_order_then_to_the_earliest_frame(
    grid, radius, topk
):
    # Few distinct vectors whose products are exact, and vectors of zeros.
    kinds = torch.cat([torch.eye(3), torch.zeros(1, 3)])
    draw = torch.randint(4, (4, grid[0] * grid[1]), generator=torch.Generator().manual_seed(3))
    query, *sources = kinds[draw]
    found = nearest(query, sources, grid, radius, topk)
    for frames, tokens, wanted in zip(
        found.frame.tolist(), found.token.tolist(), by_hand(query, sources, grid, radius, topk), strict=True
    ):
        assert list(zip(frames, tokens, strict=True))[: len(wanted)] == wanted


@pytest.mark.parametrize("grid", [(1, 600), (600, 1)], ids=str)
def test_the_least_difference_outweighs_the_largest_distance(grid):
    source = torch.full((600, 1), 0.5)
    source[599] = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0))
    assert nearest(torch.ones(600, 1), [source], grid, 0, 2).token[:2].tolist() == [[599, 0], [599, 1]]


def test_values_are_the_similarities_and_missing_ones_are_minus_infinity():
    query, sources = unit(12, 8), list(unit(2, 12, 8, seed=2))
    found = nearest(query, sources, (3, 4), 1, 100)
    assert found.values.shape == (12, 24)
    present = found.values.isfinite()
    assert present.sum(1).tolist() == [2 * n for n in (4, 6, 6, 4, 6, 9, 9, 6, 4, 6, 6, 4)]
    exact = torch.stack(sources)[found.frame, found.token] @ query.unsqueeze(2)
    assert torch.allclose(found.values[present], exact.squeeze(2)[present], atol=1e-6)
    assert (found.values[:, :-1] >= found.values[:, 1:]).all()


def test_a_still_video_keeps_its_labels():
    features, labels = unit(35, 8), F.one_hot(torch.arange(35) % 3).float()
    carrier = Propagator((5, 7), context=2, radius=2, topk=1)
    carrier.start(features, labels)
    for _ in range(5):
        assert torch.equal(carrier.step(features), labels)


@pytest.mark.parametrize("grid", [(4, 9), (9, 4)], ids=str)
def test_a_flat_picture_keeps_its_labels(grid):
    # Nothing can be told apart, so that every token's best neighbour is itself in the first frame.
    labels = F.one_hot(torch.arange(36) % 3).float()
    for features in (torch.zeros(36, 8), torch.eye(8)[:1].repeat(36, 1)):
        carrier = Propagator(grid, radius=3, topk=1)
        carrier.start(features, labels)
        for _ in range(3):
            assert torch.equal(carrier.step(features), labels)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("grid", [(8, 12), (12, 8)], ids=str)
def test_a_moving_pattern_is_followed_within_the_radius_and_not_beyond(grid, axis):
    places = unit(96, 16).view(*grid, 16)
    labels = F.one_hot(torch.arange(96)).float().view(*grid, 96)
    for shift, radius, follows in ((2, 2, True), (-2, 2, True), (3, 2, False), (-3, 2, False), (3, 0, True)):
        carrier = Propagator(grid, context=0, radius=radius, topk=1)
        carrier.start(places.flatten(0, 1), labels.flatten(0, 1))
        out = carrier.step(places.roll(shift, axis).flatten(0, 1)).view_as(labels)
        length = grid[axis]
        moved = slice(max(shift, 0), length + min(shift, 0))
        same = (out == labels.roll(shift, axis)).all(-1).transpose(0, axis)[moved]
        assert same.all() if follows else not same.any()


@pytest.mark.parametrize(
    ("context", "wanted"),
    [
        (0, [[0], [0], [0], [0], [0]]),
        (1, [[0], [0, 1], [0, 2], [0, 3], [0, 4]]),
        (2, [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]),
        (9, [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]),
    ],
)
def test_the_context_is_the_first_frame_once_and_the_last_ones(monkeypatch, context, wanted):
    seen, frames = [], torch.eye(6)
    inner = propagation._nearest

    def spy(query, sources, *rest):
        # Frame t is known by its direction.
        seen.append(sorted(source.argmax().item() for source in sources))
        return inner(query, sources, *rest)

    monkeypatch.setattr(propagation, "_nearest", spy)
    carrier = Propagator((1, 1), context=context)
    carrier.start(frames[:1], torch.ones(1, 1))
    for t in range(1, 6):
        carrier.step(frames[t : t + 1])
    assert seen == wanted


@pytest.mark.parametrize(("context", "room"), [(2, 3), (4, 5), (9, 10), (10**20, 16)])
def test_the_class_does_what_dense_steps_do_by_hand(context, room, monkeypatch):
    monkeypatch.setattr(propagation, "ROOM", 2)
    grid = 5, 8
    video, labels = torch.randn(12, 40, 8, generator=torch.Generator().manual_seed(0)), [soft(40, 3)]
    normal = F.normalize(video, dim=-1)
    carrier = Propagator(grid, context=context, radius=2, topk=4, temperature=0.2)
    carrier.start(video[0], labels[0])
    for t in range(1, 12):
        used = [0, *range(max(1, t - context), t)]
        labels.append(
            dense_propagate(
                normal[t], [normal[i] for i in used], [labels[i] for i in used], dense_window(grid, 2), 4, 0.2
            )
        )
        assert (carrier.step(video[t]) - labels[t]).abs().max() <= 1e-6
    assert len(carrier._features) == len(carrier._labels) == room


def run(video, labels, **settings):
    carrier = Propagator((5, 8), **({"context": 2, "radius": 2} | settings))
    carrier.start(video[0], labels)
    return torch.stack([carrier.step(features) for features in video[1:]])


VIDEO, LABELS = unit(4, 40, 8, seed=5), soft(40, 3)


def test_labels_stay_distributions_even_where_windows_hold_fewer_than_topk():
    assert torch.allclose(run(VIDEO, LABELS, topk=500).sum(-1), torch.ones(3, 40), atol=1e-5)
    assert torch.equal(run(VIDEO, LABELS, topk=500), run(VIDEO, LABELS, topk=80))


def test_permuted_labels_give_permuted_results():
    order = [2, 0, 1]
    assert torch.allclose(run(VIDEO, LABELS[:, order]), run(VIDEO, LABELS)[..., order], atol=1e-6)


def test_the_length_of_features_does_not_matter():
    scale = torch.rand(4, 40, 1, generator=torch.Generator().manual_seed(6)) * 100 + 1e-3
    assert torch.allclose(run(VIDEO * scale, LABELS), run(VIDEO, LABELS), atol=1e-5)


def test_a_new_start_forgets_the_video_before():
    carrier = Propagator((5, 8), context=2, radius=2)
    carrier.start(VIDEO[3], LABELS.flip(0))
    carrier.step(VIDEO[2])
    carrier.start(VIDEO[0], LABELS)
    assert torch.equal(carrier.step(VIDEO[1]), run(VIDEO, LABELS)[0])


def test_vectors_of_zeros_make_no_nan():
    video = VIDEO.clone()
    video[:, ::3] = 0
    assert run(video, LABELS).isfinite().all()


def test_autocast_changes_nothing():
    plain = run(VIDEO, LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(VIDEO, LABELS)
        dense = dense_propagate(VIDEO[1], [VIDEO[0]], [LABELS], dense_window((5, 8), 2), 5, 0.1)
    assert torch.equal(cast, plain)
    assert (dense - plain[0]).abs().max() <= 1e-6


def test_features_and_labels_of_other_types_are_computed_in_fp32():
    halves, steps = VIDEO.bfloat16(), F.one_hot(torch.arange(40) % 3)
    assert torch.equal(run(halves, steps), run(halves.float(), steps.float()))


def test_gradients_are_not_kept():
    assert not run(VIDEO.clone().requires_grad_(), LABELS).requires_grad


def test_threads_change_nothing():
    video, labels = unit(3, 24 * 30, 64), soft(24 * 30, 3)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            carrier = Propagator((24, 30), radius=6)
            carrier.start(video[0], labels)
            results.append(torch.stack([carrier.step(features) for features in video[1:]]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_labels_of_the_cpu():
    assert torch.allclose(run(VIDEO.cuda(), LABELS.cuda()).cpu(), run(VIDEO, LABELS), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"grid": (0, 4)}, "grid"),
        ({"grid": (4,)}, "grid"),
        ({"context": -1}, "context"),
        ({"radius": -1}, "radius"),
        ({"topk": 0}, "topk"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
    ],
    ids=str,
)
def test_nonsense_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Propagator(**({"grid": (2, 2)} | settings))


def test_tensors_that_do_not_fit_are_refused():
    carrier = Propagator((2, 3))
    with pytest.raises(ValueError, match="start before step"):
        carrier.step(unit(6, 4))
    with pytest.raises(ValueError, match=r"features are \[6, ...\] on a grid of 2 x 3 tokens, not \[5, 4\]"):
        carrier.start(unit(5, 4), soft(6, 2))
    with pytest.raises(ValueError, match="labels"):
        carrier.start(unit(6, 4), soft(7, 2))
    carrier.start(unit(6, 4), soft(6, 2))
    with pytest.raises(ValueError, match="4 channels, not 5"):
        carrier.step(unit(6, 5))
