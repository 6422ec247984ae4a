"""Masks: equal counts, a partition of the tokens, decided by the generator alone."""

import pickle

import numpy as np
import pytest
import torch

from mmssl.masking import MASKS, RandomMask, gather, kept_tokens


@pytest.mark.parametrize(
    ("grid", "ratio", "kept"),
    [
        ((14, 14), 0.75, 49),
        ((10,), 0.9, 1),
        ((4, 5), 0.9, 2),
        ((10,), 0.99, 1),
        ((10,), 0.01, 9),
        ((1, 2), 0.5, 1),
        ((3,), 0.5, 1),
        ((8, 14, 14), 0.9, 156),
        ((8, 8), 0.75, 16),
    ],
)
def test_kept_tokens_follows_mae_and_never_keeps_none_or_all(grid, ratio, kept):
    assert kept_tokens(grid, ratio) == kept


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("grid", [(10,), (3, 7), (2, 4, 5)])
@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
def test_every_mask_is_a_sorted_partition_with_equal_counts(kind, grid, ratio):
    mask, rng, tokens = MASKS[kind](ratio), np.random.default_rng(0), int(np.prod(grid))
    for _ in range(20):
        drawn = mask(rng, grid)
        keep, drop = drawn["keep"], drawn["drop"]
        assert keep.dtype == drop.dtype == np.int64
        assert len(keep) == kept_tokens(grid, ratio)
        assert sorted([*keep, *drop]) == list(range(tokens))
        assert (np.diff(keep) > 0).all()
        assert (np.diff(drop) > 0).all()


@pytest.mark.parametrize("kind", MASKS)
def test_the_generator_alone_decides(kind):
    mask = MASKS[kind](0.75)
    first = mask(np.random.default_rng(7), (6, 6))
    again = pickle.loads(pickle.dumps(mask))(np.random.default_rng(7), (6, 6))
    other = mask(np.random.default_rng(8), (6, 6))
    assert np.array_equal(first["keep"], again["keep"])
    assert not np.array_equal(first["keep"], other["keep"])


def test_random_mask_keeps_every_token_and_every_pair_equally_often():
    mask, rng, draws = RandomMask(0.75), np.random.default_rng(0), 4000
    together = np.zeros((8, 8))
    for _ in range(draws):
        keep = mask(rng, (8,))["keep"]
        together[np.ix_(keep, keep)] += 1
    each, pairs = together.diagonal() / draws, together[~np.eye(8, dtype=bool)] / draws
    assert np.abs(each - 2 / 8).max() < 4 * (0.25 * 0.75 / draws) ** 0.5
    assert np.abs(pairs - 2 / 56).max() < 4 * (2 / 56 / draws) ** 0.5


def test_a_grid_of_one_token_cannot_be_masked():
    with pytest.raises(ValueError, match="at least 2 tokens"):
        RandomMask(0.75)(np.random.default_rng(0), (1, 1))


def test_gather_picks_per_row_from_tokens_and_for_every_row_from_a_table():
    tokens, index = torch.randn(2, 5, 3), torch.tensor([[4, 0], [1, 1]])
    assert torch.equal(gather(tokens, index)[0], tokens[0, [4, 0]])
    assert torch.equal(gather(tokens, index)[1], tokens[1, [1, 1]])
    table = tokens[0]
    assert torch.equal(gather(table, index), gather(table.expand(2, -1, -1), index))
