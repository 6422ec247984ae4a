"""What goes wrong around towers: files that changed, broken parts of rows, settings that do not go together, resuming.

Planted bugs that fail here: settings of a source taken without validation, rows guarded as a whole, a source that is
read to resume, limits of the first file alone.
"""

import csv
import json
import shutil

import numpy as np
import pytest
import torch

from mmssl.backbones.positions import resize_table, sincos
from mmssl.config import read_yaml
from mmssl.data.guard import BrokenFile
from mmssl.errors import UserError
from modalities.encoder import Encoder, EncoderConfig, load, typed
from modalities.text_bpe import read_merges
from modalities.text_settings import BPETokenizer
from modalities.text_tokens import Subwords
from modalities.towers import TowerViews, blank
from tasks.build import RECIPES, build_objective, load_recipe
from tasks.fit import check_batch, inherited, sources
from tasks.initial import take
from tasks.pretrain import dry_run, pretrain

TOKENIZER = "towers.text.model.tokenizer"


@pytest.fixture(scope="module")
def settings(materials):
    torch.set_num_threads(1)
    return materials["clip"].settings | {"train.steps": 2, "checkpoint.every_steps": 1, "data.workers": 0}


@pytest.fixture(scope="module")
def data(materials, tmp_path_factory):
    """Write the captioned rows again, with a change to each."""

    def write(change=lambda i, row: {}):
        with (materials["clip"].folder / "manifest.csv").open(encoding="utf-8") as file:
            rows = [row | change(i, row) for i, row in enumerate(csv.DictReader(file))]
        path = tmp_path_factory.mktemp("data") / "rows.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return path

    return write


@pytest.fixture(scope="module")
def source(settings, data, tmp_path_factory):
    """A run whose vocabulary was learned."""
    return pretrain("clip-tiny", data(), tmp_path_factory.mktemp("source") / "run", settings).run


def tokenizer(run):
    return read_yaml(run / "config.yaml")["towers"]["text"]["model"]["tokenizer"]


# --- broken parts of rows ---------------------------------------------------------------------------------------------


class Reads:
    """Views that read a file, or never come back."""

    def __call__(self, path, rngs, size):
        if path == "slow":
            while True:
                pass
        with open(path, "rb") as file:  # noqa: PTH123
            if not file.read():
                raise ValueError("what is this?")
        return [{"signal": torch.zeros(1)} for _ in rngs]


def test_each_file_of_a_row_is_guarded_with_its_own_path(tmp_path):
    (good := tmp_path / "a").write_text("a")
    (empty := tmp_path / "b").write_text("")
    kinds = {"image": Reads(), "text": Reads()}
    towers = TowerViews(kinds, dict.fromkeys(kinds, (1,)), {}, timeout=0.05)
    rngs = [np.random.default_rng(0)]
    for row, reason in (
        ((str(empty), "slow"), "its image: empty file"),
        ((str(good), "slow"), "its text: timed out after 0.05 s"),
        ((str(good), str(tmp_path / "c")), "its text: no such file"),
    ):
        with pytest.raises(BrokenFile) as caught:
            towers(row, rngs, ())
        assert caught.value.reason == reason
    assert blank(kinds["image"], ["slow", str(empty), str(good)], (1,), 0.05).keys() == {"signal"}


def test_rows_of_one_broken_picture_each_have_a_line(settings, data, tmp_path):
    (tmp_path / "empty.png").write_text("")
    rows = data(lambda i, row: {"image_path": tmp_path / "empty.png"} if i < 3 else {})
    result = pretrain("clip-tiny", rows, tmp_path / "run", settings | {"data.max_bad_fraction": 0.5})
    lines = [json.loads(line) for line in (result.run / "ledger.jsonl").read_text().splitlines()]
    found = {line["path"]: line["reason"] for line in lines if "path" in line}
    assert found == {f"{tmp_path}/empty.png, row {i}": "its image: empty file" for i in (1, 2, 3)}
    assert result.broken == 3


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["caption", "image_path"])
def test_what_changed_in_any_column_is_noticed(source, settings, data, column, photos):
    other = str(next(photos.rglob("29.png")))
    rows = data(lambda i, row: {column: other} if i == 5 else {})
    with pytest.raises(UserError, match="--resume: the files are not those that"):
        pretrain("clip-tiny", rows, source, settings | {"train.steps": 3}, resume=True)


