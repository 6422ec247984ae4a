import csv
import io
import json
import os
import signal
import time
from contextlib import contextmanager
from types import SimpleNamespace

import av
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from media import cut, numbered, numbers, rotate, write_animation, write_frames, write_video
from rich.console import Console

from mmssl.data.guard import BrokenFile
from mmssl.errors import UserError
from modalities.video_read import open_video
from tasks import data_shrink, reencode
from tasks.data_shrink import shrink

FRAMES = numbered(30, 64, 96)


def read(path):
    """Return a video's frames [n, h, w, 3], their times in seconds and whether each is a key frame."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
        return pixels, [frame.time for frame in frames], [frame.key_frame for frame in frames]


def difference(small, large):
    """Return how far two pictures are apart on average, in grey: colours lose half of their resolution."""
    small = PIL.Image.fromarray(small)
    pictures = [small, PIL.Image.fromarray(np.ascontiguousarray(large)).resize(small.size)]
    return np.ptp([np.array(picture.convert("L"), float) for picture in pictures], axis=0).mean()


def listed(out):
    """Return all files of a folder, hidden ones too, as relative names, but for the folder's own two."""
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    return names - {data_shrink.SETTINGS, data_shrink.LEDGER}


@pytest.fixture
def films(tmp_path):
    """Two films in sub-folders, one of them in another container, and a file of another kind."""
    root = tmp_path / "films"
    for label in ("cats", "dogs"):
        (root / label).mkdir(parents=True)
    write_video(root / "cats" / "a.mp4", FRAMES, sound=True)
    write_video(root / "dogs" / "b.mkv", FRAMES)
    (root / "read.me").touch()
    return root


def test_frames_times_and_names_stay_and_the_size_shrinks(films, tmp_path):
    out, done = tmp_path / "out", []
    result = shrink(films, out, 32, workers=2, progress=lambda *seen: done.append(seen))
    assert listed(out) == {"cats/a.mp4", "dogs/b.mp4"}
    for name in ("cats/a.mp4", "dogs/b.mp4"):
        frames, times, keys = read(out / name)
        assert frames.shape == (30, 32, 48, 3)
        assert numbers(frames) == list(range(30))
        assert times == pytest.approx(np.arange(30) / 25, abs=2e-3)
        assert [i for i, key in enumerate(keys) if key] == [0, 24]
        assert difference(frames[7], FRAMES[7]) < 5
        with av.open(str(out / name)) as container:
            assert not container.streams.audio
            assert float(container.streams.video[0].average_rate) == pytest.approx(25, rel=1e-3)
            assert container.streams.video[0].frames == 30
    assert done == [(1, 2), (2, 2)]
    report = json.loads(json.dumps(result.as_dict()))
    assert report | {"path": "", "out": "", "seconds": 0} == {
        "files": 2, "path": "", "out": "", "short_side": 32, "encoded": 2, "copied": 0, "skipped": 0, "broken": [],
        "ignored": {".me": 1}, "seconds": 0,
        "bytes_before": sum((films / name).stat().st_size for name in ("cats/a.mp4", "dogs/b.mkv")),
        "bytes_after": sum((out / name).stat().st_size for name in ("cats/a.mp4", "dogs/b.mp4")),
    }  # fmt: skip


def test_a_second_run_does_only_what_is_missing(films, tmp_path):
    out = tmp_path / "out"
    shrink(films, out, 32, workers=1)
    before = (out / "cats" / "a.mp4").stat().st_mtime_ns
    (out / "dogs" / "b.mp4").unlink()
    (out / "dogs" / ".b.mp4.123.tmp").write_bytes(b"half a film")
    result = shrink(films, out, 32, workers=1)
    assert (result.encoded, result.skipped) == (1, 1)
    assert (out / "cats" / "a.mp4").stat().st_mtime_ns == before
    assert listed(out) == {"cats/a.mp4", "dogs/b.mp4"}
    with pytest.raises(UserError, match="other settings \\(a short side of 32 pixels\\)"):
        shrink(films, out, 48)


def test_a_source_written_since_is_done_again(films, tmp_path):
    out, frames = tmp_path / "out", write_frames(films / "frames", FRAMES[:3])
    shrink(films, out, 32, workers=1)
    later = time.time() + 10
    write_video(films / "cats" / "a.mp4", FRAMES[:20])
    (films / "dogs" / "b.mkv").write_bytes(b"no film any more")
    PIL.Image.fromarray(FRAMES[9]).save(frames / "frame1.png")
    for changed in (films / "cats" / "a.mp4", films / "dogs" / "b.mkv", frames / "frame1.png"):
        os.utime(changed, (later, later))
    result = shrink(films, out, 32, workers=1)
    assert (result.encoded, result.skipped) == (2, 0)
    assert result.broken == [{"path": "dogs/b.mkv", "reason": "not a video"}]
    assert listed(out) == {"cats/a.mp4", *(f"frames/frame{i}.jpg" for i in range(3))}
    assert numbers(read(out / "cats" / "a.mp4")[0]) == list(range(20))
    assert numbers([np.array(PIL.Image.open(out / "frames" / "frame1.jpg"))]) == [9]


