"""Positions: the sine-cosine table against MAE's and against its definition, learned tables on other grids."""

import itertools
import math

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import ViTMAEConfig, ViTMAEModel

from mmssl.backbones.positions import Positions, resize_table, resized_sincos, sincos


def test_square_table_is_that_of_transformers_vit_mae():
    """``build_2d_sinusoidal_position_embedding`` in transformers 5, ``get_2d_sincos_pos_embed`` in 4."""
    config = ViTMAEConfig(image_size=20, patch_size=4, hidden_size=48, num_hidden_layers=1, num_attention_heads=2)
    theirs = ViTMAEModel(config).embeddings
    # transformers 5.23 takes a fresh model for a loaded one here and leaves the table at zero: fill it.
    theirs.patch_embeddings.projection._is_hf_initialized = False
    theirs.initialize_weights()
    torch.testing.assert_close(sincos((5, 5), 48), theirs.position_embeddings[0, 1:], rtol=0, atol=1e-6)


def test_wide_table_follows_the_definition():
    table = sincos((2, 3), 8)
    for n in range(6):
        row, column = divmod(n, 3)
        for offset, place in ((0, column), (4, row)):
            for i in range(2):
                angle = place / 10000 ** (2 * i / 4)
                assert table[n, offset + i].item() == pytest.approx(math.sin(angle), abs=1e-6)
                assert table[n, offset + 2 + i].item() == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("grid", [(7,), (3, 4), (4, 3), (2, 3, 4), (4, 3, 2)])
def test_each_axis_has_its_own_channels_and_rows_are_distinct(grid):
    share = 8
    table = sincos(grid, share * len(grid))
    assert len(torch.unique(table, dim=0)) == len(table) == math.prod(grid)
    lattice = table.view(*grid, len(grid), share)
    for axis, length in enumerate(grid):
        channels = lattice[..., len(grid) - 1 - axis, :]  # the last axis comes first
        alone = sincos((length,), share).view(*(length if a == axis else 1 for a in range(len(grid))), share)
        assert torch.equal(channels, alone.expand_as(channels))


def test_tube_table_follows_the_definition():
    """Thirds of the channels: the column's, the row's, the time's; in each all sines, then all cosines."""
    table, (time, height, width) = sincos((2, 3, 4), 24), (2, 3, 4)
    for t, h, w in itertools.product(range(time), range(height), range(width)):
        expected = [
            wave(place * 10000 ** (-i / 4)) for place in (w, h, t) for wave in (math.sin, math.cos) for i in range(4)
        ]
        assert table[(t * height + h) * width + w].tolist() == pytest.approx(expected, abs=1e-6)


def test_channels_that_do_not_divide_stay_zero_and_too_few_are_refused():
    table = sincos((2, 3, 4), 32)
    assert torch.equal(table[:, 30:], torch.zeros(24, 2))
    assert (table[:, :30].abs().sum(0) > 0).all()
    with pytest.raises(ValueError, match="too few"):
        sincos((2, 3, 4), 5)


def test_sincos_is_no_parameter_and_not_stored_and_resized_to_any_grid():
    positions = Positions((2, 3), 8)
    assert not list(positions.parameters())
    assert not positions.state_dict()
    assert torch.equal(positions((4, 5)), resize_table(sincos((2, 3), 8), (2, 3), (4, 5)))
    with torch.no_grad():
        positions().zero_()
    assert sincos((2, 3), 8).any(), "the cached table was handed out for writing"


@pytest.mark.parametrize(("grid", "other"), [((6,), (9,)), ((4, 3), (6, 8)), ((2, 3, 4), (4, 3, 2))])
def test_learned_tables_resize(grid, other):
    positions = Positions(grid, 8, "learned")
    assert positions() is positions.table
    assert positions(grid) is positions.table
    assert positions(list(grid)) is positions.table
    resized = positions(other)
    assert resized.shape == (math.prod(other), 8)
    resized.sum().backward()
    assert positions.table.grad is not None
    with torch.no_grad():  # what varies along the first axis alone still does
        rows = torch.randn(grid[0], 1, 8)
        positions.table.copy_(rows.expand(-1, math.prod(grid[1:]), -1).reshape(-1, 8))
        new = positions(other).reshape(other[0], -1, 8)
    torch.testing.assert_close(new, new[:, :1].expand_as(new))
    assert (new[0] - new[-1]).abs().min() > 0
    with pytest.raises(ValueError, match="cannot serve"):
        positions((2,) * (len(grid) + 1))


