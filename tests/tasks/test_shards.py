"""Training and measuring on shards is training and measuring on the files that are in them, to the bit."""

import json
import shutil
from pathlib import Path

import fsspec
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmssl.data.listing import list_files
from mmssl.errors import MmsslError, UnusableData
from mmssl.run import Run
from modalities.encoder import MODALITIES
from modalities.image_settings import ImageSignal
from tasks.batches import training_files
from tasks.build import load_recipe
from tasks.data_pack import pack
from tasks.embed import embed
from tasks.fit import fit
from tasks.knn import knn

STEPS = {"train.steps": 4, "checkpoint.every_steps": 2}


def train(recipe, data, out, settings, resume=False, **more):
    """Train for a few steps, and return the losses."""
    recipe = load_recipe(recipe, {**settings, **STEPS, **more})
    fit(recipe, training_files(recipe, data, None), Run(out), resume=resume)
    return [line["loss"] for line in Run(out).metrics()]


@pytest.fixture(scope="session")
def packed(materials, tmp_path_factory):
    """Pack the files of a tiny recipe in shards of 5, once."""
    found = {}

    def make(name):
        folder = materials[name].folder
        if folder not in found:
            found[folder] = tmp_path_factory.mktemp("packed") / "shards"
            pack(folder, found[folder], recipe=materials[name].recipe, per_shard=5, workers=1)
        return found[folder]

    return make


@pytest.mark.parametrize("name", ["image", "video", "audio", "pairs", "text", "clip"])
def test_losses_are_those_on_the_loose_files(name, materials, packed, tmp_path):
    recipe, folder, settings = materials[name]
    loose = train(recipe, folder, tmp_path / "loose", settings)
    assert len(loose) == 4
    assert train(recipe, packed(name), tmp_path / "packed", settings) == loose


def test_pictures_in_shards_go_into_the_buckets_that_suit_them(tmp_path):
    (tmp_path / "in").mkdir()
    for i, size in enumerate([(40, 20), (20, 40), (20, 20)]):
        PIL.Image.new("RGB", size).save(tmp_path / "in" / f"{i}.png")
    pack(tmp_path / "in", tmp_path / "out", workers=1)
    image, signal = MODALITIES["image"], ImageSignal(size=(16, 16), buckets=[(16, 32), (32, 16)])
    paths = list_files(tmp_path / "out", image).paths
    assert [signal.sizes[image.bucket(path, signal)] for path in paths] == [(16, 32), (32, 16), (16, 16)]


def upload(folder, address):
    files, name = fsspec.core.url_to_fs(address)
    files.put(str(folder), name, recursive=True)


def test_losses_are_those_behind_urls_and_in_tables_too(materials, packed, tmp_path, monkeypatch):
    monkeypatch.setenv("MMSSL_CACHE", str(tmp_path / "cache"))
    recipe, folder, settings = materials["image"]
    loose = train(recipe, folder, tmp_path / "loose", settings)
    there = f"memory://{tmp_path.name}"
    upload(f"{packed('image')}/", f"{there}/shards")
    upload(f"{folder}/", f"{there}/loose")
    pictures = [Path(path).read_bytes() for path in list_files(folder, MODALITIES["image"]).paths]
    pq.write_table(pa.table({"image": pa.array(pictures)}), tmp_path / "x.parquet", row_group_size=4)
    places = [f"{there}/shards", f"{there}/loose", f"file://{packed('image')}", tmp_path / "x.parquet"]
    for i, place in enumerate(places):
        assert train(recipe, place, tmp_path / str(i), settings, **{"data.workers": 2 * (i == 0)}) == loose
    # With the manifest gone, the tars alone say what there is.
    alone = shutil.copytree(packed("image"), tmp_path / "alone", ignore=shutil.ignore_patterns("manifest.parquet"))
    assert train(recipe, alone, tmp_path / "last", settings) == loose


@pytest.mark.parametrize("window", [None, 2])
def test_a_run_goes_on_in_the_middle_of_an_epoch(window, materials, packed, tmp_path):
    recipe, _, settings = materials["image"]
    more = {"data.window": window, "data.workers": 2}
    straight = train(recipe, packed("image"), tmp_path / "straight", settings, **more)
    assert len(straight) * 8 > len(list_files(packed("image"), MODALITIES["image"]))
    shutil.copytree(tmp_path / "straight", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000004")
    Run(tmp_path / "cut").rewind(2)
    assert train(recipe, packed("image"), tmp_path / "cut", settings, resume=True, **more) == straight
    with pytest.raises(MmsslError, match=r"data\.window is 3 here"):
        train(recipe, packed("image"), tmp_path / "cut", settings, resume=True, **{**more, "data.window": 3})


def test_a_window_changes_the_order_and_nothing_else_does(materials, packed, tmp_path):
    recipe, _, settings = materials["image"]
    losses = [train(recipe, packed("image"), tmp_path / str(w), settings, **{"data.window": w}) for w in (None, 1, 99)]
    assert losses[0] == losses[2] != losses[1]


def test_a_damaged_shard_costs_its_files_and_is_named(materials, packed, tmp_path):
    recipe, _, settings = materials["image"]
    folder = shutil.copytree(packed("image"), tmp_path / "shards")
    (folder / "shard-000002.tar").write_bytes((folder / "shard-000002.tar").read_bytes()[:1100])
    train(recipe, folder, tmp_path / "run", settings, **{"data.max_bad_fraction": 0.5})
    lines = [json.loads(line) for line in Run(tmp_path / "run").ledger_file.read_text().splitlines()]
    assert lines
    assert {line["path"].partition("@")[0] for line in lines} == {"shard-000002.tar"}
    assert all(line["reason"].startswith("truncated: its shard ends") for line in lines)
    with pytest.raises(UnusableData, match="1 files are broken"):
        train(recipe, folder, tmp_path / "other", settings, **{"data.max_bad_fraction": 0.0})


def test_measures_are_those_of_the_loose_files(photos, untrained, tmp_path):
    for half in ("train", "test"):
        pack(photos / half, tmp_path / half, per_shard=5, workers=1)
    kind = untrained.kind
    results, vectors = [], []
    for root in (photos, tmp_path):
        halves = [list_files(root / half, kind) for half in ("train", "test")]
        results.append(knn(untrained, *halves).as_dict())
        embed(untrained, halves[1], tmp_path / "vectors.parquet")
        vectors.append(pq.read_table(tmp_path / "vectors.parquet").drop_columns("path"))
    assert results[0] == results[1]
    assert vectors[0].equals(vectors[1])
    shard = tmp_path / "test" / "shard-000001.tar"
    features = [untrained.embed(list_files(tmp_path / "test", kind).paths) for _ in range(2)]
    assert torch.equal(*features)
    # Vectors that are kept are of the shard as it was.
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(UnusableData, match="truncated"):
        knn(untrained, *(list_files(tmp_path / half, kind) for half in ("train", "test")))
