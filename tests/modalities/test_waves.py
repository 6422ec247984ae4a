"""Tokens of waveforms and encoders of them: cut exactly, blind to what is later, the same in a stream as at once."""

import pytest
import torch
from media import tone, write_sound

from mmssl.errors import UserError
from modalities.encoder import Encoder, load
from modalities.waves import Waves
from tasks.build import build_objective, load_recipe
from tasks.pretrain import pretrain

HOP, SAMPLES = 40, 800
TINY = {
    "signal.sample_rate": 8000, "signal.seconds": SAMPLES / 8000,
    "model.tokenizer.kernels": [10, 8, 4], "model.tokenizer.strides": [5, 4, 2],
}  # fmt: skip
BACKBONES = {
    "gru": {"name": "gru", "dim": 8, "input_dim": 6, "depth": 2},
    "lstm": {"name": "lstm", "dim": 8, "input_dim": 6, "depth": 2},
    "causal": {"name": "causal", "dim": 8, "input_dim": 6, "num_heads": 2, "memory": None},
    "causal, short memory": {"name": "causal", "dim": 8, "input_dim": 6, "num_heads": 2, "memory": 3},
}
backbones = pytest.mark.parametrize("backbone", BACKBONES)
norms = pytest.mark.parametrize("norm", ["channel", "none"])


def encoder_of(backbone="gru", norm="channel", **settings) -> Encoder:
    changes = {**TINY, "model.backbone": BACKBONES[backbone], "model.tokenizer.norm": norm, **settings}
    return Encoder(load_recipe("cpc-audio-tiny", changes)).eval()


