"""Masks: equal counts, a partition of the tokens, decided by the generator alone."""

import pickle

import numpy as np
import pytest
import torch

from mmssl.masking import MASKS, RandomMask, RunningCell, gather

GRIDS = {
    "random": [(10,), (3, 7), (2, 4, 5)],
    "tube": [(2, 4, 5), (4, 1, 3), (1, 3, 3)],
    "time": [(3, 7), (8, 2), (1, 5)],
    "frequency": [(3, 7), (2, 8), (5, 1)],
    "time_frequency": [(3, 7), (8, 64), (1, 2), (2, 1), (2, 2)],
}
EVERY = pytest.mark.parametrize(("kind", "grid"), [(kind, grid) for kind in MASKS for grid in GRIDS[kind]])


def shared_cell(ratio=0.5, mask="random", mask_ratio=0.75):
    """Return a decoder mask."""
    return RunningCell(MASKS[mask](mask_ratio), ratio)


def lattice(index, grid):
    """Return True at the tokens of ``index``."""
    marked = np.zeros(np.prod(grid), dtype=bool)
    marked[index] = True
    return marked.reshape(grid)


@pytest.mark.parametrize(
    ("kind", "grid", "ratio", "kept"),
    [
        ("random", (14, 14), 0.75, 49),
        ("random", (10,), 0.9, 1),
        ("random", (4, 5), 0.9, 2),
        ("random", (10,), 0.99, 1),
        ("random", (10,), 0.01, 9),
        ("random", (1, 2), 0.5, 1),
        ("random", (3,), 0.5, 1),
        ("random", (8, 14, 14), 0.9, 156),
        ("random", (8, 8), 0.75, 16),
        ("tube", (8, 14, 14), 0.9, 8 * 19),  # VideoMAE: 19 of 196 places
        ("tube", (8, 14, 14), 0.75, 8 * 49),
        ("tube", (2, 2, 2), 0.99, 2 * 1),
        ("tube", (2, 2, 2), 0.01, 2 * 3),
        ("time", (8, 64), 0.75, 8 * 16),
        ("frequency", (8, 64), 0.75, 64 * 2),
        ("frequency", (8, 64), 0.99, 64 * 1),
        ("time_frequency", (8, 64), 0.75, 4 * 32),
        ("time_frequency", (4, 4), 0.99, 1),
        ("time_frequency", (4, 4), 0.01, 9),
        ("time_frequency", (2, 2), 0.25, 1),
        ("time_frequency", (4, 16), 0.5, 3 * 11),  # not 2 x 16, which hides no step of time
    ],
)
def test_the_kept_count_is_the_papers_and_never_none_or_all(kind, grid, ratio, kept):
    assert MASKS[kind](ratio).kept(grid) == kept


@EVERY
@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
def test_every_mask_is_a_sorted_partition_with_equal_counts(kind, grid, ratio):
    mask, rng, tokens = MASKS[kind](ratio), np.random.default_rng(0), int(np.prod(grid))
    for _ in range(20):
        drawn = mask(rng, grid)
        keep, drop = drawn["keep"], drawn["drop"]
        assert keep.dtype == drop.dtype == np.int64
        assert 0 < len(keep) == mask.kept(grid) < tokens
        assert sorted([*keep, *drop]) == list(range(tokens))
        assert (np.diff(keep) > 0).all()
        assert (np.diff(drop) > 0).all()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("decoded", [False, True], ids=["all", "running cell"])
def test_the_generator_alone_decides(kind, decoded):
    grid = (4, 6, 6) if kind == "tube" else (12, 12)
    mask = shared_cell(mask=kind) if decoded else MASKS[kind](0.75)
    first = mask(np.random.default_rng(7), grid)
    again = pickle.loads(pickle.dumps(mask))(np.random.default_rng(7), grid)
    other = mask(np.random.default_rng(8), grid)
    assert all(np.array_equal(first[name], again[name]) for name in ("keep", "drop"))
    assert not np.array_equal(first["keep"], other["keep"])