@pytest.mark.parametrize("kind", ["learned", "sincos"])
@pytest.mark.parametrize("grid", [(6, 8), (2, 2), (12, 3), (3, 9)])
def test_resizing_is_timms(kind, grid):
    positions = Positions((4, 6), 8, kind)
    theirs = resample_abs_pos_embed(positions.table[None], list(grid), [4, 6], num_prefix_tokens=0)
    torch.testing.assert_close(positions(grid), theirs[0])


def test_a_longer_or_shorter_sound_keeps_the_positions_of_its_beginning_and_its_bands_are_resized():
    positions = Positions((4, 6), 8, extend=(1,))
    own = positions().view(4, 6, 8)
    assert torch.equal(positions((4, 9)).view(4, 9, 8)[:, :6], own)
    assert torch.equal(positions((4, 9)), sincos((4, 9), 8)), "time counts on"
    assert torch.equal(positions((4, 3)).view(4, 3, 8), own[:, :3])
    both = positions((7, 9)).view(7, 9, 8)
    for t in range(9):
        assert torch.equal(both[:, t], resize_table(sincos((4, 9), 8).view(4, 9, 8)[:, t], (4,), (7,)))
    assert not torch.equal(positions((4, 9)), Positions((4, 6), 8)((4, 9)))


@pytest.mark.parametrize("kind", ["learned", "sincos"])
def test_the_frames_of_a_video_are_resized_one_by_one_as_pictures(kind):
    positions = Positions((3, 4, 6), 24, kind, extend=(0,))
    own = positions().detach().view(3, 24, 24)
    smaller = positions((2, 6, 8)).view(2, 48, 24)
    for t in range(2):
        theirs = resample_abs_pos_embed(own[t][None], [6, 8], [4, 6], num_prefix_tokens=0)[0]
        torch.testing.assert_close(smaller[t], theirs)
    assert torch.equal(positions((2, 4, 6)), own[:2].flatten(0, 1))
    longer = positions((5, 6, 8)).view(5, 48, 24)
    if kind == "sincos":
        torch.testing.assert_close(longer[:2], smaller)
        torch.testing.assert_close(longer[4, :, 16:], sincos((5, 1, 1), 24)[4, 16:].expand(48, -1))


def test_a_learned_axis_is_cut_where_shorter_and_interpolated_where_longer():
    positions = Positions((2, 3), 8, "learned", extend=(1,))
    own = positions().view(2, 3, 8)
    assert torch.equal(positions((2, 2)).view(2, 2, 8), own[:, :2])
    longer = positions((2, 6)).view(2, 6, 8)
    line = torch.nn.functional.interpolate(own.transpose(1, 2), 6, mode="linear", align_corners=False).transpose(1, 2)
    torch.testing.assert_close(longer, line)
    positions((4, 5)).sum().backward()
    assert (positions.table.grad != 0).all()
    positions.table.grad = None
    positions((2, 2)).sum().backward()
    assert torch.equal((positions.table.grad != 0).all(-1).view(2, 3), torch.tensor([[True, True, False]] * 2))


def test_extending_an_axis_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="does not have"):
        Positions((2, 3), 8, extend=(2,))
    with pytest.raises(ValueError, match="cannot serve"):
        Positions((2, 3), 8, extend=(1,))((2, 3, 4))


def test_a_table_made_on_fake_tensors_does_not_stay():
    """A memory plan traces with fake tensors, and the real run comes after it."""
    positions = Positions((4, 6), 8, extend=(1,))
    with FakeTensorMode(allow_non_fake_inputs=True):
        positions((5, 9))
    resized_sincos.cache_clear()  # as mmssl.cost does
    assert not isinstance(positions((5, 9)), FakeTensor)
    assert positions((5, 9)).sum().isfinite()
