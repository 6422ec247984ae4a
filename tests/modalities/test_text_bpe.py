"""Byte-level BPE: numbers as CLIP's, learning, vocabularies in files."""

import gzip
import json
import os
import random

import pytest
from transformers import CLIPTokenizer

from mmssl.data import inline
from mmssl.errors import UserError
from modalities import text, text_bpe
from modalities.text import Text
from modalities.text_bpe import coder, learn_merges, read_merges, vocabulary
from modalities.text_settings import BPETokenizer, TextSignal
from tasks.build import build_objective, load_recipe

TEXT = Text()
CAPTIONS = [
    "a photo of a cat",
    "a photo of the other cat, it's not the dog's",
    "A drawing of the naïve café",
    "they're 2 photos of 日本語",
    "there's another photo of there and there",
] * 2
BYTES_ONLY = 514


@pytest.fixture(scope="module")
def merges():
    return learn_merges(CAPTIONS, 600)


@pytest.fixture(scope="module")
def clip(merges, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    write_vocabulary(folder, merges)
    return CLIPTokenizer.from_pretrained(folder)


def write_vocabulary(folder, merges):
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(vocabulary(merges)), encoding="utf-8")


def settings(merges, **others):
    return BPETokenizer(vocab_size=600, merges=merges, **others)


# Numbers


@pytest.mark.parametrize(
    "words",
    [
        "a photo of a cat",
        "The Photo\tOF\r\n\r\nanother   CAT!?  ",
        "naïve café, ǅ ŉ İstanbul ß ẞ ΣΑΣ",
        "cafe\u0301 \u0958 x\u0302\u0301",
        "🙂 👩\u200d👩\u200d👧!",
        "日本語です。次!",
        "it's they're I'LL we'd don't 's '' !'s",
        "2024 12.5% ½ Ⅷ ٣",
        "a\u00a0b\u2003c\u200bd\u0085e\x1cf\ufeff",
        "\x01 control\x7f \x1e",
        "</w> a</w> < |start| >",
    ],
)
def test_numbers_are_those_of_clip(clip, merges, words):
    assert coder(merges).encode(words, 200) == clip(words)["input_ids"]


def test_numbers_of_any_characters_are_those_of_clip(clip, merges):
    draw = random.Random(0)
    ranges = [(32, 40), (1, 128), (1, 0x300), (0x20, 0xD800), (0xE000, 0x110000)]
    for _ in range(2000):
        words = "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randrange(1, 20)))
        if words.strip():
            whole = coder(merges).encode(words, 500)
            assert whole == clip(words)["input_ids"], repr(words)
            for context in (3, 5, 9):  # the words that are looked at are enough
                assert coder(merges).encode(words, context) == [*whole[:-1][: context - 1], whole[-1]]


def test_the_order_of_a_vocabulary(clip, merges):
    numbers = vocabulary(merges)
    assert [*numbers.values()] == [*range(len(numbers))] == [*range(len(clip))]
    assert [numbers[token] for token in ("!", "~", "¡", "Ā", "!</w>", "Ń</w>")] == [0, 93, 94, 188, 256, 511]
    assert [*numbers][-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert [*numbers][512:-2] == [line.replace(" ", "") for line in merges.split("\n")]
    assert clip.get_vocab() == numbers


def test_no_text_says_that_it_ends(merges):
    start, *found, end = coder(merges).encode("a <|endoftext|> <|startoftext|> b", 100)
    assert (start, end) == (len(vocabulary(merges)) - 2, len(vocabulary(merges)) - 1)
    assert max(found) < start
    assert coder(merges).decode(found) == "a <| endoftext |> <| startoftext |> b"


def test_without_merges_every_byte_is_a_token():
    found = coder("").encode("Öl, 🙂 a", 100)
    assert len(vocabulary("")) == BYTES_ONLY
    assert (found[0], found[-1]) == (512, 513)
    assert len(found) - 2 == len("öl,🙂a".encode())
    assert coder("").decode(found) == "öl , 🙂 a"


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("  A photo of\n\nthe CAT ", "a photo of the cat"),
        ("cafe\u0301 日本語 🙂 \u0958", "café 日本語 🙂 \u0915\u093c"),
        ("xyz q w", "xyz q w"),
        ("!? \x01 ~", "!? \x01 ~"),
    ],
)
@pytest.mark.parametrize("learned", [True, False])
def test_what_is_decoded_is_the_normalised_text(merges, given, plain, learned):
    known = coder(merges if learned else "")
    if plain.endswith("\u093c"):  # a mark, which is a word by itself
        plain = plain.replace("\u093c", " \u093c")
    assert known.decode(known.encode(given, 100)) == plain


