"""Texts: sentences, every fault, random and evaluation passages, the two tokenizers, pictures."""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mmssl.contracts import StreamsSignal
from mmssl.data.guard import BrokenFile
from mmssl.errors import UserError
from modalities import text, text_read
from modalities.encoder import Encoder, EncoderConfig, typed
from modalities.text import ByteTokenizer, SentenceTokenizer, Text, TextSignal
from modalities.text_read import Document, bounded, sentences
from modalities.text_tokens import Bytes, Sentences
from tasks.build import build_objective, load_recipe
from tasks.data_check import check

TEXT = Text()
SIGNAL = TextSignal(sentences=4, length=12, bytes=24)
WORDS = ["Über Öl.", "Go! ", "日本語です。", "It is 3.5 m.", "Why?\n", "naïve — 🙂 …", "end"]


def encoder(tokenizer="bytes", **model):
    config = typed(EncoderConfig, "text", "test")
    backbone = {"name": "gru", "dim": 12, "input_dim": 8}
    settings = {"tokenizer": {"name": tokenizer}, "backbone": backbone, "cls_token": False, **model}
    return Encoder(config(modality="text", signal=SIGNAL.model_dump(), model=settings)).eval()


def write(folder, content, name="x.txt"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def written(signal):
    """Return the text in a signal [..., L], rows joined."""
    values = signal.flatten().long()
    return bytes((values[values > 0] - 1).tolist()).decode()


def signal_of(*rows, length=12):
    """Return a signal float32 [1, 1, rows, length] of texts."""
    return text._filled([row.encode() for row in rows], (len(rows), length))[None, None]


def rngs(count):
    return [np.random.default_rng(i) for i in range(count)]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("No end", ["No end"]),
        ("Dr. No met J. Doe, e.g. in the U.S. army. Yes.", ["Dr. No met J. Doe, e.g. in the U.S. army.", "Yes."]),
        ("See fig. 3 (cf. p. 4). So do I. We too.", ["See fig. 3 (cf. p. 4).", "So do I.", "We too."]),
        ("It is 3.14. See a.txt now.", ["It is 3.14.", "See a.txt now."]),
        ('"Why?" he said. (Really?!) Well ...', ['"Why?"', "he said.", "(Really?!)", "Well ..."]),
        ("日本語です。次！終", ["日本語です。", "次！", "終"]),  # noqa: RUF001
        ("«Été…» Où ?  Là\t!", ["«Été…»", "Où ?", "Là !"]),
        ("a line\nanother\n\n\n  third  ", ["a line", "another", "third"]),
        ("...\n. .", ["...", ".", "."]),
    ],
)
def test_sentences(given, found):
    assert sentences(given) == found


def test_wrapped_lines_are_no_ends():
    assert sentences("One goes\non. Two\n \t\nThree", "wrapped") == ["One goes on.", "Two", "Three"]


def test_nothing_but_white_space_is_lost():
    given = " ".join(WORDS * 3)
    for lines in ("end", "wrapped"):
        assert "".join(" ".join(sentences(given, lines)).split()) == "".join(given.split())


@pytest.mark.parametrize("length", [4, 5, 7, 100])
def test_long_sentences_are_cut_between_characters(length):
    given = ["naïve — 🙂🙂🙂", "ascii only", "ééééééé"]
    pieces = bounded(given, length)
    assert max(map(len, pieces)) <= length
    assert "".join(piece.decode() for piece in pieces) == "".join(given)
    assert len(bounded(["ééé"], 5)) == 2


def test_line_ends_and_byte_order_mark(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbfOne\r\ntwo\rthree")
    assert TEXT.decode(path) == Document("One\ntwo\nthree")
    assert TEXT.inspect(path) == (13, 3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b" \n\t\r\n", "no text in it but white space"),
        (b"\xef\xbb\xbf", "no text in it but white space"),
        (b"abc\0def", "not a text: there are NUL bytes in it"),
        ("naïve".encode("latin-1"), "not UTF-8 text: byte 0xef at 2"),
        ("hello".encode("utf-16"), "not a text: there are NUL bytes in it"),
        ("naïve".encode()[:3], "not UTF-8 text: byte 0xc3 at 2"),
    ],
)
def test_broken_files(tmp_path, content, reason):
    path = write(tmp_path, content)
    for reading in (TEXT.decode, TEXT.inspect, partial(TEXT.views(SIGNAL), rngs=rngs(1), size=(4, 12))):
        with pytest.raises(BrokenFile) as caught:
            reading(path)
        assert caught.value.reason == reason


