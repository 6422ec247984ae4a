"""Other sizes and aspect ratios than an encoder's own, from 96 to 448 pixels and up to 1:3, without padding."""

from math import prod

import numpy as np
import PIL.Image
import pytest
import torch

from mmssl.data.listing import list_files
from mmssl.run import Run
from modalities.encoder import MODALITIES, load
from modalities.views import in_groups
from tasks.features import extract
from tasks.pretrain import pretrain

WALK = [(96, 96), (96, 288), (288, 96), (160, 224), (224, 224), (304, 112), (384, 384), (448, 448), (144, 432)]


@pytest.fixture
def walker(tiny_mae):
    """A MAE made for 224 x 224 pixels in patches of 16."""
    return tiny_mae(size=(224, 224), patch_size=(16, 16))


@pytest.mark.parametrize("size", WALK)
def test_one_model_learns_and_reconstructs_at_any_size(walker, draw_batch, size):
    signal = torch.randn(2, 3, *size)
    batch = draw_batch(walker, signal)
    tokens = prod(size) // 256
    assert batch["keep"].shape[1] + batch["drop"].shape[1] == tokens
    assert batch["keep"].shape[1] == tokens // 4
    loss = walker(batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in walker.parameters())
    original, filled, hidden, _ = walker.reconstruct(batch)
    assert torch.equal(original, signal)
    assert filled.shape == signal.shape
    assert torch.equal(filled[hidden == 0], signal[hidden == 0])
    assert hidden.mean() == pytest.approx(batch["drop"].shape[1] / tokens)


@pytest.mark.parametrize("positions", ["sincos", "learned"])
def test_a_mixed_list_is_embedded_as_each_alone(tiny_encoder, positions):
    encoder = tiny_encoder(size=(224, 224), patch_size=(16, 16), positions=positions).eval()
    signals = [torch.randn(3, *size) for size in [*WALK, WALK[1], WALK[0]]]
    together = encoder.embed(signals, batch_size=len(signals))
    for signal, row in zip(signals, together, strict=True):
        torch.testing.assert_close(encoder.embed(signal)[0], row, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="different token grids"):
        encoder.tokens(signals[:2])


def test_groups_keep_the_order_and_never_pad():
    seen = []

    def total(batch):
        seen.append(tuple(batch.shape))
        return batch.sum((1, 2))

    signals = [torch.full((1, n), float(i)) for i, n in enumerate([2, 3, 2, 3, 3])]
    assert [float(row) for row in in_groups(signals, total)] == [0, 3, 4, 9, 12]
    assert seen == [(2, 1, 2), (3, 1, 3)]


@pytest.fixture(scope="module")
def panoramas(tmp_path_factory):
    """40 pictures: squares, wide ones of 1:3, tall ones of 3:1 and one that stands upright by its EXIF alone."""
    folder, rng = tmp_path_factory.mktemp("panoramas"), np.random.default_rng(0)
    for i in range(40):
        height, width = [(24, 24), (16, 48), (48, 16), (20, 28)][i % 4]
        pixels = rng.integers(0, 255, (height // 4, width // 4, 3), dtype=np.uint8)
        image = PIL.Image.fromarray(pixels).resize((width, height), PIL.Image.Resampling.BICUBIC)
        exif = PIL.Image.Exif()
        if i == 1:
            exif[0x0112] = 6
        image.save(folder / f"{i:02d}.png", exif=exif)
    (folder / "broken.png").write_bytes(b"not a picture")
    return folder


BUCKETS = {"signal.size": [16, 16], "signal.buckets": [[8, 24], [24, 8]], "data.max_bad_fraction": 0.5}


def test_each_picture_goes_to_the_bucket_of_its_aspect(panoramas):
    kind = MODALITIES["image"]
    signal = kind.signal_type(size=16, buckets=[[8, 24], [24, 8]])
    chosen = [kind.bucket(str(path), signal) for path in sorted(panoramas.glob("*.png"))]
    assert chosen == [0, 2, 2, 0] + [0, 1, 2, 0] * 9 + [0]


def test_buckets_train_and_evaluate_without_padding(panoramas, tmp_path, tiny_settings, monkeypatch):
    monkeypatch.setenv("MMSSL_CACHE", str(tmp_path / "cache"))
    sizes = {}
    settings = {**tiny_settings, **BUCKETS, "train.steps": 10, "train.batch_size": 4}
    run = pretrain("image-mae-tiny", panoramas, tmp_path / "run", settings).run
    again = pretrain("image-mae-tiny", panoramas, tmp_path / "again", {**settings, "data.workers": 1}).run
    assert [line["loss"] for line in Run(run).metrics()] == [line["loss"] for line in Run(again).metrics()]
    encoder = load(run)
    listing = list_files(panoramas, encoder.kind)
    features = extract(encoder, listing, skip_broken=True, workers=0)
    assert len(features.kept) == 40
    for i, row in zip(features.kept, features.vectors, strict=True):
        signal = encoder.transform(encoder.decode(listing.paths[i]))
        sizes[tuple(signal.shape[1:])] = sizes.get(tuple(signal.shape[1:]), 0) + 1
        torch.testing.assert_close(encoder.embed(signal)[0], row, atol=1e-5, rtol=1e-5)
    assert sizes == {(16, 16): 20, (8, 24): 9, (24, 8): 11}


def test_buckets_resume_and_accumulate_alike(panoramas, tmp_path, tiny_settings):
    settings = {**tiny_settings, **BUCKETS, "train.steps": 8, "train.batch_size": 4, "train.ema": None}
    whole = pretrain("image-mae-tiny", panoramas, tmp_path / "whole", settings).run
    parts = pretrain("image-mae-tiny", panoramas, tmp_path / "parts", {**settings, "train.accumulate": 2}).run
    losses = [[line["loss"] for line in Run(path).metrics()] for path in (whole, parts)]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=1e-5, rtol=0)