def test_a_source_that_is_gone_keeps_its_copy(films, tmp_path):
    write_manifest(films / "manifest.csv", [{"path": "cats/a.mp4"}, {"path": "dogs/b.mkv"}])
    shrink(films, tmp_path / "out", 32, workers=1)
    (films / "dogs" / "b.mkv").unlink()
    assert shrink(films, tmp_path / "out", 32).skipped == 2
    assert listed(tmp_path / "out") == {"manifest.csv", "cats/a.mp4", "dogs/b.mp4"}


def test_copies_of_another_folder_are_not_gone_on_with(films, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    shrink(films, out, 32, workers=1)
    (other / "cats").mkdir(parents=True)
    write_video(other / "cats" / "a.mp4", FRAMES[:2])
    with pytest.raises(UserError, match=f"copies of the videos in {films}; give another folder for those in {other}"):
        shrink(other, out, 32)
    (tmp_path / "link").symlink_to(films)
    assert shrink(tmp_path / "link", out, 32).skipped == 2


def test_a_small_cheap_film_is_copied_and_others_are_not_enlarged(tmp_path):
    films, out = tmp_path / "films", tmp_path / "out"
    films.mkdir()
    write_video(films / "cheap.mp4", FRAMES, g="12", sound=True)
    write_video(films / "sparse.mp4", FRAMES, g="250")
    write_video(films / "old.avi", FRAMES[:, :, :94])
    result = shrink(films, out, 256)
    assert (result.copied, result.encoded) == (1, 2)
    assert (out / "cheap.mp4").read_bytes() == (films / "cheap.mp4").read_bytes()
    assert read(out / "sparse.mp4")[0].shape == (30, 64, 96, 3)
    assert read(out / "old.mp4")[0].shape == (30, 64, 94, 3)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_film_on_its_side_is_put_upright(degrees, tmp_path):
    source = rotate(write_video(tmp_path / "phone.mp4", FRAMES), degrees)
    shrink(source, tmp_path / "out", 32)
    frames = read(tmp_path / "out" / "phone.mp4")[0]
    upright = np.rot90(FRAMES, -degrees // 90, axes=(1, 2))
    assert frames.shape[1:3] == ((48, 32) if degrees % 180 else (32, 48))
    with av.open(str(tmp_path / "out" / "phone.mp4")) as container:
        assert next(container.decode(video=0)).rotation == 0
    assert difference(frames[3], upright[3]) < 5


def test_pixels_become_square_and_colours_stay(tmp_path):
    source = tmp_path / "wide.mp4"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"color_range": "pc", "x264-params": "fullrange=on"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        stream.codec_context.sample_aspect_ratio = 2
        stream.codec_context.colorspace = 1  # BT.709
        for pixels in FRAMES[:5, :, :64]:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(
                stream.encode(frame.reformat(format="yuvj420p", dst_colorspace="itu709", dst_color_range="JPEG"))
            )
        container.mux(stream.encode())
    shrink(source, tmp_path / "out", 32)
    before, after = read(source)[0], read(tmp_path / "out" / "wide.mp4")[0]
    assert after.shape == (5, 32, 64, 3)
    assert difference(after[2], before[2]) < 5
    assert abs(after.mean((0, 1, 2)) - before.mean((0, 1, 2))).max() < 2


def test_frames_stored_out_of_order_in_an_avi_file_stay_in_order(tmp_path):
    source = write_video(tmp_path / "old.avi", FRAMES, codec="libx264", preset="medium", bf="3")
    shrink(source, tmp_path / "out", 32)
    frames, times, _ = read(tmp_path / "out" / "old.mp4")
    assert numbers(frames) == list(range(30))
    assert times == pytest.approx(np.arange(30) / 25)


def test_uneven_times_stay(tmp_path):
    times = np.cumsum(np.random.default_rng(0).integers(10, 90, 30)) - 10
    source = write_video(tmp_path / "uneven.mp4", FRAMES, times=times)
    shrink(source, tmp_path / "out", 32)
    assert read(tmp_path / "out" / "uneven.mp4")[1] == pytest.approx((times - times[0]) / 1000, abs=1e-3)


def test_pictures_that_begin_after_the_sound_stay_where_they_are(tmp_path):
    times = 1000 + 40 * np.arange(30)
    for name in ("late.mkv", "late.mp4"):
        source = write_video(tmp_path / name, FRAMES, times=times, sound=True, g="250")
        with open_video(f"{source}#t=1.2,1.6") as video:
            expected = numbers(video.read(range(video.frames)))
        assert len(expected) == 10
        assert 0 < expected[0] < 6
        out = tmp_path / f"out-{name}"
        shrink(source, out, 32)
        with open_video(f"{out / 'late.mp4'}#t=1.2,1.6") as video:
            assert numbers(video.read(range(video.frames))) == expected
        with open_video(str(out / "late.mp4")) as video:
            assert numbers(video.read(range(video.frames))) == list(range(30))
            assert video.fps == pytest.approx(25)


def test_a_film_whose_frames_change_their_size_is_broken(tmp_path):
    parts = [write_video(tmp_path / f"{side}.ts", FRAMES[:8, :side], codec="libx264") for side in (64, 48)]
    (tmp_path / "both.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    (broken,) = shrink(tmp_path / "both.ts", tmp_path / "out", 32).broken
    assert broken["reason"] == "its frames differ in size: 48 x 96 in frame 8, 64 x 96 in frame 0"


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animations_become_films(suffix, tmp_path):
    milliseconds = [40] * 10 + [100] * 20
    write_animation(tmp_path / f"moving{suffix}", FRAMES, milliseconds)
    (tmp_path / "list.csv").write_text(f"path\nmoving{suffix}\n")
    shrink(tmp_path / "list.csv", tmp_path / "out", 32)
    frames, times, _ = read(tmp_path / "out" / "moving.mp4")
    assert numbers(frames) == list(range(30))
    assert times == pytest.approx(np.cumsum([0, *milliseconds[:-1]]) / 1000)


def test_folders_of_frames_become_folders_of_small_jpegs(tmp_path):
    films, out = tmp_path / "films", tmp_path / "out"
    write_frames(films / "v1.0", FRAMES[:4])
    small = write_frames(films / "small", FRAMES[:2, :20, :20], suffix=".jpg")
    write_frames(films / "half", FRAMES[:2])
    cut(films / "half" / "frame1.png", 0.5)
    result = shrink(films, out, 32)
    assert listed(out) == {f"v1.0/frame{i}.jpg" for i in range(4)} | {"small/frame0.jpg", "small/frame1.jpg"}
    frames = np.stack([np.array(PIL.Image.open(out / "v1.0" / f"frame{i}.jpg")) for i in range(4)])
    assert frames.shape[1:] == (32, 48, 3)
    assert numbers(frames) == [0, 1, 2, 3]
    assert (out / "small" / "frame1.jpg").read_bytes() == (small / "frame1.jpg").read_bytes()
    assert (result.encoded, result.copied) == (1, 1)
    assert result.broken == [{"path": "half", "reason": "frame1.png: truncated"}]


def test_broken_files_are_named_and_leave_nothing(films, tmp_path):
    out = tmp_path / "out"
    whole = write_video(films / "whole.mp4", FRAMES, faststart=True)
    cut(whole, 0.6, films / "cut.mp4")
    cut(films / "dogs" / "b.mkv", 0.5, films / "cut.mkv").rename(films / "tail.mkv")
    (films / "empty.mp4").touch()
    (films / "text.mp4").write_text("not a film at all")
    spoilt = bytearray(whole.read_bytes())
    middle = len(spoilt) * 3 // 4
    spoilt[middle : middle + 400] = bytes(400)
    (films / "spoilt.mp4").write_bytes(spoilt)
    for _ in range(2):
        result = shrink(films, out, 32, workers=2)
        reasons = {entry["path"]: entry["reason"] for entry in result.broken}
        assert list(reasons) == ["cut.mp4", "empty.mp4", "spoilt.mp4", "tail.mkv", "text.mp4"]
        assert reasons["cut.mp4"].startswith("truncated: ")
        assert reasons["tail.mkv"].startswith("truncated: ")
        assert reasons["spoilt.mp4"].startswith("damaged: ")
        assert reasons["empty.mp4"] == "empty file"
        assert reasons["text.mp4"] == "not a video"
        assert listed(out) == {"cats/a.mp4", "dogs/b.mp4", "whole.mp4"}
        lines = [json.loads(line) for line in (out / data_shrink.LEDGER).read_text().splitlines()]
        assert sorted(lines, key=lambda line: line["path"]) == result.broken
    assert not result.all_broken
    assert shrink(films / "empty.mp4", tmp_path / "nothing").all_broken
    console = Console(file=io.StringIO(), width=300)
    result.render(console)
    for expected in ("8 videos", "empty.mp4: empty file", "there already", "MB"):
        assert expected in console.file.getvalue()


def test_a_decoder_that_crashes_or_hangs_takes_nothing_along(films, tmp_path, monkeypatch):
    shrunk = reencode._shrink_video

    def fragile(path, out, *options):
        out.write_bytes(b"half")
        if path.endswith("a.mp4"):
            os.kill(os.getpid(), signal.SIGKILL)
        if path.endswith("hangs.mp4"):
            reencode._expect_within(1)
            time.sleep(60)
        return shrunk(path, out, *options)

    monkeypatch.setattr(reencode, "_shrink_video", fragile)
    write_video(films / "hangs.mp4", FRAMES[:2])
    result = shrink(films, tmp_path / "out", 32, workers=2)
    assert [entry["path"] for entry in result.broken] == ["cats/a.mp4", "hangs.mp4"]
    assert listed(tmp_path / "out") == {"dogs/b.mp4"}


def test_frames_that_a_decoder_leaves_out_in_silence_are_noticed(films, tmp_path, monkeypatch):
    @contextmanager
    def one_more(path):
        with open_video(path) as reader:
            yield SimpleNamespace(frames=reader.frames + 1, fps=reader.fps)

    monkeypatch.setattr(reencode, "open_video", one_more)
    reason = "damaged: 30 of 31 frames can be decoded"
    assert [entry["reason"] for entry in shrink(films, tmp_path / "out", 32).broken] == [reason, reason]
    assert listed(tmp_path / "out") == set()


def test_a_full_disk_is_not_the_files_fault(films, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(reencode.FULL[0], "No space left on device")

    monkeypatch.setattr(reencode, "_encode", full)
    with pytest.raises(OSError, match="No space left") as error:
        shrink(films, tmp_path / "out", 32, workers=1)
    assert not isinstance(error.value, BrokenFile)
    assert listed(tmp_path / "out") == set()


ROWS = [
    {"path": "cats/a.mp4", "label": "cat, tame", "start": "0.2", "end": "0.8"},
    {"path": "dogs/b.mkv", "label": "dog", "start": None, "end": None},
    {"path": "cats/a.mp4#t=0.5", "label": "cat, tame", "start": None, "end": None},
    {"path": "gone.mov", "label": "dog", "start": None, "end": None},
]
NEW_PATHS = ["cats/a.mp4", "dogs/b.mp4", "cats/a.mp4#t=0.5", "gone.mp4"]


def write_manifest(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row | {"vector": [1.0, 2.0]} for row in rows]), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row | {"vector": [1, 2]}) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def read_manifest(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["manifest.csv", "manifest.jsonl", "manifest.parquet"])
def test_the_manifest_goes_along_with_new_paths(name, films, tmp_path):
    rows = [row | {"start": None, "end": None} if "#t=" in row["path"] else row for row in ROWS]
    write_manifest(films / name, rows)
    write_video(films / "unlisted.mp4", FRAMES[:2])
    result = shrink(films, tmp_path / "out", 32, workers=1)
    assert result.broken == [{"path": "gone.mov", "reason": "no such file"}]
    assert result.encoded == 2
    assert listed(tmp_path / "out") == {"cats/a.mp4", "dogs/b.mp4", name}
    old, new = read_manifest(films / name), read_manifest(tmp_path / "out" / name)
    assert [row.pop("path") for row in new] == NEW_PATHS
    assert new == [{key: value for key, value in row.items() if key != "path"} for row in old]


def test_a_manifest_elsewhere_names_files_of_any_place(films, tmp_path):
    (tmp_path / "lists").mkdir()
    rows = [{"path": str(films / "cats" / "a.mp4")}, {"path": "../films/dogs/b.mkv"}]
    write_manifest(tmp_path / "lists" / "test.csv", rows)
    shrink(tmp_path / "lists" / "test.csv", tmp_path / "out", 32, workers=1)
    assert listed(tmp_path / "out") == {"test.csv", "cats/a.mp4", "dogs/b.mp4"}
    assert read_manifest(tmp_path / "out" / "test.csv") == [{"path": "cats/a.mp4"}, {"path": "dogs/b.mp4"}]


def test_what_is_refused(films, tmp_path):
    for inside in (films, films / "cats" / "small"):
        with pytest.raises(UserError, match="is, or lies in, the folder that is read"):
            shrink(films, inside)
    with pytest.raises(UserError, match="lies in, the folder that is read"):
        shrink(films / "cats" / "a.mp4", films / "cats")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(UserError, match="holds other things"):
        shrink(films, tmp_path / "other")
    with pytest.raises(UserError, match="no file of modality video"):
        shrink(tmp_path / "other", tmp_path / "out")
    with pytest.raises(UserError, match="even number of pixels, at least 16"):
        shrink(films, tmp_path / "out", 255)
    write_video(films / "cats" / "a.mov", FRAMES[:2])
    with pytest.raises(UserError, match=r"cats/a\.mov and cats/a\.mp4 would both become a\.mp4"):
        shrink(films, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (films / "manifest.csv").write_text("path\nread.me\n")
    assert shrink(films, tmp_path / "out").broken == [{"path": "read.me", "reason": "empty file"}]
