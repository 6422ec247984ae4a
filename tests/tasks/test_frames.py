"""Frames of sounds: in one go or in windows, broken files, and what ``embed --frames`` writes."""

import json
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from media import tone, write_sound
from sound_encoders import RATE, recurrent, transformer

import tasks.embed
import tasks.frames
from mmssl.data.listing import list_files
from mmssl.errors import UnusableData, UserError
from tasks.embed import embed_frames
from tasks.features import _Files
from tasks.frames import SoundFrames, read_frames


@pytest.fixture
def noise(tmp_path):
    """Write noise of so many seconds and return its path."""

    def write(seconds, name="noise.wav", rate=RATE):
        samples = np.random.default_rng(0).normal(0, 0.1, round(seconds * rate)).astype(np.float32)
        return str(write_sound(tmp_path / name, samples, rate, "FLOAT"))

    return write


def frames_of(encoder, path, **options):
    ((_, frames),) = read_frames(SoundFrames(encoder), list_files(path, encoder.kind), **options)
    return frames


@pytest.mark.parametrize("backbone", ["gru", "lstm", "causal"])
def test_an_encoder_that_streams_reads_a_file_as_one(noise, monkeypatch, backbone):
    monkeypatch.setattr(tasks.frames, "CHUNK", 0.13)
    encoder, path = recurrent(backbone, longest=60), noise(1.234)
    (expected,), grid = encoder.tokens([path])
    frames = frames_of(encoder, path)
    assert grid == (123,)
    assert frames.shape == (123, 16)
    assert frames.dtype == torch.float32
    torch.testing.assert_close(frames, expected, atol=1e-5, rtol=1e-4)


def test_what_streams_goes_through_in_chunks(noise, monkeypatch):
    monkeypatch.setattr(tasks.frames, "CHUNK", 0.13)
    encoder, sizes = recurrent(), []
    step = encoder.step
    monkeypatch.setattr(encoder, "step", lambda chunk, state: sizes.append(chunk.shape[2]) or step(chunk, state))
    assert len(frames_of(encoder, noise(0.5))) == 50
    assert sizes == [1040, 1040, 1040, 880]


def test_the_length_trained_on_and_that_of_evaluation_change_nothing_for_what_streams(noise):
    path = noise(0.5)
    torch.manual_seed(1)
    expected = frames_of(recurrent(), path)
    torch.manual_seed(1)
    assert torch.equal(frames_of(recurrent(seconds=0.1, longest=0.2), path), expected)


