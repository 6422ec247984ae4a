"""The patch tokenizer: cutting and its inverse, embedding only what is asked for, MAE's target."""

import pytest
import torch

from mmssl.backbones.positions import resize_table
from mmssl.masking import gather
from modalities.patches import PatchTokenizer

SHAPES = [
    ((12,), (3,), 2),
    ((8, 8), (4, 4), 3),
    ((6, 20), (3, 4), 3),
    ((4, 6, 8), (2, 3, 4), 3),
    ((2, 4, 12), (1, 2, 4), 1),
]


@pytest.mark.parametrize(("size", "patch_size", "channels"), SHAPES)
def test_unpatch_inverts_patches_exactly(size, patch_size, channels):
    tokenizer = PatchTokenizer(size, patch_size, channels, dim=12)
    signal = torch.randn(2, channels, *size)
    patches = tokenizer.cut(signal)
    assert patches.shape == (2, torch.tensor(tokenizer.grid).prod(), tokenizer.patch_dim)
    assert torch.equal(tokenizer.unpatch(patches), signal)
    longer = torch.randn(1, channels, *(2 * size[0], *size[1:]))
    assert torch.equal(tokenizer.unpatch(tokenizer.cut(longer), tokenizer.grid_of(longer.shape[2:])), longer)


def test_a_patch_is_the_slice_of_the_signal_with_channels_last_in_row_major_order():
    tokenizer = PatchTokenizer((6, 20), (3, 4), 3, dim=12)
    signal = torch.randn(2, 3, 6, 20)
    patches = tokenizer.cut(signal)
    for n in range(10):
        row, column = divmod(n, 5)
        square = signal[:, :, 3 * row : 3 * row + 3, 4 * column : 4 * column + 4]
        assert torch.equal(patches[:, n], square.permute(0, 2, 3, 1).flatten(1))


def test_a_size_that_patches_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="multiple of patch size"):
        PatchTokenizer((10, 8), (4, 4), 3, dim=12)
    with pytest.raises(ValueError, match="multiple of patch size"):
        PatchTokenizer((8, 8), (4, 4), 3, dim=12).cut(torch.zeros(1, 3, 8, 9))


@pytest.mark.parametrize("kind", ["sincos", "learned"])
@pytest.mark.parametrize(("size", "patch_size", "channels"), SHAPES)
def test_embedding_some_patches_equals_embedding_all_and_picking(size, patch_size, channels, kind):
    tokenizer = PatchTokenizer(size, patch_size, channels, dim=12, positions=kind)
    patches = tokenizer.cut(torch.randn(2, channels, *size))
    index = torch.stack([torch.randperm(patches.shape[1])[:3] for _ in range(2)])
    everything = tokenizer.embed(patches)
    torch.testing.assert_close(tokenizer.embed(patches, index), gather(everything, index))
    # Two equal patches differ by their positions only.
    same = tokenizer.embed(torch.zeros_like(patches))
    torch.testing.assert_close(same[0], tokenizer.positions())


def test_positions_follow_the_grid_of_a_larger_signal():
    tokenizer = PatchTokenizer((8, 8), (4, 4), 3, dim=12)
    large = torch.zeros(1, 3, 12, 16)
    grid = tokenizer.grid_of(large.shape[2:])
    expected = resize_table(tokenizer.positions(), (2, 2), (3, 4))
    torch.testing.assert_close(tokenizer.embed(tokenizer.cut(large), None, grid)[0], expected)


def test_normalised_target_is_maes_formula():
    """MAE's ``models_mae.py``: mean and unbiased variance over all values of a patch, eps 1e-6 inside the root."""
    tokenizer = PatchTokenizer((8, 8), (4, 4), 3, dim=12)
    patches = torch.randn(2, 4, 48) * 3 + 1
    patches[0, 0] = 0.5  # a flat patch: eps is all there is
    patches[0, 1] *= 1e-3
    deviations = patches - patches.sum(-1, keepdim=True) / 48
    variance = deviations.square().sum(-1, keepdim=True) / 47
    torch.testing.assert_close(
        tokenizer.target(patches), deviations / torch.sqrt(variance + 1e-6), rtol=1e-5, atol=1e-5
    )
    affine = tokenizer.target(5 * patches + 2)  # gain and offset are not to be predicted
    torch.testing.assert_close(affine[1], tokenizer.target(patches)[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["normalized", "raw"])
def test_untarget_inverts_target(kind):
    tokenizer = PatchTokenizer((8, 8), (4, 4), 3, dim=12, target=kind)
    patches = torch.randn(2, 4, 48) * 3 + 1
    torch.testing.assert_close(tokenizer.untarget(tokenizer.target(patches), patches), patches)
    assert torch.equal(tokenizer.target(patches), patches) == (kind == "raw")
