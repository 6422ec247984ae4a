"""Paths of pieces: what they mean, and which of them share a moment."""

import numpy as np
import pytest

from mmssl.data.fragment import Span, file_of, join, overlapping, real, split


@pytest.mark.parametrize(
    ("path", "span"),
    [
        ("a/b.mp4", Span("a/b.mp4", 0.0, None)),
        ("a/b.mp4#t=1.5,3", Span("a/b.mp4", 1.5, 3.0)),
        ("a/b.mp4#t=2", Span("a/b.mp4", 2.0, None)),
        ("a/b.mp4#t=,3.25", Span("a/b.mp4", 0.0, 3.25)),
        # Not ours: names as they are.
        ("a/b.mp4#t=", Span("a/b.mp4#t=", 0.0, None)),
        ("a/#t=1,2/b.mp4", Span("a/#t=1,2/b.mp4", 0.0, None)),
        ("a/b#1.mp4", Span("a/b#1.mp4", 0.0, None)),
        ("a/b.mp4#t=-1,2", Span("a/b.mp4#t=-1,2", 0.0, None)),
    ],
)
def test_a_path_and_its_piece(path, span):
    assert split(path) == span
    assert file_of(path) == span.file


@pytest.mark.parametrize(("start", "end"), [(None, None), (0.0, 2.0), (1.25, None), (None, 3.0), (1 / 3, 2 / 3)])
def test_join_and_split_are_inverse_to_the_microsecond(start, end):
    span = split(join("x.wav", start, end))
    assert span.file == "x.wav"
    assert span.start == pytest.approx(start or 0, abs=1e-6)
    assert span.end == (None if end is None else pytest.approx(end, abs=1e-6))


@pytest.mark.parametrize(
    ("start", "end"), [(2.0, 1.0), (1.0, 1.0), (-1.0, 2.0), (float("nan"), 2.0), (0.0, float("inf"))]
)
def test_what_is_no_piece_is_refused(start, end):
    with pytest.raises(ValueError, match="from a time to a later one"):
        join("x.wav", start, end)


def test_pieces_overlap_by_moments_and_by_the_file_behind_a_link(tmp_path):
    (tmp_path / "x.wav").touch()
    (tmp_path / "link.wav").symlink_to(tmp_path / "x.wav")
    x, link, other = (str(tmp_path / name) for name in ("x.wav", "link.wav", "other.wav"))
    assert real(f"{link}#t=1,2") == Span(str((tmp_path / "x.wav").resolve()), 1.0, 2.0)
    train = [f"{x}#t=0,5", f"{other}#t=3"]
    assert overlapping(train, [f"{x}#t=5,9", f"{other}#t=0,3"]) == []
    clashes = [f"{x}#t=4.9,9", link, f"{other}#t=2,3.1", other]
    assert overlapping(train, [f"{x}#t=7,8", *clashes]) == clashes


def test_many_pieces_are_compared_in_no_time_and_as_one_by_one():
    rng = np.random.default_rng(0)

    def pieces(count):
        starts = rng.integers(0, 4000, count) / 4
        return [f"x{rng.integers(3)}.wav#t={start:g},{start + rng.integers(1, 5) / 4:g}" for start in starts]

    a, b = pieces(60), pieces(200)

    def meet(x, y):
        return x.file == y.file and x.start < y.end and y.start < x.end

    expected = [path for path in b if any(meet(split(path), split(other)) for other in a)]
    assert overlapping(a, b) == expected
    assert 0 < len(expected) < 200
