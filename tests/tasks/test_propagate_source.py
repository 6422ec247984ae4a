"""A person's own video: what is followed, written, stopped and refused."""

import errno
import json
import signal

import av
import numpy as np
import PIL.Image
import pytest
from marked import SIZE, moving_square
from media import numbered, write_animation, write_frames, write_video

import mmssl
from mmssl.errors import UserError
from tasks import propagate_source as over_source
from tasks.cli import main
from tasks.propagate_source import propagate_source, write_first_frame
from tasks.sequences import read_mask, write_mask
from tasks.tracks import mask_of


@pytest.fixture
def saved(tiny_encoder, tmp_path):
    tiny_encoder().save(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_a_video_is_followed_frame_by_frame(tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(over_source, "PIECE", 3 * 3 * SIZE[0] * SIZE[1])  # three frames at a time
    frames, masks = moving_square()
    write_video(tmp_path / "film.mp4", frames, fps=10, crf="1")
    PIL.Image.fromarray(masks[0] * 255).save(tmp_path / "mask.png")
    result = propagate_source(
        tiny_encoder(), tmp_path / "film.mp4", tmp_path / "mask.png", tmp_path / "out", layer="patches"
    )
    found = [read_mask(path) for path in sorted((tmp_path / "out" / "masks").iterdir())]
    assert len(found) == 8
    assert np.array_equal(found[0], masks[0])
    assert all((mask == truth).mean() > 0.97 for mask, truth in zip(found, masks, strict=True))
    assert result.areas["1"][0] == pytest.approx(256 / 3072)
    assert result.settings.short_side == 48
    with over_source.open_video(str(tmp_path / "out" / "overlay.mp4")) as film:
        assert (film.frames, film.size) == (8, SIZE)
        assert film.fps == pytest.approx(10)
        played = film.read([0, 7]).astype(float)
    # Red is laid over the square and nothing over the rest.
    assert played[1, 20:28, 40:48, 0].mean() > frames[7, 20:28, 40:48, 0].mean() + 30
    assert np.abs(played[1, :10] - frames[7, :10]).mean() < 5
    for name in ("sheet.png", "report.html", "propagate.json"):
        assert (tmp_path / "out" / name).is_file()


@pytest.mark.parametrize("form", ["folder", "film.gif", "piece"])
def test_folders_animations_and_pieces_are_videos_too(ask, saved, tmp_path, form):
    frames, masks = moving_square()
    if form == "folder":
        source = write_frames(tmp_path / "frames", frames[:, :47, :63])
        masks = masks[:, :47, :63]
    elif form == "piece":
        source, masks = f"{write_video(tmp_path / 'film.mp4', frames, fps=10, crf='1')}#t=0.2,0.7", masks[2:7]
    else:
        source = write_animation(tmp_path / form, frames)
    write_mask(tmp_path / "mask.png", masks[0])
    code, out, _ = ask(
        "propagate", saved, "--source", source, "--first-mask", tmp_path / "mask.png", "--layer", "patches",
        "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["frames"] == len(masks)
    found = [read_mask(path) for path in sorted((tmp_path / "out" / "masks").iterdir())]
    assert (found[4] == masks[4]).mean() > 0.95
    with over_source.open_video(str(tmp_path / "out" / "overlay.mp4")) as film:
        assert film.frames == len(masks)
        assert film.size == tuple(side - side % 2 for side in masks.shape[1:])


def test_what_is_stopped_leaves_whole_files(tiny_encoder, tmp_path, monkeypatch):
    frames, masks = moving_square()
    write_frames(tmp_path / "frames", frames)
    write_mask(tmp_path / "mask.png", masks[0])
    taken = []

    def stop_at_the_fifth(*words):
        taken.append(words)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return mask_of(*words)

    monkeypatch.setattr(over_source, "mask_of", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        propagate_source(tiny_encoder(), tmp_path / "frames", tmp_path / "mask.png", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["masks", "overlay.mp4"]
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 4
    with over_source.open_video(str(tmp_path / "out" / "overlay.mp4")) as film:
        assert film.frames == 4


def test_colours_survive_in_the_film(tmp_path):
    colour = np.array([210, 50, 20], np.uint8)
    with over_source.recording(tmp_path / "a.mp4", 25, SIZE) as record:
        record(np.full((*SIZE, 3), colour))
    with over_source.open_video(str(tmp_path / "a.mp4")) as film:
        assert np.abs(film.read([0]).mean((0, 1, 2)) - colour).max() < 4


def test_nothing_is_left_of_a_film_without_frames(tmp_path):
    with pytest.raises(ValueError, match="before"), over_source.recording(tmp_path / "a.mp4", 25, SIZE):
        raise ValueError("before the first frame")
    assert list(tmp_path.iterdir()) == []


def marked(tmp_path, frames=None, **options):
    """Write the square's frames as a folder, and its mask beside it."""
    square, masks = moving_square()
    write_frames(tmp_path / "frames", square if frames is None else frames, **options)
    write_mask(tmp_path / "mask.png", masks[0])
    return tmp_path / "frames", tmp_path / "mask.png", tmp_path / "out"


def test_a_signal_finishes_the_film_and_the_handler_comes_back(ask, saved, tmp_path, monkeypatch):
    source, mask, out = marked(tmp_path)
    taken = []

    def end_at_the_third(*words):
        taken.append(words)
        if len(taken) == 2:
            signal.raise_signal(signal.SIGTERM)
        return mask_of(*words)

    monkeypatch.setattr(over_source, "mask_of", end_at_the_third)
    before = signal.getsignal(signal.SIGTERM)
    code, _, err = ask("propagate", saved, "--source", source, "--first-mask", mask, "--out", out)
    assert code == 143
    assert "stopped after 3 of 8 frames" in err
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(list((out / "masks").iterdir())) == 3
    with over_source.open_video(str(out / "overlay.mp4")) as film:
        assert film.frames == 3


@pytest.mark.parametrize("fails", ["mux", "close"])
def test_a_film_that_cannot_be_closed_has_no_final_name(tmp_path, monkeypatch, fails):
    real, full = av.open, OSError(errno.ENOSPC, "No space left on device")

    class Full:
        def __init__(self, *words, **options):
            self.container, self.muxed = real(*words, **options), 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.container.close()

        def add_stream(self, *words, **options):
            return self.container.add_stream(*words, **options)

        def mux(self, packets):
            self.muxed += 1
            if fails == "mux" and self.muxed > 2:
                raise full
            self.container.mux(packets)

        def close(self):
            if fails == "close":
                raise full
            self.container.close()

    monkeypatch.setattr(over_source.av, "open", Full)
    with pytest.raises(OSError, match="No space"), over_source.recording(tmp_path / "a.mp4", 25, SIZE) as record:
        for _ in range(4):
            record(np.zeros((*SIZE, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_what_is_before_a_broken_frame_is_written(ask, saved, tmp_path):
    source, mask, out = marked(tmp_path)
    broken = source / "frame5.png"
    broken.write_bytes(broken.read_bytes()[:600])
    code, _, err = ask("propagate", saved, "--source", source, "--first-mask", mask, "--out", out)
    assert code == 3
    assert "frame5.png" in err
    assert "the 5 frames before are done" in err
    assert [path.stem for path in sorted((out / "masks").iterdir())] == [f"{index:05d}" for index in range(5)]
    with over_source.open_video(str(out / "overlay.mp4")) as film:
        assert film.frames == 5


def test_an_uneven_rate_is_said(tmp_path, tiny_encoder, capsys):
    frames, masks = moving_square()
    write_mask(tmp_path / "mask.png", masks[0])
    for name, times in (("even", range(0, 320, 40)), ("uneven", [0, 40, 80, 200, 240, 280, 500, 540])):
        film = write_video(tmp_path / f"{name}.mkv", frames, times=list(times))
        result = propagate_source(tiny_encoder(), film, tmp_path / "mask.png", tmp_path / name)
        assert any("unevenly" in note for note in result.notes) == (name == "uneven")
        assert ("unevenly" in capsys.readouterr().err) == (name == "uneven")


def test_the_persons_colours_are_those_of_film_and_key(tmp_path, tiny_encoder):
    source, _, out = marked(tmp_path)
    painted = moving_square(1)[1][0][..., None] * np.array([0, 0, 255], np.uint8)
    PIL.Image.fromarray(painted).save(tmp_path / "blue.png")
    result = propagate_source(tiny_encoder(), source, tmp_path / "blue.png", out, encoder_name="runs/mine")
    assert result.colours.tolist() == [[0, 0, 255]]
    with over_source.open_video(str(out / "overlay.mp4")) as film:
        red, _, blue = film.read([0])[0, 16:32, [8, 23]].mean((0, 1))
    assert blue > red + 100
    page = (out / "report.html").read_text()
    assert "runs/mine" in page
    assert "object 1" in page
    assert len(repr(result)) < 800
    assert "areas" not in repr(result)


def test_notes_are_said_once(ask, saved, tmp_path):
    source, mask, out = marked(tmp_path)
    code, printed, err = ask("propagate", saved, "--source", source, "--first-mask", mask, "--out", out)
    assert code == 0
    assert (printed + err).count("of the frame)") == 1


def test_the_first_frame_is_written_to_draw_on(tmp_path):
    source, _, _ = marked(tmp_path)
    file = write_first_frame(source, tmp_path / "first.png").file
    assert np.array_equal(np.asarray(PIL.Image.open(file)), moving_square(1)[0][0])
    for name, words in (("first.png", "there already"), ("first.jpg", "as a PNG"), ("no/first.png", "no such folder")):
        with pytest.raises(UserError, match=words):
            write_first_frame(source, tmp_path / name)


def test_it_is_part_of_the_public_api():
    assert mmssl.propagate_source is propagate_source


# Mistakes


def test_a_folder_of_videos_is_not_one(tmp_path, tiny_encoder):
    _, mask, out = marked(tmp_path)
    (tmp_path / "films").mkdir()
    for name in ("a", "b"):
        write_video(tmp_path / "films" / f"{name}.mp4", moving_square(2)[0])
    with pytest.raises(UserError, match="holds 2 videos; give one"):
        propagate_source(tiny_encoder(), tmp_path / "films", mask, out)


def test_a_mask_among_the_frames_is_refused(tmp_path, tiny_encoder):
    source, mask, out = marked(tmp_path)
    mask.rename(source / "mask.png")
    with pytest.raises(UserError, match="among the frames"):
        propagate_source(tiny_encoder(), source, source / "mask.png", out)


def test_a_missing_mask_says_how_to_make_one(tmp_path, tiny_encoder):
    source, _, out = marked(tmp_path)
    with pytest.raises(UserError, match=r"--first-frame FILE\.png writes"):
        propagate_source(tiny_encoder(), source, tmp_path / "drawing.png", out)


@pytest.mark.parametrize("size", [(1, 1), (1, 64), (64, 1)])
def test_tiny_frames_are_no_film(tmp_path, tiny_encoder, size):
    source, mask, out = marked(tmp_path, np.zeros((3, *size, 3), np.uint8))
    with pytest.raises(UserError, match="too small for a film"):
        propagate_source(tiny_encoder(), source, mask, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--data"),
        (["--source", "film.mp4"], "--first-mask"),
        (["--source", "film.mp4", "--first-mask", "m.png"], "no such video; did you mean 'films.mp4'?"),
        (["--source", "film.mp4", "--first-mask", "m.png", "--kind", "parts"], "--kind is for --data"),
        (["--source", "films.mp4", "--first-mask", "n.png"], "no such mask; did you mean 'm.png'?"),
    ],
)
def test_mistakes_with_ones_own_video(ask, saved, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "films.mp4", moving_square(2)[0])
    write_mask(tmp_path / "m.png", moving_square(1)[1][0])
    code, _, err = ask("propagate", saved, *words, "--out", tmp_path / "out")
    assert code == 2
    assert says in err
    assert not (tmp_path / "out").exists()


def test_a_single_frame_is_no_video(tiny_encoder, tmp_path):
    write_frames(tmp_path / "frames", moving_square(1)[0])
    with pytest.raises(UserError, match="one frame only"):
        propagate_source(tiny_encoder(), tmp_path / "frames", tmp_path / "m.png", tmp_path / "out")


def test_the_command_writes_the_first_frame(tmp_path, capsys):
    source = write_frames(tmp_path / "frames", numbered(4, 32, 40))
    words = ["propagate", "nowhere", "--source", str(source)]
    assert main([*words, "--first-frame", str(tmp_path / "first.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"task": "propagate", "first_frame": str(tmp_path / "first.png")}
    assert PIL.Image.open(tmp_path / "first.png").size == (40, 32)
    for wrong, sentence in (
        ([], "draw it on the first frame, which --first-frame FILE.png writes"),
        (["--first-frame", "a.png", "--first-mask", "b.png"], "give one of them"),
    ):
        assert main([*words, *wrong]) == 2
        assert sentence in capsys.readouterr().err
    assert main(["propagate", "nowhere", "--data", str(source), "--first-frame", "a.png"]) == 2
    assert "--first-frame is for --source" in capsys.readouterr().err
