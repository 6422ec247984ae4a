"""Features: order, broken files, cache. Embed: what the parquet file holds."""

import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from media import numbered, write_frames
from PIL import Image

from mmssl.data.listing import Listing, list_files
from mmssl.errors import UnusableData, UserError
from modalities.encoder import MODALITIES, Encoder, EncoderConfig, typed
from tasks.embed import embed
from tasks.features import (
    RawPixels,
    _Files,
    class_targets,
    commonest_share,
    default_cache,
    extract,
    labelled_features,
)


def expected_vectors(encoder, listing: Listing) -> torch.Tensor:
    signals = torch.stack([encoder.transform(encoder.decode(path)) for path in listing.paths])
    return encoder.features(signals)


def shipped_encoder() -> Encoder:
    config = typed(EncoderConfig, "image", "test").model_validate(
        {
            "modality": "image",
            "signal": {"size": 16, "resize_ratio": 1.0},
            "model": {"tokenizer": {"patch_size": 8}, "backbone": {"dim": 32, "depth": 1, "num_heads": 2}},
        }
    )
    return Encoder(config).eval()


@pytest.mark.parametrize("workers", [0, 2])
def test_vectors_are_in_the_order_of_the_files(encoder, pictures, workers):
    listing = pictures("data", 5)
    calls = []
    features = extract(
        encoder, listing, batch_size=4, workers=workers, cache=None, progress=lambda *done: calls.append(done)
    )
    torch.testing.assert_close(features.vectors, expected_vectors(encoder, listing))
    assert features.vectors.dtype == torch.float32
    assert features.kept == list(range(15))
    assert calls == [(4, 15), (8, 15), (12, 15), (15, 15)]


def test_a_broken_file_is_named_and_never_replaced(encoder, pictures):
    listing = pictures("data", 3)
    bad = listing.root / "green" / "1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(UnusableData, match=r"green/1\.png: truncated") as caught:
        extract(encoder, listing)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_files_are_left_out_on_request_and_reported(encoder, pictures, cache, workers):
    listing = pictures("data", 3)
    for name, content in {"blue/0.png": b"", "red/2.png": b"not a picture"}.items():
        (listing.root / name).write_bytes(content)
    features = extract(encoder, listing, batch_size=1, workers=workers, skip_broken=True)
    assert features.kept == [1, 2, 3, 4, 5, 6, 7]
    assert [name for name, _ in features.skipped] == ["blue/0.png", "red/2.png"]
    assert features.skipped[0][1] == "empty file"
    torch.testing.assert_close(features.vectors, expected_vectors(encoder, listing.select(features.kept)))
    assert not cache.exists()