def test_what_is_no_file(tmp_path):
    for path, reason in ((tmp_path, "is a folder"), (tmp_path / "none.txt", "no such file")):
        with pytest.raises(BrokenFile, match=reason):
            TEXT.decode(str(path))


def test_the_reason_says_where_in_a_long_file(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "LEAST_READ", 0)
    content = bytearray(b"Good text. " * 300)
    content[1500] = 0xE9
    views, reasons = TEXT.views(SIGNAL), []
    for seed in range(40):
        try:
            views(write(tmp_path, bytes(content)), [np.random.default_rng(seed)], (4, 12))
        except BrokenFile as error:
            reasons.append(error.reason)
    assert set(reasons) == {"not UTF-8 text: byte 0xe9 at 1500"}
    assert 0 < len(reasons) < 40  # only what is needed is read


def test_absurdly_large_texts_are_trained_on_and_not_evaluated(tmp_path, monkeypatch):
    monkeypatch.setattr(text_read, "MAX_BYTES", 1000)
    monkeypatch.setattr(text, "LEAST_READ", 0)
    path = write(tmp_path, "Some words. " * 100)
    with pytest.raises(BrokenFile, match="absurdly large"):
        TEXT.decode(path)
    assert len(TEXT.views(SIGNAL)(path, rngs(2), (4, 12))) == 2


@pytest.mark.parametrize("size", [(4, 12), (24,)])
@pytest.mark.parametrize("least", [0, 2**16])
def test_training_passages_are_of_the_file_and_deterministic(tmp_path, monkeypatch, size, least):
    monkeypatch.setattr(text, "LEAST_READ", least)
    whole = " ".join(f"{i} — né {i}." for i in range(200))
    path, views = write(tmp_path, whole), pickle.loads(pickle.dumps(TEXT.views(SIGNAL)))
    found = views(path, rngs(60), size)
    again = [views(path, [rng], size)[0] for rng in rngs(60)]
    assert all(torch.equal(a["signal"], b["signal"]) for a, b in zip(found, again, strict=True))
    passages = [written(sample["signal"]) for sample in found]
    assert all(sample.keys() == {"signal"} for sample in found)
    assert {sample["signal"].shape for sample in found} == {(1, *size)}
    assert len(set(passages)) > 40
    squeezed = "".join(whole.split())
    for passage in passages:
        assert "".join(passage.split()) in squeezed
    if len(size) == 2:
        assert all((sample["signal"][0, :, 0] > 0).all() for sample in found)


def test_first_and_last_sentences_are_drawn_too(tmp_path):
    path = write(tmp_path, "Hm. B! C! D! E! F!")
    found = TEXT.views(SIGNAL)(path, rngs(200), (4, 12))
    assert {written(sample["signal"]) for sample in found} == {"Hm.B!C!D!", "B!C!D!E!", "C!D!E!F!"}


@pytest.mark.parametrize("size", [(4, 12), (24,)])
def test_short_texts_are_filled_up(tmp_path, size):
    (sample,) = TEXT.views(SIGNAL)(write(tmp_path, "Öl!"), rngs(1), size)
    assert written(sample["signal"]) == "Öl!"
    flat = sample["signal"].flatten()
    assert (flat[:4] > 0).all()
    assert (flat[4:] == 0).all()


@pytest.mark.parametrize("count", [1, 3, 7, 8, 9, 50])
@pytest.mark.parametrize("tokenizer", [SentenceTokenizer(), ByteTokenizer()])
def test_evaluation_takes_all_of_a_text_in_passages(count, tokenizer):
    whole = "".join((WORDS * 10)[:count])
    signal = TEXT.eval_transform(SIGNAL, tokenizer)(Document(whole))
    assert signal.dtype == torch.float32
    (size,) = TEXT.sizes(SIGNAL, tokenizer)
    views = signal if signal.ndim == len(size) + 2 else signal.unsqueeze(0)
    parts = [written(view) for view in views]  # each decodes: none begins within a character
    assert "".join("".join(parts).split()) == "".join(whole.split())
    filled = (views > 0).any(-1) if tokenizer.name == "sentences" else views > 0
    counts = filled.flatten(1).sum(1)
    assert views.shape[2] <= size[0]
    assert len(views) == 1 or counts.sum() > size[0]
    # Passages are of about one length, and nothing is filled up that need not be.
    of_one, step = (1, 1) if tokenizer.name == "sentences" else (7, tokenizer.hop)
    assert counts.max() - counts.min() <= of_one
    assert views.shape[2] - counts.max() < step


