"""Small pictures of files.

Planted bugs that fail here: columns that are one off, a block's peaks that replace those of the block before.
"""

import numpy as np
import pytest
import soundfile

from modalities import audio_read
from tasks import thumbnails
from tasks.thumbnails import INK, isolated_thumbnail, thumbnail


def plain_wave(samples, side):
    """Where ink is, column by column."""
    column = np.arange(len(samples)) * side // len(samples)
    scale = side // 2 / 2 / np.abs(samples).max()
    row = side // 2 / 2 - np.arange(side // 2)
    inked = np.zeros((side // 2, side), bool)
    for k in range(side):
        here = samples[column == k]
        inked[:, k] = (row <= max(scale * max(here.max(), 0), 1)) & (row >= scale * min(here.min(), 0))
    return inked


@pytest.mark.parametrize("block", [7, 1000, 2**20])
@pytest.mark.parametrize("count", [40, 41, 997, 5000])
def test_a_sound_shows_its_peaks_over_time(tmp_path, monkeypatch, count, block):
    monkeypatch.setattr(audio_read, "BLOCK", block)
    samples = np.random.default_rng(0).normal(size=count).astype(np.float32)
    samples /= 1.01 * np.abs(samples).max()
    soundfile.write(tmp_path / "a.wav", samples, 8000, subtype="FLOAT")
    picture = thumbnail(str(tmp_path / "a.wav"), "audio", 40)
    assert picture.shape == (20, 40, 3)
    assert np.array_equal((picture == INK).all(2), plain_wave(samples.astype(np.float64), 40))


def test_a_short_sound_and_silence_have_pictures_too(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(3), 8000)
    picture = thumbnail(str(tmp_path / "a.wav"), "audio", 40)
    assert picture.shape == (20, 3, 3)
    assert 1 <= (picture == INK).all(2).sum(0).max() <= 3


def test_it_is_made_elsewhere_and_no_larger_than_asked_for(photos):
    path = str(next(photos.rglob("*.png")))
    assert max(isolated_thumbnail(path, "image", 12, 30).shape[:2]) == 12
    assert thumbnails.thumbnail(path, "image", 500).shape[:2] == (20, 24)
