"""Texts as tokens of a vocabulary: texts that are their own path, signals, the tokenizer, an encoder, pictures."""

import pickle

import numpy as np
import pytest
import torch

from mmssl.data import inline
from mmssl.data.guard import BrokenFile
from mmssl.errors import UnusableData
from modalities import text, text_bpe
from modalities.encoder import Encoder, EncoderConfig, load, typed
from modalities.text import Text
from modalities.text_bpe import Coder, coder, learn_merges
from modalities.text_read import Document
from modalities.text_settings import BPETokenizer, TextSignal

TEXT = Text()


@pytest.fixture(scope="module")
def merges():
    return learn_merges(["a photo of a cat", "another photo of the dog", "日本語 of the cat"] * 2, 600)


def settings(merges, **others):
    return BPETokenizer(vocab_size=600, merges=merges, **others)


def encoder(merges, vocab_size=600, signal=None, pool="last", **backbone):
    config = typed(EncoderConfig, "text", "test")
    causal = {"name": "causal", "dim": 16, "depth": 2, "num_heads": 2, "rotary": False, "memory": None}
    model = {
        "tokenizer": {"name": "bpe", "vocab_size": vocab_size, "merges": merges},
        "backbone": backbone or causal,
        "cls_token": False,
        "pool": pool,
    }
    return Encoder(config(modality="text", signal=signal or {"context": 12}, model=model)).eval()


def tokens(signal):
    """Return the numbers of the tokens in a signal [1, context]."""
    values = signal[0].long()
    return (values[values > 0] - 1).tolist()


# Texts that are their own path


def test_a_text_is_its_own_path():
    given = "Größe: 5 % of 日本語 🙂?\r\nYes. #t=1,2"
    path = inline.join(given)
    assert TEXT.decode(path) == Document(given.replace("\r\n", "\n"))
    assert TEXT.inspect(path) == (len(given) - 1, 3)
    (sample,) = TEXT.views(TextSignal())(inline.join("A b. C d."), [np.random.default_rng(0)], (2, 5))
    assert sample["signal"].shape == (1, 2, 5)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (inline.join(""), "empty text"),
        (inline.join(" \n\u3000"), "no text in it but white space"),
        (inline.join("a\0b"), "not a text: there are NUL bytes in it"),
        (inline.join("ab\ud800"), "not a text: half a character (a lone surrogate) at 2"),
        ("data:,a%ff", "not UTF-8 text: byte 0xff at 1"),
    ],
)
def test_texts_that_are_none(merges, path, reason):
    for reading in (TEXT.decode, TEXT.inspect):
        with pytest.raises(BrokenFile) as caught:
            reading(path)
        assert caught.value.reason == reason
    for tokenizer in (None, settings(merges)):
        with pytest.raises(BrokenFile) as caught:
            TEXT.views(TextSignal(), tokenizer)(path, [np.random.default_rng(0)], (77,))
        assert caught.value.reason == reason
    with pytest.raises(UnusableData):
        encoder(merges).embed([path])


# Signals


def test_signals_for_training_and_evaluation_are_one(tmp_path, merges):
    signal, tokenizer = TextSignal(context=9), settings(merges)
    assert TEXT.sizes(signal, tokenizer) == ((9,),)
    views = pickle.loads(pickle.dumps(TEXT.views(signal, tokenizer)))
    transform = pickle.loads(pickle.dumps(TEXT.eval_transform(signal, tokenizer)))
    (tmp_path / "x.txt").write_text("A photo.\nOf a", encoding="utf-8")
    for path in (inline.join("A photo.\nOf a"), str(tmp_path / "x.txt")):
        one, two = (sample["signal"] for sample in views(path, [np.random.default_rng(i) for i in range(2)], (9,)))
        assert one.shape == (1, 9)
        assert one.dtype == torch.float32
        assert torch.equal(one, two)
        assert torch.equal(one, transform(TEXT.decode(path)))
        assert tokens(one) == coder(merges).encode("A photo.\nOf a", 9)
    with pytest.raises(TypeError, match="a decoded text"):
        transform("a cat")
    with pytest.raises(ValueError, match="nothing in it but white space"):
        transform(Document(" "))


def test_a_vocabulary_that_is_not_learned_yet():
    for make in (TEXT.views, TEXT.eval_transform):
        with pytest.raises(ValueError, match="the vocabulary is learned when training starts"):
            make(TextSignal(), BPETokenizer())
    tokenizer = TEXT.tokenizer(TextSignal(), BPETokenizer(), 8)  # so that a run can be planned
    with pytest.raises(ValueError, match="the vocabulary is learned when training starts"):
        tokenizer.unpatch(torch.ones(1, 3, 1))


