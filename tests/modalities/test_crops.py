"""Patches that overlap: cutting and putting together, embedding each by itself, and who may have them."""

import pytest
import torch

from mmssl.config import validate
from mmssl.errors import UserError
from mmssl.masking import gather
from modalities.crops import Crops
from modalities.encoder import Encoder, EncoderConfig, load, typed
from modalities.image import Image
from modalities.image_settings import CropTokenizer, ImageSignal, ImageTokenizer

IMAGE = Image()
NETWORK = {"blocks": (1, 1), "channels": (8, 16), "bottlenecks": (4, 4)}
GRIDS = [((20, 20), (8, 8), (4, 4)), ((14, 26), (6, 10), (4, 8)), ((8, 12), (4, 4), (4, 4)), ((13, 16), (7, 8), (2, 8))]


def crops(size=(20, 20), patch_size=8, stride=4, dim=16):
    """Return a tokenizer in which no weight is what it began as, so that every block counts."""
    settings = CropTokenizer(patch_size=patch_size, stride=stride, **NETWORK)
    made = IMAGE.tokenizer(ImageSignal(size=size), settings, dim)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made


@pytest.mark.parametrize(("size", "patch_size", "stride"), GRIDS)
def test_a_patch_is_its_square_with_channels_last_in_row_major_order(size, patch_size, stride):
    tokenizer, signal = crops(size, patch_size, stride), torch.randn(2, 3, *size)
    patches = tokenizer.patches({"signal": signal})
    rows, columns = tokenizer.grid
    assert patches.shape == (2, rows * columns, tokenizer.patch_dim)
    (p, q), (down, right) = patch_size, stride
    for n in range(rows * columns):
        top, left = n // columns * down, n % columns * right
        square = signal[:, :, top : top + p, left : left + q]
        assert torch.equal(patches[:, n], square.permute(0, 2, 3, 1).flatten(1))


@pytest.mark.parametrize(("size", "patch_size", "stride"), GRIDS)
def test_unpatch_inverts_patches(size, patch_size, stride):
    tokenizer, signal = crops(size, patch_size, stride), torch.randn(2, 3, *size)
    back = tokenizer.unpatch(tokenizer.patches({"signal": signal}))
    torch.testing.assert_close(back, signal)
    if all(2 * step >= side for side, step in zip(patch_size, stride, strict=True)):
        assert torch.equal(back, signal)  # sums of 1, 2 or 4 equal numbers are exact


def test_what_is_made_of_a_value_counts_patches_that_overlap():
    tokenizer = crops((20, 20), 8, 4)  # 16 patches of 64 pixels: 1024 for 400, of each 4 / 4 channels behind the stem
    assert tokenizer.widens == pytest.approx(max(1, 1024 / 400 * 1 / 3))
    tokenizer.network.stem.out_channels = 64
    assert tokenizer.widens == pytest.approx(1024 / 400 * 16 / 3)


def test_unpatch_is_the_mean_where_patches_overlap():
    tokenizer = crops((12, 8), 8, 4)
    patches = torch.stack([torch.zeros(192), torch.ones(192)]).unsqueeze(0)
    rows = tokenizer.unpatch(patches)[0, 0, :, 0]
    assert rows.tolist() == [0] * 4 + [0.5] * 4 + [1] * 4


def test_the_papers_grids():
    first = IMAGE.tokenizer(ImageSignal(size=256), CropTokenizer(**NETWORK), 16)
    second = IMAGE.tokenizer(ImageSignal(size=260), CropTokenizer(patch_size=80, stride=36, **NETWORK), 16)
    assert (first.grid, second.grid) == ((7, 7), (6, 6))


def test_other_sizes_have_other_grids():
    tokenizer = crops()
    signal = torch.randn(1, 3, 24, 36)
    grid = tokenizer.grid_of((24, 36))
    patches = tokenizer.patches({"signal": signal})
    assert grid == (5, 8)
    assert torch.equal(tokenizer.unpatch(patches, grid), signal)
    assert tokenizer.embed(patches, None, grid).shape == (1, 40, 16)


@pytest.mark.parametrize(("size", "nearest"), [((21, 24), [20, 24]), ((4, 19), [8, 20]), ((23, 8), [24, 8])])
def test_a_size_that_does_not_fit_is_told_with_the_nearest_that_does(size, nearest):
    with pytest.raises(ValueError, match=f"nearest size that does is {nearest}".replace("[", r"\[")):
        crops().grid_of(size)
    assert crops().grid_of(tuple(nearest))