def test_composed_and_decomposed_texts_are_one(merges):
    known = coder(merges)
    assert known.encode("cafe\u0301", 20) == known.encode("caf\u00e9", 20) == known.encode("CAFÉ", 20)


@pytest.mark.parametrize("context", [3, 4, 7, 77])
def test_long_texts_are_cut_at_a_token_and_end(merges, context):
    known = coder(merges)
    for words in ("a photo of a cat " * 200, "日本語" * 100_000, "cat" * 100_000, " \u3000 \n" * 999 + "a cat"):
        whole = known.encode(words[:20_000], 100_000)
        found = known.encode(words, context)
        if len(whole) >= context:
            assert len(found) == context
            assert found[:-1] == whole[: context - 1]
        assert found[-1] == known.end


def test_merges_that_are_none():
    with pytest.raises(ValueError, match=r"line 2 of the merges, 'the q', does not join"):
        vocabulary("t h\nthe q")
    for wrong in ("t", "t h e", "t  h", " ", "t h\n"):
        with pytest.raises(ValueError, match="does not join two tokens"):
            vocabulary(wrong)


def test_settings_are_checked(merges):
    tokenizer = {"model.tokenizer.name": "bpe", "signal.context": 20, "objective.steps": 3}
    with pytest.raises(UserError, match=r"model\.tokenizer: line 1 of the merges"):
        load_recipe("cpc-text-tiny", {**tokenizer, "model.tokenizer.merges": "th e"})
    with pytest.raises(UserError, match=r"vocab_size 515 is less than the \d+ tokens that its merges make"):
        load_recipe("cpc-text-tiny", {**tokenizer, "model.tokenizer.merges": merges, "model.tokenizer.vocab_size": 515})
    with pytest.raises(UserError, match=r"vocab_size: .* 514, but got 513"):
        load_recipe("cpc-text-tiny", {**tokenizer, "model.tokenizer.vocab_size": 513})
    with pytest.raises(UserError, match=r"signal\.context: .* 3, but got 2"):
        load_recipe("cpc-text-tiny", {**tokenizer, "signal.context": 2})


def test_cpc_wants_no_positions():
    settings = {"model.tokenizer.name": "bpe", "model.tokenizer.merges": ""}
    with pytest.raises(UserError, match="positions in the tokens would give away"):
        build_objective(load_recipe("cpc-text-tiny", settings))


# Learning


def test_learning_does_not_depend_on_the_order(merges, monkeypatch):
    assert merges.split("\n")[0] in ("t h", "t o</w>", "h e")
    for seed in range(3):
        shuffled = random.Random(seed).sample(CAPTIONS, len(CAPTIONS))
        assert learn_merges(shuffled, 600) == merges
    monkeypatch.setattr(text_bpe, "_ASKED", "false")
    assert learn_merges(CAPTIONS, 600) == merges
    assert learn_merges(["\n".join(CAPTIONS)], 600) == merges  # one text of many lines


def test_learning_keeps_to_its_size():
    assert learn_merges(CAPTIONS, BYTES_ONLY) == ""
    assert len(vocabulary(learn_merges(CAPTIONS, 530))) == 530
    assert learn_merges(["never twice"], 600) == ""
    assert learn_merges([], 600) == ""
    assert len(vocabulary(learn_merges(["日本語" * 5000], 530))) <= 530