# The tokenizer


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_only_what_is_asked_for_is_embedded_with_its_place(merges, positions):
    tokenizer = TEXT.tokenizer(TextSignal(context=6), settings(merges, positions=positions), 8)
    assert (tokenizer.grid, tokenizer.placed, tokenizer.overlaps, tokenizer.edge) == ((6,), True, False, 0)
    signal = torch.tensor([[[599.0, 5, 5, 600, 0, 0]], [[599.0, 5, 600, 0, 0, 0]]])
    patches = tokenizer.patches({"signal": signal})
    assert patches.shape == (2, 6, 1)
    assert tokenizer.pad({"signal": signal}).tolist() == [[False] * 4 + [True] * 2, [False] * 3 + [True] * 3]
    found = tokenizer.embed(patches)
    table = tokenizer.positions((6,))
    torch.testing.assert_close(found[0, 1] - table[1], tokenizer.words.weight[4])
    torch.testing.assert_close(found[0, 3] - table[3], tokenizer.words.weight[599])
    assert not torch.equal(found[0, 1], found[0, 2])
    index = torch.tensor([[3, 0], [2, 1]])
    torch.testing.assert_close(tokenizer.embed(patches, index), torch.stack([found[0, [3, 0]], found[1, [2, 1]]]))
    with pytest.raises(ValueError, match="a sequence of tokens is needed"):
        tokenizer.grid_of((3, 4))
    with pytest.raises(IndexError):
        tokenizer.embed(torch.full((1, 6, 1), 601.0))


def test_weights_begin_as_clips():
    torch.manual_seed(0)
    tokenizer = TEXT.tokenizer(TextSignal(), BPETokenizer(), 64)
    assert tokenizer.words.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert tokenizer.positions.table.std().item() == pytest.approx(0.01, rel=0.05)
    assert isinstance(tokenizer.positions.table, torch.nn.Parameter)


def test_an_encoder_of_texts(tmp_path, merges):
    model = encoder(merges)
    given = ["A photo of a cat", "日本語 🙂", "another photo of " * 20]
    vectors = model.embed([Document(words) for words in given])
    assert vectors.shape == (3, 16)
    torch.testing.assert_close(model.embed([inline.join(words) for words in given]), vectors)
    torch.testing.assert_close(model.embed([Document("  a PHOTO of\na cat")]), vectors[:1])
    assert not torch.equal(vectors[0], vectors[1])
    model.save(tmp_path / "e")
    again = load(tmp_path / "e")
    assert torch.equal(again.embed([Document(words) for words in given]), vectors)
    assert again.fingerprint() == model.fingerprint()


@pytest.mark.parametrize("backbone", [{}, {"name": "vit", "dim": 16, "depth": 1, "num_heads": 2}])
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_padding_is_seen_by_nobody(merges, backbone, pool):
    model = encoder(merges, pool=pool, **backbone)
    signal = model.transform(Document("a cat"))
    count = len(tokens(signal))
    junk = signal.clone()
    junk[:, count:] = 0
    with torch.no_grad():
        model.tokenizer.words.weight[0] += 1.0  # what padding is embedded as
        model.tokenizer.positions.table[count:] += 1.0
    changed = model.features(junk[None])
    with torch.no_grad():
        model.tokenizer.words.weight[0] -= 1.0
        model.tokenizer.positions.table[count:] -= 1.0
    torch.testing.assert_close(model.features(signal[None]), changed, rtol=0, atol=1e-5)


def test_the_last_token_is_the_end_of_text(merges):
    model = encoder(merges)
    signal = model.transform(Document("a cat"))
    latent, _ = model._latent(signal[None])
    end = len(tokens(signal)) - 1
    assert tokens(signal)[end] == coder(merges).end
    torch.testing.assert_close(model.features(signal[None]), latent[:, end])


# What people see


def test_a_picture_has_a_line_for_a_token(merges):
    tokenizer = TEXT.tokenizer(TextSignal(context=8), settings(merges), 8)
    signal = TEXT.eval_transform(TextSignal(context=8), settings(merges))(Document("a photo, é"))
    spelt = tokenizer.unpatch(tokenizer.patches({"signal": signal[None]}))
    rows = [bytes((row[row > 0] - 1).int().tolist()) for row in spelt[0, 0]]
    assert rows[:2] == [b"<|startoftext|>", b"a "]
    assert b"".join(rows).decode() == "<|startoftext|>a photo , é <|endoftext|>"
    picture = TEXT.picture(spelt[0], TextSignal())
    assert picture.shape[0] == 8 * text.LINE_HEIGHT
    dark = (picture.min(2) < 128).reshape(8, -1).any(1)
    assert dark.tolist() == [bool(row) for row in rows]
    assert TEXT.lattice(np.arange(8), (8,)).shape == (8, 1)


def test_coders_are_made_once(merges, monkeypatch):
    coder.cache_clear()
    made = []
    monkeypatch.setattr(text_bpe, "Coder", lambda merges: made.append(merges) or Coder(merges))
    transform = TEXT.eval_transform(TextSignal(), settings(merges))
    for _ in range(3):
        transform(Document("a cat"))
    assert made == [merges]
