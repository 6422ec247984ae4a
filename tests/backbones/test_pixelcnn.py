"""The masked convolutional context: what a token sees, to the bit, and what it is for."""

import pytest
import torch

from mmssl.backbones import BACKBONES
from mmssl.backbones.pixelcnn import PixelCNNConfig

GRID = (5, 6)


@pytest.fixture
def context():
    return PixelCNNConfig(dim=8, depth=3, hidden=6, input_dim=12).build()


def changed(context, row, column):
    """Return which outputs a token has a say in, bool [rows, columns]."""
    tokens = torch.randn(2, 30, 12)
    before = context(tokens, grid=GRID)
    tokens[0, row * 6 + column] += torch.randn(12)
    after = context(tokens, grid=GRID)
    assert torch.equal(before[1], after[1])
    return (before != after)[0].any(1).view(GRID)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (2, 3), (4, 5)])
def test_a_token_sees_its_row_and_those_above_and_nothing_below_to_the_bit(context, row, column):
    rows, columns = torch.meshgrid(torch.arange(5), torch.arange(6), indexing="ij")
    within = (rows >= row) & (rows - row <= 3) & ((columns - column).abs() <= 3)
    assert torch.equal(changed(context, row, column), within)


def test_what_is_read_and_put_out(context):
    tokens = torch.randn(2, 30, 12)
    layers = context.layers(tokens, grid=GRID)
    assert [layer.shape for layer in layers] == [(2, 30, 8)] * 3
    assert torch.equal(layers[-1], context(tokens, grid=GRID))
    assert not torch.allclose(context(tokens, grid=GRID), context(tokens, grid=(6, 5)))
    config = PixelCNNConfig(dim=8)
    assert (config.reads, config.causal, config.build().blocks[0].narrow.out_channels) == (8, True, 8)
    assert PixelCNNConfig in BACKBONES


def test_it_needs_rows_and_columns_without_padding(context):
    tokens = torch.randn(2, 30, 12)
    for grid in (None, (30,)):
        with pytest.raises(ValueError, match="needs tokens in rows and columns"):
            context(tokens, grid=grid)
    with pytest.raises(ValueError, match="has no padding"):
        context(tokens, torch.zeros(2, 30, dtype=torch.bool), grid=GRID)