@pytest.mark.parametrize("grid", [(8, 6, 6), (3, 5, 4), (1, 2, 2)])
@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_a_tube_leaves_no_visible_token_at_a_masked_place_in_any_frame(grid, ratio):
    mask, rng = MASKS["tube"](ratio), np.random.default_rng(0)
    for decoded in (mask, RunningCell(mask, 0.5)):
        drawn = decoded(rng, grid)
        visible = lattice(drawn["keep"], grid)
        assert (visible.any(0) == visible.all(0)).all()
        assert not visible.any(0)[lattice(drawn["drop"], grid).any(0)].any()


def test_spectrogram_masks_hide_whole_columns_whole_rows_or_leave_a_product_of_both():
    rng, grid = np.random.default_rng(0), (8, 24)
    kept = {kind: lattice(MASKS[kind](0.75)(rng, grid)["keep"], grid) for kind in GRIDS if kind not in ("tube",)}
    assert (kept["time"].any(0) == kept["time"].all(0)).all()
    assert (kept["frequency"].any(1) == kept["frequency"].all(1)).all()
    both = kept["time_frequency"]
    assert np.array_equal(both, np.outer(both.any(1), both.any(0)))
    assert (both.any(1).sum(), both.any(0).sum()) == (4, 12)
    assert not (kept["random"].any(0) == kept["random"].all(0)).all()


@pytest.mark.parametrize("grid", [(8, 64), (8, 10), (5, 7), (16, 3), (3, 200)])
@pytest.mark.parametrize("ratio", [0.5, 0.8, 0.9])
def test_both_axes_of_a_time_frequency_mask_keep_about_the_same_share_and_together_what_is_asked(grid, ratio):
    keep = lattice(MASKS["time_frequency"](ratio)(np.random.default_rng(0), grid)["keep"], grid)
    rows, columns = keep.any(1).sum(), keep.any(0).sum()
    share, wanted = (1 - ratio) ** 0.5, (1 - ratio) * np.prod(grid)
    assert abs(rows * columns - wanted) <= max(1, min(rows, columns) / 2 + 1)
    # One side is its share rounded, and what that rounds away the other makes up.
    slack = 1 / grid[0] + 1 / grid[1] + 1 / (grid[0] * share)
    assert abs(rows / grid[0] - share) <= slack
    assert abs(columns / grid[1] - share) <= slack


@pytest.mark.parametrize("kind", MASKS)
def test_every_token_is_kept_equally_often(kind):
    grid, draws, rng = (2, 3, 4) if kind == "tube" else (4, 6), 3000, np.random.default_rng(0)
    mask = MASKS[kind](0.6)
    share = sum(lattice(mask(rng, grid)["keep"], grid) for _ in range(draws)) / draws
    expected = mask.kept(grid) / 24
    assert np.abs(share - expected).max() < 4 * (expected * (1 - expected) / draws) ** 0.5


@pytest.mark.parametrize(("kind", "grid"), [("tube", (4, 4)), ("time", (2, 4, 4)), ("frequency", (8,))])
def test_a_grid_of_other_axes_is_refused_in_a_sentence(kind, grid):
    mask = MASKS[kind](0.5)
    for refused in (mask.kept, lambda grid: mask(np.random.default_rng(0), grid), RunningCell(mask, 0.5).kept):
        with pytest.raises(
            ValueError, match=rf"the {kind} mask is for a grid \((time|frequency), .* 'random' suits any"
        ):
            refused(grid)