def test_nothing_but_broken_files_is_unusable(encoder, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(UnusableData, match=r"none of the 3 files .* 0\.png: empty file"):
        extract(encoder, list_files(tmp_path, MODALITIES["image"]), skip_broken=True)


def test_features_that_are_not_finite_are_refused(encoder, pictures, cache):
    listing = pictures("data", 2)
    Image.new("RGB", (8, 8)).save(listing.paths[3])
    encoder.features = lambda signal: signal.mean((2, 3)) / signal.amax((1, 2, 3))[:, None]
    with pytest.raises(UnusableData, match=r"green/1\.png: its features are NaN or infinite"):
        extract(encoder, listing)
    assert not cache.exists()


def test_features_are_computed_once(encoder, pictures):
    listing = pictures("data", 3)
    first = extract(encoder, listing)
    assert encoder.seen == 9
    assert torch.equal(extract(encoder, listing, batch_size=2).vectors, first.vectors)
    assert encoder.seen == 9
    extract(encoder, listing, cache=None)
    assert encoder.seen == 18


def test_a_changed_file_encoder_or_selection_is_computed_again(encoder, pictures):
    listing = pictures("data", 3)
    extract(encoder, listing)
    stat = Path(listing.paths[0]).stat()
    os.utime(listing.paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    extract(encoder, listing)
    assert encoder.seen == 18
    Image.new("RGB", (9, 8)).resize((8, 8)).save(listing.paths[0])
    os.utime(listing.paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert Path(listing.paths[0]).stat().st_size != stat.st_size
    torch.testing.assert_close(extract(encoder, listing).vectors, expected_vectors(encoder, listing))
    encoder.seen, encoder.projection = 0, encoder.projection + 1
    torch.testing.assert_close(extract(encoder, listing).vectors, expected_vectors(encoder, listing))
    assert len(extract(encoder, listing.select([2, 1])).vectors) == 2
    assert encoder.seen == 9 + 9 + 2


@pytest.mark.parametrize("damage", ["truncate", "rubbish", "other"])
def test_a_cache_that_cannot_be_read_is_made_again_and_said(encoder, pictures, cache, capsys, damage):
    listing = pictures("data", 3)
    expected = extract(encoder, listing).vectors
    (file,) = cache.iterdir()
    if damage == "other":
        extract(encoder, listing.select([0]))
        (other,) = set(cache.iterdir()) - {file}
        other.rename(file)
    else:
        file.write_bytes(file.read_bytes()[:-5] if damage == "truncate" else b"rubbish")
    assert torch.equal(extract(encoder, listing).vectors, expected)
    out, err = capsys.readouterr()
    assert "computing them again" in err
    assert not out
    seen = encoder.seen
    extract(encoder, listing)
    assert encoder.seen == seen


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(encoder, pictures, cache, capsys):
    cache.parent.write_text("a file where the folder should be")
    assert len(extract(encoder, pictures("data", 2)).vectors) == 6
    assert "could not be cached" in capsys.readouterr().err


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("MMSSL_CACHE", str(tmp_path / "own"))
    assert default_cache() == tmp_path / "own" / "features"
    monkeypatch.delenv("MMSSL_CACHE")
    assert default_cache() == tmp_path / "xdg" / "mmssl" / "features"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == tmp_path / ".cache" / "mmssl" / "features"


def test_raw_pixels_stand_in_for_an_encoder(encoder, pictures):
    listing = pictures("data", 2)
    raw = RawPixels(encoder)
    vectors = extract(raw, listing).vectors
    torch.testing.assert_close(vectors[3], encoder.transform(encoder.decode(listing.paths[3])).flatten())
    encoder.preprocess = {"size": [4, 4]}
    assert RawPixels(encoder).fingerprint() != raw.fingerprint()


def test_the_real_encoder_fits_and_its_weights_stay_out_of_the_workers(pictures):
    encoder, listing = shipped_encoder(), pictures("data", 2)
    vectors = extract(encoder, listing, batch_size=4, workers=1).vectors
    torch.testing.assert_close(vectors, encoder.embed(listing.paths))
    assert len(pickle.dumps(_Files(encoder, listing.paths, 30.0))) < 4000
    assert extract(RawPixels(encoder), listing).vectors.shape == (6, 3 * 16 * 16)


def test_labels_follow_their_files_when_some_are_left_out(encoder, pictures):
    train, test = pictures("train", 2), pictures("test", 2)
    (train.root / "blue" / "1.png").write_bytes(b"")
    (test.root / "red" / "0.png").write_bytes(b"")
    known, queries, samples = labelled_features(encoder, train, test, skip_broken=True)
    assert known.targets.tolist() == [0, 1, 1, 2, 2]
    assert queries.targets.tolist() == [0, 0, 1, 1, 2]
    assert (samples.train, samples.test, len(samples.skipped)) == (5, 5, 2)
    assert "2 broken files left out" in str(samples)


def test_scores_that_would_mean_nothing_are_refused(pictures):
    train, test = pictures("train", 2), pictures("test", 2)
    with pytest.raises(UserError, match=r"1 files, such as .*train/blue/0\.png, are in both"):
        class_targets(train, train.select([0]))
    with pytest.raises(UserError, match=r"at least two classes, but every label is 'blue'"):
        class_targets(train.select([0, 1]), test.select([0]))
    assert class_targets(train, test.select([5, 0])) == (["blue", "green", "red"], [0, 0, 1, 1, 2, 2], [2, 0])


def test_embed_writes_one_row_per_file(encoder, pictures, tmp_path):
    root = pictures("data", 2).root
    (root / "manifest.csv").write_text("path,label,split\nred/0.png,warm,train\nblue/1.png,,test\n")
    listing = list_files(root, MODALITIES["image"])
    result = embed(encoder, listing, tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["path", "split", "label", "vector"]
    assert table["path"].to_pylist() == ["red/0.png", "blue/1.png"]
    assert table["split"].to_pylist() == ["train", "test"]
    assert table["label"].to_pylist() == ["warm", None]
    assert str(table.schema.field("vector").type).startswith("fixed_size_list<")
    assert table.schema.field("vector").type.list_size == result.dim == 8
    torch.testing.assert_close(torch.tensor(table["vector"].to_pylist()), expected_vectors(encoder, listing))
    assert table.schema.metadata[b"mmssl.fingerprint"].decode() == encoder.fingerprint() == result.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data", "out.parquet"]


def test_embed_takes_the_labels_of_folders_and_leaves_out_broken_files(encoder, pictures, tmp_path):
    listing = pictures("data", 2)
    (listing.root / "green" / "0.png").write_bytes(b"")
    with pytest.raises(UnusableData, match=r"green/0\.png"):
        embed(encoder, listing, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()
    result = embed(encoder, listing, tmp_path / "out.parquet", skip_broken=True)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["label"].to_pylist() == ["blue", "blue", "green", "red", "red"]
    assert table["path"].to_pylist()[2] == "green/1.png"
    assert table["split"].null_count == 5
    assert result.as_dict()["skipped"] == [{"path": "green/0.png", "reason": "empty file"}]


def test_embed_needs_no_labels(encoder, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    embed(encoder, list_files(tmp_path, MODALITIES["image"]), tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet")["label"].to_pylist() == [None]


@pytest.mark.parametrize(
    ("out", "words"),
    [("out.csv", "must end in .parquet"), ("no/out.parquet", "does not exist"), ("folder.parquet", "is a folder")],
)
def test_embed_refuses_an_impossible_name_before_it_computes(encoder, pictures, tmp_path, out, words):
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(UserError, match=words):
        embed(encoder, pictures("data", 1), tmp_path / out)
    assert encoder.seen == 0


def test_the_score_of_guessing_the_commonest_class():
    assert commonest_share([0, 1, 1, 2], [1, 1, 0, 2, 1]) == 0.6
    assert commonest_share([0, 0, 1, 1, 2], [0, 1, 1, 1]) == 0.5  # of equals, the mean of 0.25 and 0.75


def test_a_frame_that_was_replaced_in_its_folder_is_not_found_in_the_cache(tmp_path):
    config = typed(EncoderConfig, "video", "test")(
        modality="video",
        signal={"frames": 2, "size": (8, 8), "stride": 1},
        model={"tokenizer": {"patch_size": (2, 4, 4)}, "backbone": {"dim": 12, "depth": 1, "num_heads": 2}},
    )
    encoder = Encoder(config).eval()
    film = write_frames(tmp_path / "films" / "a", numbered(3, 8, 8))
    films = list_files(tmp_path / "films", MODALITIES["video"])
    before = extract(encoder, films, cache=tmp_path / "cache").vectors
    assert torch.equal(extract(encoder, films, cache=tmp_path / "cache").vectors, before)
    for path in film.iterdir():
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    assert not torch.allclose(extract(encoder, films, cache=tmp_path / "cache").vectors, before)
    (film / "frame1.png").write_bytes(b"no picture")
    with pytest.raises(UnusableData, match=r"frame1\.png"):
        extract(encoder, films, cache=tmp_path / "cache")