def encode(encoder: Encoder, signal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens and the contexts of signals [B, 1, samples]."""
    z = encoder.tokenizer.embed(encoder.tokenizer.patches({"signal": signal}))
    return z, encoder.backbone(z)


@backbones
@norms
def test_what_is_later_changes_nothing_to_the_bit_and_gets_no_gradient(backbone, norm):
    encoder, x, t = encoder_of(backbone, norm), torch.randn(3, 1, SAMPLES), 7
    changed = torch.cat([x[..., : t * HOP], 100 * torch.randn(3, 1, SAMPLES - t * HOP)], 2)
    for before, after in zip(encode(encoder, x), encode(encoder, changed), strict=True):
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t:], after[:, t:])
    x.requires_grad_()
    for made in encode(encoder, x):
        (grad,) = torch.autograd.grad(made[:, :t].square().sum(), x, retain_graph=True)
        assert (grad[..., t * HOP :] == 0).all()
        assert (grad[..., : t * HOP] != 0).any(-1).all()


@backbones
@pytest.mark.parametrize("output", ["context", "latent"])
@pytest.mark.parametrize("chunks", [(1,) * 20, (20,), (7, 1, 12)], ids=str)
@torch.no_grad()
def test_chunks_of_any_size_are_the_whole(backbone, output, chunks):
    encoder = encoder_of(backbone, **{"model.output": output})
    x, state, found = torch.randn(3, 1, SAMPLES), None, []
    for chunk in x.split([n * HOP for n in chunks], 2):
        vectors, state = encoder.step(chunk, state)
        found.append(vectors)
    whole = encoder(encoder.tokenizer.patches({"signal": x}))
    assert whole.shape == (3, 20, 6 if output == "latent" else 8)
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-5, rtol=0)


@backbones
@torch.no_grad()
def test_a_state_is_each_samples_own(backbone):
    encoder, x = encoder_of(backbone), torch.randn(3, 1, SAMPLES)
    _, state = encoder.step(x[..., :400])
    together, _ = encoder.step(x[..., 400:], state)
    order = torch.tensor([2, 0])
    turned = tuple(tuple(part[order] for part in half) for half in state)
    torch.testing.assert_close(encoder.step(x[order, :, 400:], turned)[0], together[order])
    again, _ = encoder.step(x[..., 400:], state)  # a state is not used up
    assert torch.equal(again, together)


@pytest.mark.parametrize(("chunk", "words"), [
    (torch.zeros(1, 2, 400), r"float \[B, 1, n \* 40\], but this one is torch\.float32 \[1, 2, 400\]"),
    (torch.zeros(1, 400), r"but this one is torch\.float32 \[1, 400\]"),
    (torch.zeros(1, 1, 400, dtype=torch.int16), r"but this one is torch\.int16"),
    (torch.zeros(1, 1, 0), "does not divide"),
])  # fmt: skip
def test_chunks_of_another_kind_are_told(chunk, words):
    with pytest.raises(ValueError, match=words):
        encoder_of().step(chunk)


@backbones
def test_a_state_of_other_signals_is_told(backbone):
    encoder = encoder_of(backbone)
    _, state = encoder.step(torch.zeros(3, 1, 400))
    with pytest.raises(ValueError, match="a chunk of 1 signals cannot go on from a state of 3"):
        encoder.step(torch.zeros(1, 1, 400), state)
    encoder.step(torch.zeros(3, 1, 400, dtype=torch.float64), state)


@backbones
@pytest.mark.parametrize("output", ["context", "latent"])
def test_long_sounds_go_through_in_pieces_and_are_the_same(monkeypatch, backbone, output):
    encoder, x = encoder_of(backbone, **{"model.output": output}), torch.randn(2, 1, SAMPLES)
    seen = []
    encoder.tokenizer.convs.convs[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    (whole, _), features = encoder.tokens(x), encoder.features(x)
    assert seen == [SAMPLES, SAMPLES]
    monkeypatch.setattr("modalities.encoder.CHUNK", 14)
    seen.clear()
    torch.testing.assert_close(encoder.tokens(x)[0], whole, atol=1e-5, rtol=0)
    assert seen == [7 * HOP, 7 * HOP, 6 * HOP]
    torch.testing.assert_close(encoder.features(x), features, atol=1e-5, rtol=0)


def test_how_many_go_together_counts_what_evaluation_may_be_long_and_what_is_made_of_a_sample():
    published = Encoder(load_recipe("cpc-audio"))
    assert published.tokenizer.widens == 512 / 5
    assert published.batch_size == 1
    short = Encoder(load_recipe("cpc-audio", {"signal.longest": 1.28}))
    assert short.batch_size == int(64 * 3 * 224 * 224 / (20480 * 512 / 5)) == 4
    assert encoder_of(**{"signal.longest": 10}).batch_size == int(64 * 3 * 224 * 224 / (80000 * 6 / 5))
    spectrogram = Encoder(load_recipe("audio-mae-tiny"))
    longer = Encoder(load_recipe("audio-mae-tiny", {"signal.longest": 60}))
    assert spectrogram.batch_size == min(256, int(64 * 3 * 224 * 224 / spectrogram.tokenizer.size[0]))
    assert longer.batch_size == int(
        64 * 3 * 224 * 224 / (spectrogram.tokenizer.size[0] * 60 / longer.config.signal.seconds)
    )


def test_a_chunk_is_whole_tokens_and_whole_looks_cannot_be_streamed():
    with pytest.raises(ValueError, match="a sound of 60 samples does not divide into tokens of 40"):
        encoder_of().step(torch.randn(1, 1, 60))
    spectrogram = Encoder(load_recipe("audio-mae-tiny"))
    with pytest.raises(ValueError, match="looks at whole signals"):
        spectrogram.step(torch.randn(1, 1, 400))


def test_patches_are_cut_and_put_back_exactly():
    tokenizer, x = encoder_of().tokenizer, torch.randn(2, 1, SAMPLES)
    patches = tokenizer.patches({"signal": x})
    assert patches.shape == (2, *tokenizer.grid, tokenizer.patch_dim) == (2, 20, HOP)
    assert torch.equal(tokenizer.unpatch(patches), x)
    assert torch.equal(patches[1, 3], x[1, 0, 120:160])
    index = torch.tensor([[3, 0], [1, 1]])
    assert torch.equal(tokenizer.embed(patches, index)[0], tokenizer.embed(patches)[0, index[0]])


def test_the_papers_waves_make_a_hundred_tokens_a_second_of_465_samples_each():
    tokenizer = Waves(16000, 4, (10, 8, 4, 4, 4), (5, 4, 2, 2, 2))
    assert tokenizer.grid == (100,)
    assert tokenizer.convs.sees == 465
    assert tokenizer.overlaps
    assert not tokenizer.placed


@torch.no_grad()
def test_the_edge_is_what_another_past_would_change():
    for tokenizer in (encoder_of().tokenizer, Waves(1600, 4, (10, 8, 4, 4, 4), (5, 4, 2, 2, 2))):
        x = torch.randn(1, 1, 10 * tokenizer.hop)
        _, past = tokenizer.step(torch.randn_like(x))
        changed = (tokenizer.step(x)[0] - tokenizer.step(x, past)[0]).abs().amax((0, 2)) > 1e-5
        assert changed.tolist() == [True] * tokenizer.edge + [False] * (10 - tokenizer.edge)


def test_padding_is_what_is_not_wholly_filled():
    tokenizer, signal = encoder_of().tokenizer, torch.zeros(5, 1, SAMPLES)
    assert tokenizer.pad({"signal": signal}) is None
    pad = tokenizer.pad({"signal": signal, "length": torch.tensor([0, 1, 79, 80, SAMPLES])})
    assert (~pad).sum(1).tolist() == [1, 1, 1, 2, 20]
    assert (pad.diff(dim=1).sum(1) <= 1).all()  # it comes last


def test_padding_does_not_reach_what_is_there():
    encoder, x = encoder_of("causal"), torch.randn(2, 1, SAMPLES)
    padded = torch.cat([x[..., :400], torch.zeros(2, 1, 400)], 2)
    batch = {"signal": padded, "length": torch.tensor([400, 400])}
    vectors = encoder(encoder.tokenizer.patches(batch), pad=encoder.tokenizer.pad(batch))
    torch.testing.assert_close(vectors[:, :10], encode(encoder, x[..., :400])[1])


def test_sounds_of_any_length_are_read_as_one(tmp_path):
    encoder = encoder_of()
    paths = [write_sound(tmp_path / f"{n}.wav", tone(n / 8000, 8000), 8000) for n in (10, 41, 799, 2011, 20000)]
    assert encoder.embed(paths).shape == (5, 8)
    assert [encoder.tokens(path)[1] for path in paths] == [(1,), (1,), (19,), (50,), (500,)]
    long = encoder_of(**{"signal.longest": 0.5})
    assert long.read(str(paths[-1])).shape == (5, 1, 4000)


def test_an_encoder_folder_reads_back(tmp_path, sounds):
    run = pretrain("cpc-audio-tiny", sounds, tmp_path / "run", {
        **TINY, "model.backbone": BACKBONES["causal"], "objective.steps": 2, "train.batch_size": 4, "train.steps": 1,
        "data.workers": 0,
    })  # fmt: skip
    encoder = load(run.run)
    x = torch.randn(2, 1, SAMPLES)
    first = encoder.step(x)[0]
    assert torch.equal(load(tmp_path / "run" / "encoder").step(x)[0], first)
    torch.testing.assert_close(encoder.embed(x), first.detach().mean(1))


@pytest.mark.parametrize(("changes", "words"), [
    ({"model.tokenizer.kernels": [10, 3, 4]}, r"a kernel of 3 with stride 4 leaves values out"),
    ({"model.tokenizer.kernels": [4]}, r"as many kernels as strides, but got \[4\] and \[5, 4, 2\]"),
    ({"model.tokenizer.strides": []}, r"as many kernels as strides"),
    ({"signal.seconds": 0.004, "signal.hop_ms": 1, "signal.window_ms": 2},
     r"signal\.seconds 0\.004 is shorter than a token of 40 samples"),
    ({"signal.spec_mask.time": 2}, r"signal\.spec_mask hides parts of spectrograms"),
    ({"model.cls_token": True}, r"model\.cls_token true needs .* with backbone 'gru' .* set model\.cls_token=false"),
    ({"model.backbone.name": "grou"}, r"grou"),
    ({"model.tokenizer.name": "waves"}, r"waves"),
    ({"model.tokenizer.patch_size": 8}, r"'model\.tokenizer\.patch_size' is not a key"),
])  # fmt: skip
def test_mistakes_are_sentences(changes, words):
    with pytest.raises(UserError, match=words):
        build_objective(load_recipe("cpc-audio-tiny", {**TINY, **changes}))
