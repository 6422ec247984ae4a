"""The tokenizer of sounds: patches of log-mel spectrograms, padding that nobody sees, any duration, MAE on them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from media import tone, write_sound
from transformers import ASTConfig
from transformers.models.audio_spectrogram_transformer.modeling_audio_spectrogram_transformer import ASTPatchEmbeddings

from mmssl.data.dataset import Sample, collate
from mmssl.heads.decoder import MaskedDecoder
from mmssl.masking import MASKS
from mmssl.objectives.mae import MAE
from modalities.audio_settings import AudioSignal, AudioTokenizer
from modalities.encoder import MODALITIES, Encoder, EncoderConfig, load, typed
from modalities.fbank import LogMel

AUDIO = MODALITIES["audio"]
SMALL = {"sample_rate": 8000, "seconds": 0.64, "mels": 32}
"""64 frames, 4 x 8 tokens of 8 x 8."""


def tokenizer(patch_size=(8, 8), dim=16, seconds=0.64, **settings):
    return AUDIO.tokenizer(
        AudioSignal(**{**SMALL, "seconds": seconds}), AudioTokenizer(patch_size=patch_size, **settings), dim
    )


def waves(batch, frames=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(batch, 1, LogMel(8000, 32).samples(frames), generator=generator)


def encoder(cls_token=True, target="normalized", **signal):
    model = {
        "tokenizer": {"patch_size": [8, 8], "target": target},
        "backbone": {"dim": 16, "depth": 2, "num_heads": 2},
        "cls_token": cls_token,
    }
    return Encoder(typed(EncoderConfig, "audio", "test")(modality="audio", signal={**SMALL, **signal}, model=model))


def test_patches_are_cut_from_the_normalised_log_mel_spectrogram():
    ours, x = tokenizer(), waves(2)
    log_mel = LogMel(8000, 32)(x[:, 0])
    torch.testing.assert_close(ours.spectrogram({"signal": x})[:, 0], (log_mel + 4.268) / 9.138)
    patches = ours.patches({"signal": x})
    assert patches.shape == (2, 4 * 8, 64)
    low_second = ours.spectrogram({"signal": x})[:, 0, :8, 8:16]
    assert torch.equal(patches[:, 1], low_second.flatten(1))
    assert torch.equal(ours.unpatch(patches), ours.spectrogram({"signal": x}))


def test_sizes_and_grids():
    ours = tokenizer()
    assert (ours.size, ours.grid, ours.channels, ours.patch_dim, ours.extend) == ((5240,), (4, 8), 1, 64, (1,))
    assert [ours.grid_of((ours.log_mel.samples(n) + extra,)) for n, extra in ((8, 0), (80, 79))] == [(4, 1), (4, 10)]
    assert AUDIO.sizes(AudioSignal(**SMALL), AudioTokenizer()) == ((5240,),)
    assert AUDIO.tokenizer(AudioSignal(), AudioTokenizer(), 8).grid == (8, 64)


def test_what_does_not_divide_is_told_with_the_nearest_duration():
    with pytest.raises(
        ValueError, match=r"200 frames \(signal\.seconds 2\) .* 16 frames; take signal\.seconds 1\.92 or 2\.08 "
    ):
        tokenizer((16, 16), seconds=2.0)
    with pytest.raises(ValueError, match=r"take signal\.seconds 0\.16 \(1400 samples\)"):
        tokenizer((16, 16), seconds=0.1)
    # A hop of 160.48 samples becomes one of 160; what is advised is accepted all the same.
    with pytest.raises(ValueError, match=r"take signal\.seconds 1\.76528 or 1\.92576 "):
        AUDIO.tokenizer(AudioSignal(hop_ms=10.03, seconds=1.92), AudioTokenizer(), 8)
    for seconds, frames in {1.76528: 176, 1.92576: 192}.items():
        signal = AudioSignal(hop_ms=10.03, seconds=seconds)
        assert signal.frames == frames
        assert AUDIO.tokenizer(signal, AudioTokenizer(), 8).grid == (8, frames // 16)
    with pytest.raises(ValueError, match=r"32 mel bins \(signal\.mels\) do not divide into patches of 10"):
        tokenizer((10, 8))
    with pytest.raises(ValueError, match=r"98 frames"):
        tokenizer().grid_of((8000,))


def test_the_embedding_is_asts_where_its_patches_do_not_overlap():
    """transformers' ASTPatchEmbeddings: a convolution over [B, frames, mels], tokens frequency by frequency."""
    config = ASTConfig(hidden_size=16, patch_size=8, frequency_stride=8, time_stride=8, num_mel_bins=32, max_length=64)
    theirs, ours = ASTPatchEmbeddings(config), tokenizer()
    with torch.no_grad():
        ours.proj.weight.copy_(theirs.projection.weight.flatten(1))
        ours.proj.bias.copy_(theirs.projection.bias)
    batch = {"signal": waves(2)}
    expected = theirs(ours.spectrogram(batch)[:, 0].transpose(1, 2))
    torch.testing.assert_close(ours.embed(ours.patches(batch)) - ours.positions(), expected, rtol=1e-5, atol=1e-5)