@pytest.mark.parametrize(("seconds", "steps"), [(0.2, 2), (0.34, 4), (0.62, 7), (0.7, 8), (0.75, 9)])
def test_other_encoders_look_at_windows_and_the_last_ends_with_the_file(noise, seconds, steps):
    encoder, path = transformer(), noise(seconds)
    signal = SoundFrames(encoder).transform(encoder.decode(path))
    length, step = encoder.tokenizer.size[0], 640
    expected = []
    for i in range(steps):
        start = max(0, min(i // 4 * 4, steps - 4))
        (tokens,), (rows, columns) = encoder.tokens(signal[None, :, start * step : start * step + length])
        expected.append(tokens.view(rows, columns, -1)[:, i - start].mean(0))
    frames = frames_of(encoder, path)
    assert len(frames) == steps
    torch.testing.assert_close(frames, torch.stack(expected), atol=1e-5, rtol=1e-4)
    assert SoundFrames(encoder).seconds_per_step == pytest.approx(0.08)


def test_windows_go_through_in_batches(noise, monkeypatch):
    encoder, path = transformer(), noise(2.0)
    expected = frames_of(encoder, path)
    monkeypatch.setattr(type(encoder), "batch_size", 2)
    torch.testing.assert_close(frames_of(encoder, path), expected, atol=1e-6, rtol=1e-5)


def test_files_of_other_rates_have_as_many_frames_a_second(noise):
    assert len(frames_of(recurrent(), noise(0.4, rate=11025))) == 40
    assert len(frames_of(recurrent(), noise(0.4, rate=48000))) == 40


def test_a_piece_of_a_file_is_read_by_itself(noise):
    encoder, path = recurrent(), noise(0.5)
    whole = SoundFrames(encoder).transform(encoder.decode(path))
    expected = SoundFrames(encoder).frames(whole[:, 800:2400])
    assert torch.equal(frames_of(encoder, f"{path}#t=0.1,0.3"), expected)


@pytest.mark.parametrize(("make", "needed"), [(recurrent, 80), (transformer, 760)])
def test_a_file_shorter_than_a_token_is_broken(tmp_path, make, needed):
    encoder, samples = make(), np.zeros(needed - 1, np.float32)
    for name, wave in {"a.wav": tone(0.3, RATE), "b.wav": samples, "c.wav": np.append(samples, 0)}.items():
        write_sound(tmp_path / name, wave, RATE)
    listing = list_files(tmp_path, encoder.kind)
    with pytest.raises(UnusableData, match=r"b\.wav: \S+ s are shorter than a token of \S+ s"):
        list(read_frames(SoundFrames(encoder), listing))
    found = list(read_frames(SoundFrames(encoder), listing, skip_broken=True))
    assert [i for i, _ in found] == [0, 1, 2]
    assert "shorter than a token" in found[1][1]
    assert len(found[2][1]) == 1


def test_workers_change_nothing_and_get_no_weights(sounds):
    encoder = recurrent()
    listing = list_files(sounds / "test", encoder.kind)
    alone, helped = (list(read_frames(SoundFrames(encoder), listing, workers=workers)) for workers in (0, 1))
    assert [i for i, _ in alone] == [i for i, _ in helped] == list(range(6))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(alone, helped, strict=True))
    assert len(pickle.dumps(_Files(SoundFrames(encoder), listing.paths, 30.0))) < 4000


def test_frames_that_are_not_finite_are_refused(noise):
    encoder = recurrent()
    with torch.no_grad():
        encoder.backbone.blocks[0].weight_ih_l0[0, 0] = torch.nan
    with pytest.raises(UnusableData, match=r"noise\.wav: its features are NaN"):
        frames_of(encoder, noise(0.1))


def test_pictures_have_no_frames(tiny_encoder):
    with pytest.raises(UserError, match="frames are of sounds, but this encoder is of modality image"):
        SoundFrames(tiny_encoder())


@pytest.fixture
def table(tmp_path, noise):
    """A manifest of a file, a piece of it and a broken file."""
    noise(0.5)
    (tmp_path / "bad.wav").write_bytes(b"")
    rows = "path,label,split,start,end\nnoise.wav,whole,train,,\nnoise.wav,part,,0.13,0.33\nbad.wav,bad,test,,\n"
    (tmp_path / "manifest.csv").write_text(rows)
    return tmp_path / "manifest.csv"


def test_embed_frames_writes_a_row_per_frame_in_groups(table, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.embed, "ROWS", 32)
    encoder = recurrent()
    extractor, listing = SoundFrames(encoder), list_files(table, encoder.kind)
    result = embed_frames(extractor, listing, tmp_path / "out.parquet", skip_broken=True)
    file = pq.ParquetFile(tmp_path / "out.parquet")
    rows = file.read()
    assert rows.column_names == ["path", "split", "label", "start", "end", "vector"]
    assert rows["path"].to_pylist() == ["noise.wav"] * 70
    assert rows["label"].to_pylist() == ["whole"] * 50 + ["part"] * 20
    assert rows["split"].to_pylist() == ["train"] * 50 + [None] * 20
    assert rows["start"].to_pylist() == [i / 100 for i in (*range(50), *range(13, 33))]
    assert rows["end"].to_pylist() == [i / 100 for i in (*range(1, 51), *range(14, 34))]
    expected = torch.cat([frames for _, frames in read_frames(extractor, listing, skip_broken=True)][:2])
    torch.testing.assert_close(torch.tensor(rows["vector"].to_pylist()), expected, atol=0, rtol=0)
    assert file.num_row_groups > 1
    assert rows.schema.metadata[b"mmssl.fingerprint"].decode() == extractor.fingerprint() == result.fingerprint
    facts = {"files": 2, "frames": 70, "dim": 16, "seconds_per_frame": 0.01}
    assert result.as_dict().items() >= facts.items()
    assert result.as_dict()["skipped"] == [{"path": "bad.wav", "reason": "empty file"}]
    # Each row is a piece of a file, as a manifest has them.
    assert list_files(tmp_path / "out.parquet", encoder.kind).paths[51] == f"{tmp_path}/noise.wav#t=0.14,0.15"


def test_embed_frames_leaves_nothing_where_a_file_fails(table, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.embed, "ROWS", 8)
    encoder = recurrent()
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UnusableData, match=r"bad\.wav: empty file"):
        embed_frames(SoundFrames(encoder), list_files(table, encoder.kind), tmp_path / "out.parquet")
    with pytest.raises(UnusableData, match="none of the 1 files can be read"):
        embed_frames(
            SoundFrames(encoder), list_files(tmp_path / "bad.wav", encoder.kind), tmp_path / "o.parquet",
            skip_broken=True,
        )  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == before


def test_embed_frames_on_the_command_line(ask, sounds, photos, tmp_path, tiny_encoder):
    recurrent().save(tmp_path / "encoder")
    words = ["embed", tmp_path / "encoder", sounds / "test", "--frames", "--out", tmp_path / "v.parquet"]
    code, out, _ = ask(*words, "--json")
    assert code == 0
    facts = json.loads(out)
    rows = pq.read_table(tmp_path / "v.parquet")
    assert facts["frames"] == len(rows) == sum(25 + 3 * i for i in range(10, 16))
    assert set(rows["label"].to_pylist()) == {"low", "high"}
    assert "vectors of 16 values, 10 ms each, of 6 files" in ask(*words)[1]
    shown = ["show", tmp_path / "v.parquet", "--out", tmp_path / "map.png", "--most", "30"]
    assert ask(*shown)[0] == 0
    tiny_encoder().save(tmp_path / "pictures")
    code, _, err = ask("embed", tmp_path / "pictures", photos, "--frames", "--out", tmp_path / "x.parquet")
    assert code == 2
    assert "frames are of sounds" in err