def test_a_vocabulary_is_learned_from_files_and_from_texts(tmp_path, merges):
    paths = [inline.join(caption) for caption in CAPTIONS[1:]]
    (tmp_path / "a.txt").write_text(CAPTIONS[0], encoding="utf-8")
    (tmp_path / "broken.txt").write_bytes(b"\xff\xff")
    paths += [str(tmp_path / "a.txt"), str(tmp_path / "broken.txt"), str(tmp_path / "none.txt"), inline.join(" ")]
    learned, remarks = TEXT.learn(paths, TextSignal(), BPETokenizer(vocab_size=600))
    assert learned == settings(merges)
    assert remarks == []
    again, _ = TEXT.learn([], TextSignal(), learned)
    assert again == learned


def test_texts_that_are_cut_are_counted(merges, monkeypatch):
    monkeypatch.setattr(text, "AT_ONCE", 3)
    captions = [*CAPTIONS, "é" * 6, "a " * 6, "x" * 6, "a " * 7, "xyz" * 9, "é" * 7]
    for context in (3, 5, 8, 77):
        cut = sum(len(coder(merges).encode(caption, 1000)) > context for caption in captions)
        _, remarks = TEXT.learn([inline.join(c) for c in captions], TextSignal(context=context), settings(merges))
        words = f"{cut} of 16 texts are longer than signal.context {context} tokens and are cut"
        assert remarks == ([words] if cut else [])
    assert cut == 0


def test_other_tokenizers_learn_nothing():
    for kind in TEXT.tokenizer_types[:2]:
        assert TEXT.learn(["x.txt"], TextSignal(), kind()) == (kind(), [])


def test_a_forked_process_goes_on(merges, capfd):
    assert coder(merges).too_long(["é" * 99] * 100, 8) == 100
    child = os.fork()
    if not child:
        os._exit(int(coder(merges).too_long(["é" * 99] * 100, 8) != 100))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert capfd.readouterr().err == ""  # the library warns where nobody told it


# Vocabularies in files


def test_a_vocabulary_is_read(tmp_path, merges):
    write_vocabulary(tmp_path, merges)
    for path in (tmp_path, tmp_path / "merges.txt"):
        learned, _ = TEXT.learn([], TextSignal(), BPETokenizer(vocab_size=600, vocabulary=str(path)))
        assert learned.merges == merges
    (tmp_path / "plain.txt").write_text(merges.replace("\n", "\r\n"), encoding="utf-8")
    assert read_merges(str(tmp_path / "plain.txt"), 600) == merges


def test_of_clips_own_file_only_a_part_is_used(tmp_path, merges, monkeypatch):
    monkeypatch.setattr(text_bpe, "_CLIP_MERGES", 20)
    packed = gzip.compress(f'"bpe_simple_vocab_16e6.txt#version: 0.2\n{merges}\n'.encode())
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(packed)
    read = read_merges(str(tmp_path / "bpe_simple_vocab_16e6.txt.gz"), 600)
    assert read == "\n".join(merges.split("\n")[:20])
    assert 512 + 2 + 48894 == 49408


def test_vocabularies_that_cannot_be_used(tmp_path, merges):
    write_vocabulary(tmp_path, merges)
    size = len(vocabulary(merges))
    with pytest.raises(UserError, match=rf"model\.tokenizer\.vocab_size 520 is less .*vocab_size={size}"):
        read_merges(str(tmp_path), 520)
    with pytest.raises(UserError, match=r"vocabulary: .*merge\.txt does not exist; did you mean 'merges\.txt'"):
        read_merges(str(tmp_path / "merge.txt"), 600)
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"t h")[:-4])
    (tmp_path / "y.gz").write_bytes(b"t h")
    (tmp_path / "z.txt").write_bytes(b"\xff")
    for name in ("x.gz", "y.gz", "z.txt"):
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            read_merges(str(tmp_path / name), 600)
    (tmp_path / "w.txt").write_text("some other text")
    with pytest.raises(UserError, match=r"w\.txt: line 1 of the merges"):
        read_merges(str(tmp_path / "w.txt"), 600)
    (tmp_path / "vocab.json").write_text(json.dumps({**vocabulary(merges), "!": 1}))
    with pytest.raises(UserError, match=r"vocab\.json does not number tokens as CLIP does"):
        read_merges(str(tmp_path), 600)
