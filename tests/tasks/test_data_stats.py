"""Measured statistics: those of the files' values, whatever the number of workers, and one sentence for mistakes."""

import json
from functools import partial

import numpy as np
import PIL.Image
import pytest
from media import tone, write_sound

from mmssl.errors import UnusableData, UserError
from modalities.encoder import MODALITIES
from tasks.data_stats import stats


def test_pictures_by_hand(tmp_path):
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (4 + i, 7, 3), dtype=np.uint8) for i in range(5)]
    for i, picture in enumerate(pixels):
        PIL.Image.fromarray(picture).save(tmp_path / f"{i}.png")
    values = np.concatenate([picture.reshape(-1, 3) for picture in pixels]) / 255
    for workers in (1, 2):
        result = stats(tmp_path, "image", workers=workers)
        np.testing.assert_allclose(result.mean, values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(result.std, values.std(0), rtol=1e-9)
    assert result.files == 5
    assert json.loads(json.dumps(result.as_dict()))["settings"].startswith("signal.mean=[0.")


def test_sounds_have_mean_0_and_deviation_1_with_what_was_measured(sounds):
    settings = {"signal.sample_rate": 8000, "signal.mels": 32, "signal.seconds": 0.32}
    result = stats(sounds / "train", "audio", settings=settings)
    assert result.settings == f"signal.mean={result.mean[0]:.4g} signal.std={result.std[0]:.4g}"
    again = MODALITIES["audio"].signal_type.model_validate(
        {"sample_rate": 8000, "mels": 32, "seconds": 0.32, "mean": result.mean[0], "std": result.std[0]}
    )
    # Moments are of the raw log-mel: they do not depend on what is normalised by.
    path = str(next((sounds / "train").rglob("*.wav")))
    before = MODALITIES["audio"].moments(path, again.model_copy(update={"mean": 0.0, "std": 1.0}))
    np.testing.assert_allclose(MODALITIES["audio"].moments(path, again), before)


def test_a_recipe_brings_modality_and_settings(sounds, materials):
    recipe, folder, settings = materials["audio"]
    result = stats(folder, "image", recipe, settings)
    assert (result.modality, result.files) == ("audio", 16)


def test_a_recipe_of_frames_measures_videos(clips, materials):
    recipe, folder, settings = materials["pairs"]
    found, expected = stats(folder, "image", recipe, settings), stats(clips, "video")
    assert found.files == expected.files == 12
    np.testing.assert_allclose(found.mean, expected.mean)
    np.testing.assert_allclose(found.std, expected.std)


def test_broken_files_are_named_or_left_out_on_request(tmp_path):
    write_sound(tmp_path / "a.wav", tone(0.5))
    (tmp_path / "b.wav").write_bytes(b"")
    with pytest.raises(UnusableData, match=r"b\.wav: empty file; --skip-broken"):
        stats(tmp_path, "audio", settings={"signal.seconds": 0.4})
    assert stats(tmp_path, "audio", skip_broken=True).skipped == [("b.wav", "empty file")]
    (tmp_path / "a.wav").unlink()
    with pytest.raises(UnusableData, match="none of the 1 files"):
        stats(tmp_path, "audio", skip_broken=True)


def test_what_is_no_number_is_never_printed(sounds, monkeypatch):
    for moments in ([[10.0, np.nan, 1.0]], [[10.0, 1.0, np.inf]], [[0.0, 0.0, 0.0]]):
        monkeypatch.setattr("tasks.data_stats._moments", partial(_constant, np.array(moments)))
        with pytest.raises(UnusableData, match="no finite mean and deviation"):
            stats(sounds / "train", "audio", workers=1)


def _constant(value, *_):
    return value


def test_mistakes(sounds):
    with pytest.raises(UserError, match="'audoi' is not a modality; did you mean 'audio'"):
        stats(sounds, "audoi")
    with pytest.raises(UserError, match="only keys of signal matter"):
        stats(sounds, "audio", settings={"train.steps": 3})
    with pytest.raises(UserError, match="'melz' is not a key"):
        stats(sounds, "audio", settings={"signal.melz": 3})