def test_no_evaluation_passage_is_empty():
    signal = TEXT.eval_transform(TextSignal(bytes=8), ByteTokenizer())(Document("🙂" * 9 + "a"))
    assert (signal[:, 0, 0] > 0).all()
    assert written(signal) == "🙂" * 9 + "a"


def test_only_decoded_texts_are_transformed(tmp_path):
    model = encoder("sentences")
    path = write(tmp_path, "Hello. World.")
    torch.testing.assert_close(model.embed([path]), model.embed([Document("Hello. World.")]))
    with pytest.raises(TypeError, match="a decoded text"):
        model.embed([3])


# Tokenizers


def made(name):
    settings = SentenceTokenizer() if name == "sentences" else ByteTokenizer()
    return TEXT.tokenizer(SIGNAL, settings, 8)


@pytest.mark.parametrize("name", ["sentences", "bytes"])
def test_patches_are_cut_and_restored_exactly(name):
    tokenizer = made(name)
    signal = torch.randint(0, 257, (2, 1, *tokenizer.size)).float()
    cut = tokenizer.patches({"signal": signal})
    assert cut.shape == (2, *tokenizer.grid, tokenizer.patch_dim)
    assert torch.equal(tokenizer.unpatch(cut), signal)
    assert torch.equal(tokenizer.untarget(tokenizer.target(cut), cut), cut)
    tokens = tokenizer.embed(cut)
    assert tokens.shape == (2, *tokenizer.grid, 8)
    index = torch.tensor([[2, 0], [1, 1]])
    picked = torch.stack([tokens[0, [2, 0]], tokens[1, [1, 1]]])
    torch.testing.assert_close(tokenizer.embed(cut, index), picked)
    assert isinstance(tokenizer, StreamsSignal) == tokenizer.overlaps == (name == "bytes")
    assert not tokenizer.placed
    assert tokenizer.edge == (0 if name == "sentences" else 2)  # a token of bytes sees 20, in front of it 12


@pytest.mark.parametrize(("name", "size"), [("sentences", (4, 13)), ("sentences", (24,)), ("bytes", (23,)),
                                            ("bytes", (4,)), ("bytes", (4, 12))])  # fmt: skip
def test_sizes_that_do_not_fit(name, size):
    with pytest.raises(ValueError, match=r"bytes"):
        made(name).grid_of(size)


def test_padding_is_what_begins_behind_the_text():
    signal = signal_of("abc.", "", "")
    assert made("sentences").pad({"signal": signal}).tolist() == [[False, True, True]]
    flat = text._filled([b"123456789"], (1, 24))[None]
    assert made("bytes").pad({"signal": flat}).tolist() == [[False, False, True]]


def test_a_sentence_is_the_mean_over_its_own_bytes():
    tokenizer, text_ = made("sentences"), "naïve!"
    short = Sentences(1, len(text_.encode()), 8, 32, 7)
    short.load_state_dict(tokenizer.state_dict())
    alone = signal_of(text_, length=len(text_.encode()))
    expected = torch.relu(short.conv(short.embedded(alone[0, 0]).transpose(1, 2))).mean(2)
    torch.testing.assert_close(short.embed(alone[0])[0], expected)
    tokens = tokenizer.embed(signal_of(text_, "")[0])[0]
    torch.testing.assert_close(tokens[:1], expected, rtol=0, atol=1e-6)
    assert (tokens[1] == 0).all()


def test_kernels_of_sentences_have_a_middle():
    with pytest.raises(ValidationError, match=r"kernel must be odd, .* but got 6"):
        SentenceTokenizer(kernel=6)
    assert SentenceTokenizer(kernel=1).kernel == 1


def test_what_is_made_of_a_byte():
    assert made("sentences").widens == 1
    assert Sentences(4, 12, 48, 32, 7).widens == 4
    assert made("bytes").widens == 32  # its embedding
    assert Bytes(24, 512, 32, (8, 4), (4, 2), "none").widens == 128


def test_many_sentences_are_embedded_as_one_by_one():
    tokenizer = made("sentences")
    patches = torch.randint(1, 257, (3, 50, 12)).float()  # more than are embedded at a time
    one_by_one = torch.cat([tokenizer.embed(patches[:, i : i + 1]) for i in range(50)], 1)
    torch.testing.assert_close(tokenizer.embed(patches), one_by_one, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["sentences", "bytes"])