def test_resuming_needs_nothing_but_the_run(source, settings, data, tmp_path):
    given = shutil.copytree(source, tmp_path / "given")
    (tmp_path / "merges.txt").write_text(tokenizer(given)["merges"])
    started = settings | {"train.init_from": str(given), f"{TOKENIZER}.vocabulary": str(tmp_path / "merges.txt")}
    run = pretrain("clip-tiny", data(), tmp_path / "run", started).run
    vocabulary = tokenizer(run)["merges"]
    shutil.rmtree(given)
    (tmp_path / "merges.txt").unlink()
    again = pretrain("clip-tiny", data(), run, started | {"train.steps": 3}, resume=True)
    assert again.steps == 3
    assert tokenizer(run)["merges"] == vocabulary
    with pytest.raises(UserError, match=r"--resume: towers\.text\.model\.tokenizer\.vocab_size is 600 here but"):
        pretrain("clip-tiny", data(), run, started | {f"{TOKENIZER}.vocab_size": 600}, resume=True)


def test_a_text_that_is_no_unicode_is_broken_and_nothing_else(settings, tmp_path, photos):
    pictures = sorted(map(str, photos.rglob("*.png")))[:8]
    page = [{"caption": "\ud800 x" if i == 0 else f"picture {i}", "image_path": one} for i, one in enumerate(pictures)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, page)))
    recipe = read_yaml(RECIPES / "clip-tiny.yaml")
    recipe["towers"] = {name: recipe["towers"][name] for name in ("text", "image")}
    (tmp_path / "a.yaml").write_text(json.dumps(recipe))
    more = {"data.max_bad_fraction": 0.5, "train.batch_size": 8}
    result = pretrain(tmp_path / "a.yaml", tmp_path / "rows.jsonl", tmp_path / "run", settings | more)
    assert result.broken == 1
    assert "its text: " in (result.run / "ledger.jsonl").read_text()
    assert pretrain(
        tmp_path / "a.yaml", tmp_path / "rows.jsonl", result.run, settings | more | {"train.steps": 3}, resume=True
    ).broken == 1  # fmt: skip


# --- settings that do not go together ---------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["train.init_from", "towers.text.init_from"])
def test_a_vocabulary_that_is_too_large_is_refused(source, settings, data, tmp_path, key):
    size = len(tokenizer(source)["merges"].split("\n")) + 513
    there = tokenizer(source)["vocab_size"]
    sentence = rf"that of {source} \(vocab_size {there}\): vocab_size {size} is less than the {size + 1} tokens"
    changes = settings | {key: str(source), f"{TOKENIZER}.vocab_size": size}
    with pytest.raises(UserError, match=sentence):
        pretrain("clip-tiny", data(), tmp_path / "run", changes)
    with pytest.raises(UserError, match=sentence):
        dry_run(load_recipe("clip-tiny", changes), None)
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_that_is_given_comes_before_the_sources(source, settings, tmp_path):
    (tmp_path / "merges.txt").write_text("a b\nab c</w>")
    changes = {"towers.text.init_from": str(source), f"{TOKENIZER}.vocabulary": str(tmp_path / "merges.txt")}
    recipe = inherited(load_recipe("clip-tiny", settings | changes))
    assert recipe.encoders["text"].model.tokenizer.merges is None
    taken = inherited(load_recipe("clip-tiny", settings | {"towers.text.init_from": str(source)}))
    assert taken.encoders["text"].model.tokenizer.merges == tokenizer(source)["merges"]
    assert read_merges(str(tmp_path / "merges.txt"), 600) == "a b\nab c</w>"


def test_tokens_that_there_are_not_are_not_embedded():
    with pytest.raises(ValueError, match="vocab_size 514 is less than the 515 tokens"):
        Subwords(8, 514, 4, merges="a b")
    words = Subwords(4, 514, 4)
    assert words.embed(torch.tensor([[[0.0], [514.0]]]), grid=(2,)).shape == (1, 2, 4)
    with pytest.raises(IndexError):
        words.embed(torch.tensor([[[1.0], [515.0]]]), grid=(2,))