def test_spec_augment_hides_what_the_sample_says():
    ours, x = tokenizer(), waves(2)
    stripes = torch.tensor([[3, 7, 30, 32], [0, 0, 5, 6]])
    whole = ours.spectrogram({"signal": x})
    hidden = ours.spectrogram({"signal": x, "spec_mask": stripes})
    expected = whole.clone()
    expected[0, :, :, 3:7] = 0
    expected[0, :, 30:32] = 0
    expected[1, :, 5:6] = 0
    assert torch.equal(hidden, expected)


@pytest.mark.parametrize(
    ("length", "columns"), [(5240, 8), (5239, 7), (760 + 640, 2), (760 + 639, 1), (760, 1), (759, 1), (1, 1)]
)
def test_a_token_is_padding_if_any_of_its_frames_reaches_into_it(length, columns):
    ours, x = tokenizer(), waves(1)
    assert ours.pad({"signal": x}) is None
    pad = ours.pad({"signal": x, "length": torch.tensor([length])})
    assert torch.equal(pad.view(4, 8), (torch.arange(8) >= columns).expand(4, 8))
    if length >= 760:
        changed = x.clone()
        changed[..., length:] += 1
        moved = (ours.patches({"signal": changed}) != ours.patches({"signal": x})).any(2)
        assert not (moved & ~pad).any()


def mae(kind="random", cls_token=True, attention="global"):
    torch.manual_seed(0)
    whole = encoder(cls_token)
    cut = whole.tokenizer
    decoder = MaskedDecoder(16, cut.patch_dim, cut.grid, 16, 2, 2, attention=attention, window=3, extend=cut.extend)
    return MAE(whole, decoder, MASKS[kind](0.6))


def padded_batch(objective, draw_batch):
    batch = draw_batch(objective, waves(3))
    return {**batch, "length": torch.tensor([5240, 3000, 900])}


def run(objective, batch):
    objective.zero_grad()
    loss = objective(batch).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in objective.parameters() if p.grad is not None]


@pytest.mark.parametrize("attention", ["global", "local"])
@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("kind", ["random", "time", "frequency", "time_frequency"])
def test_padding_is_never_seen_nor_scored(draw_batch, kind, cls_token, attention):
    objective = mae(kind, cls_token, attention)
    batch = padded_batch(objective, draw_batch)
    loss, gradients = run(objective, batch)
    assert torch.isfinite(loss)
    other = batch["signal"].clone()
    for row, length in enumerate(batch["length"]):
        other[row, :, length:] = torch.randn_like(other[row, :, length:])
    again, others = run(objective, {**batch, "signal": other})
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(others, gradients, rtol=1e-4, atol=1e-6)
    # And what is no padding does matter.
    heard, _ = run(objective, {**batch, "signal": other, "length": torch.full((3,), 5240)})
    assert abs(heard - loss) > 2e-5


