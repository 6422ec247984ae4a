import numpy as np
import pytest

from modalities.video_sampling import TooShort, dense, dense_test, spacing, span, tsn, uniform

SIZES = [(frames, count) for frames in (1, 2, 7, 16, 61, 300) for count in (1, 2, 5, 16)]
CLIPS = [(16, 4, None), (16, 2, None), (1, 4, None), (8, 1, None), (5, 3, 10.0), (16, 4, 7.5), (4, 1, 40.0)]
"""Frames of a clip, stride, rate."""


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("fps", [24, 25, 29.97, 60])
def test_dense_clips_fit_are_spaced_evenly_and_reach_both_ends(clip, fps):
    needed = span(fps, *clip)
    frames, step = needed + 5, spacing(fps, *clip[1:])
    drawn = np.stack([dense(frames, fps, *clip, np.random.default_rng(seed)) for seed in range(200)])
    assert drawn.dtype == np.int64
    assert drawn.shape == (200, clip[0])
    assert (drawn[:, -1] - drawn[:, 0] == needed - 1).all()
    assert (np.abs(np.diff(drawn, axis=1) - step) < 1).all()
    starts, times = np.unique(drawn[:, 0], return_counts=True)
    assert starts.tolist() == list(range(6))
    assert times.min() > 200 / 6 / 2


def test_a_stride_is_exact_and_a_rate_of_the_source_is_stride_one():
    rng = np.random.default_rng
    assert np.diff(dense(100, 25, 16, 4, None, rng(0))).tolist() == [4] * 15
    assert np.diff(dense(100, 25, 16, 4, 25, rng(0))).tolist() == [1] * 15
    assert np.diff(dense(100, 25, 6, 1, 10, rng(0))).tolist() == [3, 2, 3, 2, 3]


def test_a_clip_that_just_fits_has_one_start():
    assert dense(span(30, 16, 4, None), 30, 16, 4, None, np.random.default_rng(3)).tolist() == list(range(0, 61, 4))


@pytest.mark.parametrize("rate", [2.0, 6.0, 7.5, 12.0])
def test_a_rate_gives_the_same_moments_whatever_the_sources_rate(rate):
    wanted = np.arange(16) / rate
    for fps in (24, 25, 29.97, 50, 60):
        for seed in range(5):
            clip = dense(round(20 * fps), fps, 16, 1, rate, np.random.default_rng(seed))
            # To within half a frame of each source, and a start at the same share of what is possible.
            np.testing.assert_allclose((clip - clip[0]) / fps, wanted, atol=0.5001 / fps)
            start = np.random.default_rng(seed).random() * (20 - wanted[-1])
            assert abs(clip[0] / fps - start) < 2 / fps


def test_too_short_a_video_raises_or_holds_its_last_frame():
    rng = np.random.default_rng(0)
    with pytest.raises(TooShort, match="60 of the 61 frames"):
        dense(60, 25, 16, 4, None, rng)
    with pytest.raises(TooShort):
        dense_test(60, 25, 16, 4, None, 5)
    held = [0, 4, 8, 12, *[15] * 12]
    assert dense(16, 25, 16, 4, None, rng, hold=True).tolist() == held
    assert dense_test(16, 25, 16, 4, None, 3, hold=True).tolist() == [held] * 3
    assert dense(1, 25, 4, 4, None, rng, hold=True).tolist() == [0] * 4


def test_a_clip_takes_one_number_of_the_generator_whatever_the_video():
    after = []
    for frames in (10, 61, 500):
        rng = np.random.default_rng(7)
        dense(frames, 25, 16, 4, None, rng, hold=True)
        after.append(rng.random())
    assert len(set(after)) == 1


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("frames", [61, 62, 200, 301])
def test_test_clips_go_from_the_first_start_to_the_last(clip, frames):
    needed = span(24, *clip)
    if frames < needed:
        pytest.skip("shorter than the clip")
    clips = dense_test(frames, 24, *clip, 5)
    starts = clips[:, 0]
    assert clips.shape == (5, clip[0])
    assert starts[0] == 0
    assert clips[-1, -1] == frames - 1
    assert np.ptp(np.diff(starts)) <= 1
    assert ((clips - starts[:, None]) == (clips[0] - clips[0, 0])).all()
    assert dense_test(frames, 24, *clip, 1)[0, 0] == (frames - needed) // 2


@pytest.mark.parametrize(("frames", "count"), SIZES)
def test_segments_are_in_range_ascending_and_equal(frames, count):
    rng = np.random.default_rng(0)
    for chosen in (uniform(frames, count), tsn(frames, count), *(tsn(frames, count, rng) for _ in range(20))):
        assert chosen.dtype == np.int64
        assert chosen.shape == (count,)
        assert 0 <= chosen.min() <= chosen.max() < frames
        assert (np.diff(chosen) >= 0).all()
        # Each within its own segment of the video.
        assert (chosen + 1 > np.arange(count) * frames / count).all()
        assert (chosen < (np.arange(count) + 1) * frames / count).all()


def test_segments_known_by_hand():
    assert uniform(10, 5).tolist() == [1, 3, 5, 7, 9]
    assert uniform(3, 6).tolist() == [0, 0, 1, 1, 2, 2]
    assert uniform(7, 1).tolist() == [3]
    assert tsn(300, 3).tolist() == [50, 150, 250]


def test_random_segments_reach_every_frame():
    rng = np.random.default_rng(0)
    drawn = np.stack([tsn(12, 3, rng) for _ in range(200)])
    assert [sorted(set(column)) for column in drawn.T.tolist()] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