REFUSED = {
    "one row": ({"train.batch_size": 4, "train.accumulate": 4}, "compares one row at a time"),
    "locked": ({"objective.locked": ["image"]}, r"'image' would stay as random as it starts; give towers\.image\.init"),
    "vocabulary": ({f"{TOKENIZER}.vocab_size": 2**31}, r"towers\.text\.model\.tokenizer\.vocab_size: .*1048576"),
    "size": ({"towers.image.signal.size": [20, 20]}, r"^towers\.image: .*20"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_mistakes_are_told_before_anything_is_planned(settings, mistake):
    changes, sentence = REFUSED[mistake]
    with pytest.raises(UserError, match=sentence):
        dry_run(load_recipe("clip-tiny", settings | changes), None)


def test_two_ranks_may_have_a_row_each(settings):
    from mmssl.distributed import World

    check_batch(load_recipe("clip-tiny", settings | {"train.batch_size": 2}), World(0, 2))


def test_one_encoder_is_given_to_the_tower_that_takes_it(source, settings, data, tmp_path):
    with pytest.raises(UserError, match=r"give it as towers\.image\.init_from") as caught:
        pretrain("clip-tiny", data(), tmp_path / "run", settings | {"train.init_from": str(source / "encoder-image")})
    assert "not readable" not in str(caught.value)
    with pytest.raises(UserError, match=r"^towers\.text\.init_from: .* is an encoder of modality image$"):
        changes = {"towers.text.init_from": str(source / "encoder-image")}
        pretrain("clip-tiny", data(), tmp_path / "run", settings | changes)


def test_an_encoder_without_a_vocabulary_says_so(source, tmp_path):
    (folder := tmp_path / "encoder").mkdir()
    for file in (source / "encoder-text").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["model"]["tokenizer"]["merges"] = None
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"model\.tokenizer\.merges is null"):
        _ = load(folder).transform
    assert BPETokenizer(merges="").known() == ""


# --- what a tower starts from ---------------------------------------------------------------------------------------


@pytest.fixture
def encoder_folder(tmp_path):
    """Write an untrained picture encoder whose positions are sines; keywords change its model."""

    def make(**model):
        backbone = {"dim": 16, "depth": 2, "num_heads": 2}
        config = typed(EncoderConfig, "image", "test")(
            modality="image",
            signal={"size": [24, 16]},
            model={"tokenizer": {"patch_size": 8}, "backbone": backbone} | model,
        )
        Encoder(config).save(tmp_path / "encoder")
        return tmp_path / "encoder"

    return make


def test_positions_that_were_sines_are_where_learned_ones_begin(settings, encoder_folder):
    start = settings | {"towers.image.init_from": str(encoder_folder())}
    recipe = load_recipe("clip-tiny", start)
    objective = build_objective(load_recipe("clip-tiny", settings))
    (weights,) = sources(recipe)
    taken = take(objective, weights)
    name = "towers.image._tokenizer.positions.table"
    assert name in taken.resized
    assert not any(one.startswith("towers.image.") for one in taken.fresh)
    torch.testing.assert_close(objective.state_dict()[name], resize_table(sincos((3, 2), 16), (3, 2), (2, 2)))


def test_another_number_of_heads_is_refused(settings, encoder_folder):
    source = encoder_folder(backbone={"dim": 16, "depth": 2, "num_heads": 4})
    recipe = load_recipe("clip-tiny", settings | {"towers.image.init_from": str(source)})
    with pytest.raises(UserError, match=r"num_heads is 2, but .* are of 4 heads: set towers.image.model.backbone"):
        dry_run(recipe, None)


def test_a_locked_tower_that_would_not_be_what_it_starts_from_is_refused(settings, data, encoder_folder, tmp_path):
    changes = {"towers.image.init_from": str(encoder_folder(cls_token=False)), "objective.locked": ["image"]}
    with pytest.raises(UserError, match=r"'image' is to stay what .* is, but differs from it in .*cls_token"):
        pretrain("clip-tiny", data(), tmp_path / "run", settings | changes)
    assert not (tmp_path / "run").exists()