def test_padding_is_not_pooled(draw_batch):
    whole = encoder()
    batch = {"signal": waves(2), "length": torch.tensor([5240, 2000])}
    pad = whole.tokenizer.pad(batch)
    vectors = whole.pool(whole(whole.tokenizer.patches(batch), pad=pad), pad)
    batch["signal"][1, :, 2000:] = 0.3
    torch.testing.assert_close(whole.pool(whole(whole.tokenizer.patches(batch), pad=pad), pad), vectors)
    # A padded sound is the sound cut to its whole columns, as evaluation cuts it.
    frames = whole.tokenizer.log_mel.frames(2000) // 8 * 8
    alone = batch["signal"][1:, :, : whole.tokenizer.log_mel.samples(frames)]
    torch.testing.assert_close(whole.features(alone), vectors[1:].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fill", ["pad", "repeat"])
@pytest.mark.parametrize("kind", ["random", "time", "frequency", "time_frequency"])
def test_a_step_on_files_of_all_durations(tmp_path, kind, fill):
    objective = mae(kind)
    signal = AudioSignal(**SMALL, fill=fill, spec_mask={"time": 4, "frequency": 2}, gain_db=3)
    views, grid = AUDIO.views(signal), objective.encoder.tokenizer.grid
    samples = []
    for i, seconds in enumerate((0.05, 0.3, 2.0)):
        path, rng = (
            write_sound(tmp_path / f"{i}.wav", tone(seconds, 11025, 300 + 200 * i), 11025),
            np.random.default_rng(i),
        )
        (view,) = views(str(path), [rng], AUDIO.sizes(signal, AudioTokenizer())[0])
        samples.append(Sample({**view, **objective.draw()(rng, grid), "seed": i}, []))
    batch, _ = collate(samples)
    assert ("length" in batch) == (fill == "pad")
    before = [p.detach().clone() for p in objective.parameters()]
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    loss = objective(batch).loss
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert sum(not torch.equal(a, b) for a, b in zip(before, objective.parameters(), strict=True)) > len(before) - 3
    assert all(torch.isfinite(p).all() for p in objective.parameters())


def test_files_of_any_duration_and_rate_are_embedded_as_their_samples_are(tmp_path):
    whole = encoder(longest=1.5).eval()
    whole.save(tmp_path / "encoder")
    whole = load(tmp_path / "encoder")
    paths = []
    for seconds, rate in [(0.01, 8000), (0.3, 8000), (0.64, 44100), (1.4, 16000), (3.7, 22050)]:
        paths.append(write_sound(tmp_path / f"{seconds}.wav", tone(seconds, rate, 500), rate))
    vectors = whole.embed(paths)
    assert vectors.shape == (5, 16)
    assert torch.isfinite(vectors).all()
    for path, vector in zip(paths, vectors, strict=True):
        sound = whole.decode(str(path))
        torch.testing.assert_close(whole.embed(sound)[0], vector)
        torch.testing.assert_close(whole.embed([whole.transform(sound)])[0], vector)
    views = whole.transform(whole.decode(str(paths[-1])))
    assert views.shape[:2] == (3, 1)
    torch.testing.assert_close(whole.embed(list(views)).mean(0), vectors[-1])
    part = whole.embed(f"{paths[3]}#t=0.25,0.75")
    samples = whole.decode(str(paths[3]))
    torch.testing.assert_close(part, whole.embed(replace(samples, waveform=samples.waveform[4000:12000])))


def test_tokens_of_a_longer_sound_count_on(tmp_path):
    whole = encoder(longest=5).eval()
    tokens, grid = whole.tokens(waves(1, frames=136))
    assert (tokens.shape, grid) == ((1, 4 * 17, 16), (4, 17))
    long, short = whole.tokenizer.positions((4, 17)).view(4, 17, 16), whole.tokenizer.positions().view(4, 8, 16)
    torch.testing.assert_close(long[:, :8], short)


def test_reconstructions_are_spectrograms(draw_batch):
    objective = mae()
    batch = draw_batch(objective, waves(2))
    made = objective.reconstruct(batch)
    spectrogram = objective.encoder.tokenizer.spectrogram(batch)
    assert made.filled.shape == made.hidden.shape == spectrogram.shape == (2, 1, 32, 64)
    assert torch.equal(made.original, spectrogram)
    seen = made.hidden == 0
    assert torch.equal(made.filled[seen], spectrogram[seen])
    assert made.hidden.mean() == pytest.approx(20 / 32)


@pytest.mark.parametrize("target", ["normalized", "raw"])
def test_the_target_is_as_the_recipe_says(target):
    patches = tokenizer().patches({"signal": waves(1)})
    chosen = tokenizer(target=target).target(patches)
    assert torch.equal(chosen, patches) == (target == "raw")


def test_the_spectrogram_is_fp32_under_autocast():
    ours, batch = tokenizer(), {"signal": waves(1)}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.patches(batch), ours.patches(batch).float())
        under = ours.spectrogram(batch)
    assert under.dtype == torch.float32
    assert torch.equal(under, ours.spectrogram(batch))