def test_what_comes_later_is_not_known(name):
    model = encoder(name)
    tokenizer = model.tokenizer
    signal = torch.randint(1, 257, (2, 1, *tokenizer.size)).float()
    for t in range(tokenizer.grid[0] - 1):
        changed = tokenizer.patches({"signal": signal}).clone()
        changed[:, t + 1 :] = changed[:, t + 1 :] % 256 + 1
        other = tokenizer.unpatch(changed)
        z, c = (
            [get(tokenizer.patches({"signal": x})) for x in (signal, other)] for get in (tokenizer.embed, model.forward)
        )
        for before, after in (z, c):
            assert torch.equal(before[:, : t + 1], after[:, : t + 1])
            assert not torch.equal(before[:, t + 1], after[:, t + 1])


@pytest.mark.parametrize("name", ["sentences", "bytes"])
@pytest.mark.parametrize("backbone", [{"name": "gru", "dim": 8}, {"name": "vit", "dim": 8, "depth": 1, "num_heads": 2}])
def test_padding_changes_nothing(name, backbone):
    model = encoder(name, backbone=backbone)
    size = model.tokenizer.size
    signal = torch.randint(1, 257, (2, 1, *size)).float()
    padded = torch.cat([signal, torch.zeros_like(signal)], 2)
    features = model.features(signal)
    torch.testing.assert_close(model.features(padded), features, rtol=0, atol=1e-6)
    # Views are averaged, each without its padding.
    both = model.features(torch.stack([padded, padded.flip(0)], 1))
    torch.testing.assert_close(both, features.mean(0).expand(2, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cuts", [[1, 1, 1], [2, 1], [3]])
def test_bytes_are_embedded_as_they_come(cuts):
    model = encoder("bytes")
    hop = model.tokenizer.hop
    signal = torch.randint(1, 257, (2, 1, 3 * hop)).float()
    whole = model(model.tokenizer.patches({"signal": signal}))
    state, parts, start = None, [], 0
    for count in cuts:
        vectors, state = model.step(signal[..., start * hop : (start + count) * hop], state)
        parts.append(vectors)
        start += count
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="whole signals"):
        encoder("sentences").step(signal)


def test_values_that_are_no_bytes_do_no_harm():
    tokenizer = made("bytes")
    assert tokenizer.embed(1e4 * torch.randn(1, 3, tokenizer.hop)).isfinite().all()


# What people see


def test_a_picture_has_a_line_for_a_sentence():
    signal = signal_of("Hello, world", "日本", "")
    picture = TEXT.picture(signal[0], SIGNAL)
    assert picture.dtype == np.uint8
    assert picture.shape[0] == 3 * text.LINE_HEIGHT
    dark = (picture.min(2) < 128).reshape(3, -1).any(1)
    assert dark.tolist() == [True, True, False]
    assert TEXT.lattice(np.arange(3), (3,)).tolist() == [[0], [1], [2]]
    assert TEXT.picture(torch.full((1, 100), 66.0), SIGNAL).shape[0] == 2 * text.LINE_HEIGHT
    assert TEXT.picture(torch.randn(1, 4, 12) * 300, SIGNAL).ndim == 3


def test_files_are_checked_and_have_no_statistics(texts, tmp_path):
    path = write(tmp_path, "x" * 30 + ". Y", "a.txt")
    write(tmp_path, b"\xff", "b.txt")
    result = check(tmp_path, "text", workers=1)
    assert (result.ok, result.extents["median"]) == (1, [33, 2])
    assert result.broken == [{"path": "b.txt", "reason": "not UTF-8 text: byte 0xff at 0"}]
    with pytest.raises(BrokenFile, match="not normalised"):
        TEXT.moments(path, SIGNAL)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model.tokenizer.name": "bytes", "signal.bytes": 7}, "signal.bytes 7 is shorter than a token of 8"),
        ({"model.tokenizer": {"name": "bytes", "kernels": [8]}}, "as many kernels as strides"),
        ({"model.tokenizer": {"name": "bytes", "kernels": [2, 4]}}, "kernel >= stride"),
        ({"signal.sentences": 3}, "objective.steps 3"),
        ({"signal.length": 3}, "signal.length"),
        ({"signal.lines": "wrap"}, "did you mean 'wrapped'"),
        ({"model.tokenizer.name": "words"}, "model.tokenizer.name"),
    ],
)
def test_settings_that_do_not_fit(settings, words):
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        build_objective(load_recipe("cpc-text-tiny", settings))


def test_byte_tokens_of_a_real_size():
    assert made("bytes").hop == ByteTokenizer().hop == 8
    assert Bytes(1024, 8, 4, (8, 4), (4, 2), "none").grid == (128,)