def test_embedding_some_patches_equals_embedding_all_and_picking():
    tokenizer = crops()
    patches = tokenizer.patches({"signal": torch.randn(2, 3, 20, 20)})
    index = torch.stack([torch.randperm(16)[:5] for _ in range(2)])
    seen = []
    tokenizer.network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    some = tokenizer.embed(patches, index)
    torch.testing.assert_close(some, gather(tokenizer.embed(patches), index), rtol=1e-4, atol=1e-5)
    assert seen == [10, 32]  # what is not asked for is not computed


@pytest.mark.parametrize(("y", "x"), [(0, 0), (9, 10), (19, 3), (7, 19)])
def test_a_token_sees_the_pixels_of_its_patch_alone(y, x):
    tokenizer, signal = crops(), torch.randn(2, 3, 20, 20)
    before = tokenizer.embed(tokenizer.patches({"signal": signal}))
    signal[0, :, y, x] += 1
    after = tokenizer.embed(tokenizer.patches({"signal": signal}))
    covers = torch.tensor([[r * 4 <= y < r * 4 + 8 and c * 4 <= x < c * 4 + 8 for c in range(4)] for r in range(4)])
    assert torch.equal((before != after).any(2)[0], covers.flatten())
    assert torch.equal(before[1], after[1])


def test_a_token_does_not_say_where_it_is():
    tokenizer = crops()
    tokens = tokenizer.embed(torch.randn(1, 1, tokenizer.patch_dim).expand(1, 16, -1))
    assert torch.equal(tokens, tokens[:, :1].expand_as(tokens))
    assert (tokenizer.overlaps, tokenizer.placed, tokenizer.extend) == (True, False, ())
    tokenizer.learned_on((3, 3))
    assert (tokenizer.grid, tokenizer.pad({})) == ((4, 4), None)


def test_what_is_put_in_is_what_a_reconstruction_would_be():
    patches = torch.randn(1, 16, 192)
    assert torch.equal(crops().target(patches), patches)
    assert torch.equal(crops().untarget(patches, patches + 1), patches)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"stride": 9, "patch_size": 8}, r"stride of \[9, 9\] leaves out pixels between patches of \[8, 8\]"),
        ({"stride": 0}, "above 0"),
        ({"blocks": [1], "channels": [4]}, "each stage needs blocks, channels and bottlenecks"),
        ({"norm": "batch"}, "norm"),
        ({"patchsize": 8}, "did you mean 'patch_size'"),
    ],
)
def test_impossible_settings_are_told(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        validate(CropTokenizer, settings, "recipe")


def config(tokenizer, signal=None, **model):
    backbone = {"name": "pixelcnn", "dim": 12, "depth": 1, "input_dim": 16}
    model = {"tokenizer": tokenizer, "backbone": backbone, "cls_token": False, "output": "latent", **model}
    return typed(EncoderConfig, "image", "test")(modality="image", signal={"size": 20, **(signal or {})}, model=model)


SETTINGS = {"name": "crops", "patch_size": 8, "stride": 4, **NETWORK}


def test_the_name_tells_which_tokenizer_and_patches_are_usual():
    assert config({"patch_size": 4}).model.tokenizer == ImageTokenizer(patch_size=4)
    assert config(SETTINGS).model.tokenizer == CropTokenizer(patch_size=8, stride=4, **NETWORK)
    with pytest.raises(ValueError, match="nearest size that does is"):
        Encoder(config(SETTINGS, {"buckets": [[20, 21]]}))


def test_an_encoder_gives_the_mean_of_its_patches_and_comes_back_from_its_folder(tmp_path):
    encoder = Encoder(config(SETTINGS)).eval()
    signal = torch.randn(2, 3, 20, 20)
    z = encoder.tokenizer.embed(encoder.tokenizer.patches({"signal": signal}))
    torch.testing.assert_close(encoder.features(signal), z.mean(1))
    assert encoder.dim == 16
    encoder.save(tmp_path / "encoder")
    again = load(tmp_path / "encoder")
    assert isinstance(again.tokenizer, Crops)
    assert torch.equal(again.features(signal), encoder.features(signal))
    tokens, grid = again.tokens(signal)
    assert (tokens.shape, grid) == ((2, 16, 16), (4, 4))
