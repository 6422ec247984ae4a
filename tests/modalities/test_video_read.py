import re

import av
import numpy as np
import PIL.Image
import pytest
from av.video.reformatter import VideoReformatter
from media import cut, numbered, numbers, rotate, tone, write_animation, write_frames, write_sound, write_video

from mmssl.data.guard import BrokenFile, guarded
from modalities import video_stream
from modalities.encoder import MODALITIES
from modalities.video_read import open_video

COUNT = 80
OPEN_GOP = {"g": "12", "preset": "medium", "x264-params": "open-gop=1:keyint=12:min-keyint=12:bframes=3:b-adapt=0"}
VARYING = {"times": np.cumsum(np.arange(COUNT) % 3 * 20 + 20)}
KINDS = {
    "one-group.mp4": {},
    "b-frames.mp4": {"g": "30", "bf": "3", "preset": "medium"},
    "open-groups.mp4": OPEN_GOP,
    "open-groups.mkv": OPEN_GOP,
    "refresh.mp4": {"g": "30", "preset": "medium", "x264-params": "intra-refresh=1"},
    "varying.mp4": {**VARYING, "g": "20", "bf": "2", "preset": "fast", "sound": False},
    "varying.mkv": {**VARYING, "g": "20"},
    "sound.mp4": {"g": "30", "bf": "2", "preset": "fast", "sound": True, "faststart": True},
    "vp9.webm": {"g": "30", "deadline": "realtime", "cpu-used": "8"},
    "vp8.webm": {"codec": "libvpx", "g": "30"},
    "plain.avi": {"g": "12"},
    "b-frames.avi": {"g": "12", "bf": "2"},
    "h264.avi": {"codec": "libx264", "g": "30", "bf": "2", "preset": "fast"},
    "mpeg2.mpg": {"codec": "mpeg2video", "g": "12", "bf": "2"},
    "open-groups.ts": {"codec": "libx264", **OPEN_GOP},
    "flash.flv": {"codec": "libx264", "g": "30", "bf": "2", "preset": "fast"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Write a video of ``KINDS`` by its name, once."""
    folder = tmp_path_factory.mktemp("videos")
    frames = numbered(COUNT)

    def make(name):
        path = folder / name
        return path if path.exists() else write_video(path, frames, **KINDS[name])

    return make


def sequentially(path):
    """Return all frames [n, h, w, 3] as FFmpeg decodes them one after the other."""
    with av.open(str(path)) as container:
        options = {"format": "rgb24", "interpolation": "BICUBIC"}
        return np.stack([VideoReformatter().reformat(f, **options).to_ndarray() for f in container.decode(video=0)])


def opened(path):
    """Return count, rate, and whether every frame is there, as text where the file is broken."""
    with open_video(path) as video:
        seen = numbers(video.read(range(video.frames)))
        return video.frames, round(video.fps, 2), seen == list(range(video.frames))


def reason(path, read=opened):
    with pytest.raises(BrokenFile) as caught:
        guarded(read, str(path), None)
    return caught.value.reason


@pytest.mark.parametrize("name", KINDS)
def test_frames_from_anywhere_are_those_of_decoding_all_to_the_bit(made, name):
    path = made(name)
    expected = sequentially(path)
    assert numbers(expected) == list(range(COUNT))
    with open_video(str(path)) as video:
        assert video.frames == COUNT
        assert video.fps == pytest.approx(COUNT / VARYING["times"][-1] * 1000 if "varying" in name else 25, rel=0.02)
        assert video.size == (48, 64)
        for index in np.random.default_rng(0).permutation(COUNT)[:20]:
            np.testing.assert_array_equal(video.read([index])[0], expected[index])
        # Repeated, unsorted, across groups and to the last frame.
        wanted = [70, 3, 3, COUNT - 1, 0, 41, 29, 30, 31]
        np.testing.assert_array_equal(video.read(wanted), expected[wanted])


def test_only_what_the_wanted_frames_depend_on_is_decoded(made, monkeypatch):
    fed = []

    def counted(file, key, decode=video_stream._decoded):
        for number, frame in decode(file, key):
            fed.append(number)
            yield number, frame

    monkeypatch.setattr(video_stream, "_decoded", counted)
    with open_video(str(made("vp9.webm"))) as video:
        video.read([64, 31])
    assert len(fed) == (64 - 60 + 1) + (31 - 30 + 1)


@pytest.mark.parametrize("name", ["b-frames.mp4", "open-groups.mp4", "open-groups.mkv", "open-groups.ts", "vp8.webm"])
def test_key_frames_are_enough_to_begin_at(made, name, monkeypatch):
    monkeypatch.delattr(video_stream.PyAV, "_decoded_from_the_first")
    with open_video(str(made(name))) as video:
        assert numbers(video.read([70])) == [70]
        assert numbers(video.read([11, 12, 13, 34, 35, 36])) == [11, 12, 13, 34, 35, 36]


def test_scaling_while_decoding_is_near_scaling_afterwards(made):
    with open_video(str(made("b-frames.mp4"))) as video:
        whole, small = video.read([20, 50]), video.read([20, 50], (24, 40))
    assert small.shape == (2, 24, 40, 3)
    assert numbers(small) == [20, 50]
    for one, other in zip(whole, small, strict=True):
        theirs = np.asarray(PIL.Image.fromarray(one).resize((40, 24), PIL.Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(theirs - other).mean() < 4


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_turned_videos_come_upright(tmp_path, degrees):
    path = rotate(write_video(tmp_path / "turned.mp4", numbered(3)), degrees)
    with open_video(str(path)) as video:
        assert video.size == ((48, 64) if degrees == 180 else (64, 48))
        (frame,) = video.read([2])
        (small,) = video.read([2], (60, 40))
    assert small.shape == (60, 40, 3)
    # Turned back, the number can be read.
    assert numbers(np.rot90(frame, degrees // 90)[None]) == [2]
    assert numbers(np.rot90(small, degrees // 90)[None]) == [2]


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("size", [(48, 64), (36, 48), (26, 34), (24, 32), (12, 16)])
def test_decord_gets_narrow_and_turned_videos_right(tmp_path, size, degrees):
    """FFmpeg pads rows to what the processor likes, so that other sizes of these are padded on other machines."""
    path = write_video(tmp_path / "narrow.mp4", numbered(9, *size), crf="0")
    turned = str(rotate(path, degrees) if degrees else path)
    with open_video(turned) as one, open_video(turned, decoder="decord") as other:
        assert one.size == other.size == (size[::-1] if degrees % 180 else size)
        np.testing.assert_allclose(other.read([7, 2, 2]), one.read([7, 2, 2]), atol=2)
        shrunk = one.read([3], (16, 12)), other.read([3], (16, 12))
    assert shrunk[0].shape == shrunk[1].shape == (1, 16, 12, 3)
    assert np.abs(shrunk[0].astype(int) - shrunk[1]).mean() < 16  # their filters differ


@pytest.mark.parametrize("name", ["b-frames.mp4", "open-groups.mkv", "vp9.webm", "h264.avi", "open-groups.ts"])
def test_a_piece_is_its_frames_alone(made, name):
    path, expected = made(name), sequentially(made(name))
    for piece, first, last in (("#t=1,2", 25, 49), ("#t=2.5", 63, 79), ("#t=0,0.5", 0, 12), ("#t=1.01,1.05", 26, 26)):
        with open_video(f"{path}{piece}") as video:
            assert video.frames == last - first + 1
            assert video.fps == pytest.approx(25, rel=1e-3)
            wanted = [video.frames - 1, 0]
            np.testing.assert_array_equal(video.read(wanted), expected[[last, first]])
            with pytest.raises(IndexError):
                video.read([video.frames])
    assert reason(f"{path}#t=9,10") == "no frame from 9 s to 10 s"


def test_a_piece_does_not_need_the_rest_of_the_file_to_be_listed(made):
    with open_video(f"{made('vp9.webm')}#t=1.5,2") as video:
        assert len(video._packets.numbers) < 25


@pytest.mark.parametrize("piece", ["", "#t=1,2"])
def test_decord_reads_what_pyav_reads_where_it_is_exact(made, piece):
    path = f"{made('b-frames.mp4')}{piece}"
    with open_video(path) as one, open_video(path, decoder="decord") as other:
        assert (one.frames, one.fps, one.size) == (other.frames, other.fps, other.size)
        wanted = [20, 3, 3, one.frames - 1]
        assert numbers(one.read(wanted)) == numbers(other.read(wanted))
        assert numbers(other.read([7], (24, 32))) == numbers(one.read([7]))


INTACT = {
    "end.mp4": ({}, "truncated: the table of its frames is missing"),
    "front.mp4": ({"faststart": True, "bf": "2", "preset": "fast"}, "of 40 frames"),
    "sound.mp4": ({"faststart": True, "sound": True}, "of 40 frames"),
    "plain.mkv": ({"bf": "2", "preset": "fast"}, "truncated: "),
    "sound.mkv": ({"sound": True}, "truncated: "),
    "slow.mkv": ({"fps": 1}, "truncated: "),
    "plain.webm": ({"deadline": "realtime", "cpu-used": "8"}, "truncated: "),
    "plain.avi": ({}, "truncated: "),
    "sound.avi": ({"sound": True}, "truncated: "),
    "plain.flv": ({"codec": "libx264"}, "truncated: |damaged: "),
}


@pytest.mark.parametrize("name", INTACT)
def test_truncated_files_are_refused_and_intact_ones_are_not(tmp_path, name):
    options, expected = INTACT[name]
    path = write_video(tmp_path / name, numbered(40), **options)
    assert guarded(opened, str(path), None) == (40, options.get("fps", 25), True)
    for fraction in (0.9, 0.6, 0.3):
        said = reason(cut(path, fraction, tmp_path / f"cut{path.suffix}"))
        assert re.search(f"{expected}|not a video", said), (fraction, said)


def test_a_length_in_seconds_that_is_not_reached_is_told(tmp_path):
    path = write_video(tmp_path / "video.flv", numbered(40), codec="libx264")
    assert re.fullmatch(r"truncated: 0\.\d\d of 1\.60 s", reason(cut(path, 0.6)))


@pytest.mark.parametrize("suffix", [".mkv", ".webm", ".avi"])
def test_a_few_bytes_less_are_too_few(tmp_path, suffix):
    path = write_video(tmp_path / f"video{suffix}", numbered(40), bf="0")
    assert "truncated" in reason(cut(path, 0.98))


def test_a_few_bytes_less_of_windows_media_are_too_few(tmp_path):
    path = write_video(tmp_path / "video.wmv", numbered(40), codec="wmv2")
    assert opened(str(path))[0] == 40
    size, data = path.stat().st_size, bytearray(path.read_bytes())
    assert reason(cut(path, 0.98)) == f"truncated: {int(size * 0.98)} of {size} bytes"
    # One that was written as it went says so, and its size means nothing.
    data[data.index(bytes.fromhex("a1dcab8c47a9cf11")) + 88] |= 1
    path.write_bytes(data[: int(size * 0.98)])
    assert opened(str(path))[0] == 40


def test_a_container_that_announces_nothing_is_believed(tmp_path):
    # As recordings cut off and live streams are: of unknown length, which is all ones, and without duration.
    path = write_video(tmp_path / "live.mkv", numbered(20))
    with av.open(str(path)) as source, av.open(str(tmp_path / "live2.mkv"), "w", options={"live": "1"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux():
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    assert guarded(opened, str(tmp_path / "live2.mkv"), None) == (20, 25, True)


def test_frames_that_an_edit_list_hides_are_neither_counted_nor_missed(tmp_path):
    path, edited = write_video(tmp_path / "a.mp4", numbered(40), bf="2", preset="fast"), tmp_path / "edited.mp4"
    with av.open(str(path)) as source, av.open(str(edited), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux():
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - 12 * 512, packet.dts - 12 * 512, stream
                target.mux(packet)
    with open_video(str(edited)) as video:
        assert video.frames == 28
        assert numbers(video.read([0, 5, 27])) == [12, 17, 39]


def test_fragmented_mp4(tmp_path):
    path, parts = write_video(tmp_path / "a.mp4", numbered(40), g="10"), tmp_path / "parts.mp4"
    options = {"movflags": "frag_keyframe+empty_moov"}
    with av.open(str(path)) as source, av.open(str(parts), "w", options=options) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux():
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    assert guarded(opened, str(parts), None) == (40, 25, True)
    assert "truncated" in reason(cut(parts, 0.6))


@pytest.mark.parametrize(("after", "begin"), [(0, 0.25), (1, 0.25), (1, 0), (2, 0)])
def test_damage_on_the_way_is_noticed_and_elsewhere_it_is_not(made, tmp_path, after, begin):
    # The rest of a key frame, or of one of the next two that others refer to, is zeros, as after a broken download.
    path, data = tmp_path / "damaged.mp4", bytearray(made("b-frames.mp4").read_bytes())
    with av.open(str(made("b-frames.mp4"))) as container:
        entries = list(container.streams.video[0].index_entries)
        hit = entries[[i for i, entry in enumerate(entries) if entry.is_keyframe][1] + after]
        first, last = hit.pos + int(begin * hit.size), hit.pos + hit.size
    data[first:last] = bytes(last - first)
    path.write_bytes(data)
    with open_video(str(path)) as video:
        assert numbers(video.read([0, 25, 65])) == [0, 25, 65]
        with pytest.raises(BrokenFile, match="damaged: "):
            video.read([0, 59])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [("a.mp4", b"", "empty file"), ("a.mp4", b"not a video " * 99, "not a video"), ("a.gif", b"", "empty file")],
)
def test_what_is_no_video_is_told(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert reason(tmp_path / name) == expected


def test_files_without_pictures_are_told(tmp_path):
    write_sound(tmp_path / "sound.wav", tone(0.1)).rename(tmp_path / "sound.mp4")
    assert reason(tmp_path / "sound.mp4") == "no video track"
    assert reason(tmp_path / "missing.mp4") == "no such file"
    (tmp_path / "folder").mkdir()
    assert reason(tmp_path / "folder") == "a folder without frames"


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".avi", ".gif", ".webp"])
def test_one_frame_is_a_video(tmp_path, suffix):
    write = write_animation if suffix in (".gif", ".webp") else write_video
    path = write(tmp_path / f"one{suffix}", numbered(1, first=5))
    with open_video(str(path)) as video:
        assert video.frames == 1
        assert video.fps > 0
        assert numbers(video.read([0, 0])) == [5, 5]


def test_frames_of_two_sizes_in_one_file_are_told(tmp_path):
    parts = [write_video(tmp_path / f"{rows}.ts", numbered(8, rows), codec="libx264") for rows in (48, 32)]
    (tmp_path / "both.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    with open_video(str(tmp_path / "both.ts")) as video:
        assert video.size == (48, 64)
        assert numbers(video.read([7, 1])) == [7, 1]
        for size in (None, (8, 8)):
            with pytest.raises(BrokenFile, match=r"^its frames differ in size: 32 x 64 in frame 8, 48 x 64 in frame "):
                video.read(range(16), size)
    with pytest.raises(BrokenFile, match="its frames differ in size"):
        MODALITIES["video"].inspect(str(tmp_path / "both.ts"))


def test_a_folder_of_frames_is_in_the_order_of_its_numbers(tmp_path):
    folder = write_frames(tmp_path / "frames", numbered(12))
    (folder / "notes.txt").write_text("not a frame")
    (folder / ".frame3.png").write_bytes(b"what some systems leave")
    with open_video(str(folder)) as video:
        assert (video.frames, video.fps, video.size) == (12, 25, (48, 64))
        np.testing.assert_array_equal(video.read([11, 2, 2]), numbered(12)[[11, 2, 2]])
        assert numbers(video.read([10, 1], (24, 32))) == [10, 1]
        with pytest.raises(IndexError):
            video.read([-1])
    with open_video(f"{folder}#t=0.5,1", folder_fps=10) as video:
        assert (video.frames, video.fps) == (5, 10)
        assert numbers(video.read(range(5))) == [5, 6, 7, 8, 9]


def test_frames_of_a_folder_that_differ_in_size_or_are_broken_are_told(tmp_path):
    folder = write_frames(tmp_path / "frames", numbered(3))
    PIL.Image.new("RGB", (10, 20)).save(folder / "frame1.png")
    cut(folder / "frame2.png", 0.5)
    with open_video(str(folder)) as video:
        assert numbers(video.read([0])) == [0]
        with pytest.raises(BrokenFile, match=r"differ in size: 20 x 10 in frame1.png, 48 x 64 in frame0.png"):
            video.read([0, 1])
        with pytest.raises(BrokenFile, match=r"frame2.png"):
            video.read([2])


def test_a_broken_first_frame_of_a_folder_is_named(tmp_path):
    folder = write_frames(tmp_path / "frames", numbered(2))
    (folder / "frame0.png").write_bytes(b"not a picture")
    assert reason(folder).startswith("frame frame0.png: not an image")
    (folder / "frame0.png").write_bytes(b"")
    assert "frame0.png" in reason(folder)


@pytest.mark.parametrize("colours", [2, 256])
def test_bytes_behind_a_gif_are_no_part_of_it(tmp_path, colours):
    first, *rest = [PIL.Image.fromarray(frame).quantize(colours) for frame in numbered(4)]
    path = tmp_path / "a.gif"
    first.save(path, save_all=True, append_images=rest, duration=40)
    whole = path.read_bytes()
    for behind in (b"", bytes(3), b"left by a web server"):
        path.write_bytes(whole + behind)
        with open_video(str(path)) as video:
            assert video.frames == 4
    # Wherever it is cut, also where the last byte looks like a trailer.
    for length in {len(whole) - 1, len(whole) - 2, whole.index(b";", len(whole) // 4) + 1} - {len(whole)}:
        path.write_bytes(whole[:length])
        assert reason(path) == "truncated: its trailer is missing"


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animations(tmp_path, suffix):
    frames = numbered(8)
    path = write_animation(tmp_path / f"a{suffix}", frames, [40, 40, 120, 40, 40, 40, 40, 40])
    with open_video(str(path)) as video:
        assert (video.frames, video.size) == (8, (48, 64))
        assert video.fps == pytest.approx(8 / 0.4)
        assert numbers(video.read([7, 0, 3, 3])) == [7, 0, 3, 3]
        assert numbers(video.read([6], (24, 32))) == [6]
    with open_video(f"{path}#t=0.1,0.25") as video:
        assert numbers(video.read(range(video.frames))) == [3, 4][: video.frames]
        assert video.frames == 2 or pytest.fail("frames at 0.20 and 0.24 s")
    assert reason(cut(path, 0.6, tmp_path / f"cut{suffix}"))


def test_an_animation_is_laid_over_what_came_before_and_over_white(tmp_path):
    red, clear = (PIL.Image.new("RGBA", (8, 8), colour) for colour in ((255, 0, 0, 255), (0, 0, 0, 0)))
    part = clear.copy()
    part.paste((0, 0, 255, 255), (0, 0, 4, 8))
    part.save(tmp_path / "a.gif", save_all=True, append_images=[red], duration=0, disposal=2)
    with open_video(str(tmp_path / "a.gif")) as video:
        first, second = video.read([0, 1])
        assert video.fps == 10
    assert first[0, 0].tolist() == [0, 0, 255]
    assert first[0, 7].tolist() == [255, 255, 255]
    assert (second == [255, 0, 0]).all()