@pytest.mark.parametrize(
    ("kind", "grid", "what"),
    [
        ("random", (1, 1), "tokens"),
        ("tube", (8, 1, 1), "places in a frame"),
        ("time", (8, 1), "steps of time"),
        ("frequency", (1, 8), "bands of frequency"),
        ("time_frequency", (1, 1), "tokens"),
    ],
)
def test_a_grid_with_nothing_to_choose_from_is_refused(kind, grid, what):
    for refused in (MASKS[kind](0.75).kept, lambda grid: MASKS[kind](0.75)(np.random.default_rng(0), grid)):
        with pytest.raises(ValueError, match=f"at least 2 {what}"):
            refused(grid)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_the_running_cell_predicts_every_place_equally_often_and_in_every_cell_equally_much(ratio):
    """VideoMAE V2: a cell of 2 x 2 runs on by one place with each step of time."""
    grid, mask = (8, 6, 6), MASKS["tube"](0.5)
    for seed in range(5):
        hidden = lattice(mask(np.random.default_rng(seed), grid)["drop"], grid)
        drawn = RunningCell(mask, ratio)(np.random.default_rng(seed), grid)
        decoded = lattice(drawn["drop"], grid)
        assert decoded.sum() == ratio * hidden.sum()
        assert not (decoded & ~hidden).any()
        assert (decoded.sum(0) == 8 * ratio * hidden[0]).all()
        for t in range(7):  # what is predicted at a place now was at the next of its cell a step before
            for h, w in np.argwhere(hidden[0]):
                following = 2 * (h % 2) + w % 2 + 1
                y, x = h - h % 2 + following % 4 // 2, w - w % 2 + following % 2
                if hidden[0, y, x]:
                    assert decoded[t + 1, h, w] == decoded[t, y, x]


def test_the_running_cell_starts_at_each_of_its_four_places():
    def first_frame(rng, grid):
        return {"keep": np.arange(16), "drop": np.arange(16, 32)}

    starts = {
        tuple(RunningCell(first_frame, 0.25)(np.random.default_rng(seed), (2, 4, 4))["drop"]) for seed in range(40)
    }
    corner = np.array([16, 18, 24, 26])
    assert starts == {tuple(corner + step) for step in (0, 1, 4, 5)}


@pytest.mark.parametrize("grid", [(8, 7, 5), (3, 3, 3), (9, 6), (5, 5), (11,), (1, 2)])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.6, 0.999, 1.0])
def test_the_running_cell_gives_every_sample_the_same_count_of_hidden_tokens_on_any_grid(grid, ratio):
    mask, rng = MASKS["random"](0.75), np.random.default_rng(0)
    counts = set()
    for _ in range(20):
        drawn = RunningCell(mask, ratio)(rng, grid)
        assert len(drawn["keep"]) == RunningCell(mask, ratio).kept(grid) == mask.kept(grid)
        assert not set(drawn["keep"]) & set(drawn["drop"])
        assert (np.diff(drawn["drop"]) > 0).all()
        counts.add(len(drawn["drop"]))
    hidden = int(np.prod(grid)) - mask.kept(grid)
    assert counts == {max(1, int(hidden * ratio + 1e-6))}


def test_random_mask_keeps_every_token_and_every_pair_equally_often():
    mask, rng, draws = RandomMask(0.75), np.random.default_rng(0), 4000
    together = np.zeros((8, 8))
    for _ in range(draws):
        keep = mask(rng, (8,))["keep"]
        together[np.ix_(keep, keep)] += 1
    each, pairs = together.diagonal() / draws, together[~np.eye(8, dtype=bool)] / draws
    assert np.abs(each - 2 / 8).max() < 4 * (0.25 * 0.75 / draws) ** 0.5
    assert np.abs(pairs - 2 / 56).max() < 4 * (2 / 56 / draws) ** 0.5


def test_gather_picks_per_row_from_tokens_and_for_every_row_from_a_table():
    tokens, index = torch.randn(2, 5, 3), torch.tensor([[4, 0], [1, 1]])
    assert torch.equal(gather(tokens, index)[0], tokens[0, [4, 0]])
    assert torch.equal(gather(tokens, index)[1], tokens[1, [1, 1]])
    table = tokens[0]
    assert torch.equal(gather(table, index), gather(table.expand(2, -1, -1), index))
