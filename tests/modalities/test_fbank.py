"""The log-mel filterbank against Kaldi's (torchaudio.compliance.kaldi), in fp32 and, step by step, in float64."""

import math

import pytest
import torch
from torchaudio.compliance import kaldi

from modalities import fbank
from modalities.fbank import FLOOR, LogMel, log_mel_reference, mel_filters

SECOND = torch.arange(16000) / 16000


def _noise(samples=16000, clips=1):
    return torch.randn(clips, samples, generator=torch.Generator().manual_seed(0))


def _voice():
    # A gliding pitch with 30 harmonics that come and go, and a little breath: the dynamic range of speech.
    phase = 2 * math.pi * torch.cumsum(110 + 40 * SECOND, 0) / 16000
    harmonics = sum(torch.sin(n * phase) / n**1.5 for n in range(1, 31))
    return (0.3 * harmonics * torch.sin(4 * math.pi * SECOND) ** 2 + 1e-3 * _noise())[0][None]


# Each with how far fp32 may lie from the exact logarithms: Kaldi's fp32 lies as far.
SOUNDS = {
    "noise": (0.1 * _noise(clips=3), 1e-3),
    "voice": (_voice(), 2e-2),
    "very quiet": (1e-5 * _noise(), 1e-5),
    "16-bit integers": (3000 * _noise(), 1e-3),
    "clipped": ((3 * _noise()).clamp(-1, 1), 1e-3),
    "silence": (torch.zeros(1, 16000), 1e-6),
    "constant": (torch.full((1, 16000), 0.9), 1e-6),
    "off centre": (0.9 + 1e-3 * _noise(), 2e-2),
    "sine": (torch.sin(2000 * math.pi * SECOND)[None], 5e-2),
    "sweep": (torch.sin(2 * math.pi * 4000 * SECOND**2)[None], 1e-1),
    "one window": (0.1 * _noise(400), 1e-3),
    "one sample less than two windows": (0.1 * _noise(559), 1e-3),
}

SETTINGS = [
    {},
    {"mels": 40, "low_hz": 0.0, "high_hz": -400.0},
    {"mels": 80, "sample_rate": 8000},
    {"mels": 64, "sample_rate": 22050, "low_hz": 50.0, "high_hz": 7600.0},  # windows of an odd length
    {"mels": 23, "window_ms": 32.0, "hop_ms": 8.0},  # as long as the DFT
    {"mels": 16, "window_ms": 10.0, "hop_ms": 12.5},  # gaps between frames
]


def _kaldi(waveform, settings=None):
    names = {"sample_rate": "sample_frequency", "mels": "num_mel_bins", "window_ms": "frame_length"}
    names |= {"hop_ms": "frame_shift", "low_hz": "low_freq", "high_hz": "high_freq"}
    given = {"num_mel_bins": 128, **{names[key]: value for key, value in (settings or {}).items()}}
    fixed = {"htk_compat": True, "use_energy": False, "window_type": "hanning", "dither": 0.0}
    return torch.stack([kaldi.fbank(clip[None], **fixed, **given).T for clip in waveform])


@pytest.mark.parametrize("name", SOUNDS)
def test_it_equals_kaldi_in_fp32_and_its_twin_in_float64(name):
    waveform, inexact = SOUNDS[name]
    log_mel = LogMel()
    ours, exact = log_mel(waveform), log_mel_reference(waveform.double(), log_mel)
    assert ours.dtype == torch.float32
    assert ours.shape == exact.shape == (len(waveform), 128, log_mel.frames(waveform.shape[1]))
    torch.testing.assert_close(ours, _kaldi(waveform), rtol=0, atol=1e-5)  # 2e-6 is reached
    torch.testing.assert_close(exact, _kaldi(waveform.double()), rtol=0, atol=1e-9)  # 6e-11 is reached
    assert (ours - exact).abs().max() < inexact
    # Where fp32 is far off, there is next to nothing: amplitudes are exact to 1e-5 of the frame's loudest.
    amplitude, right = (ours.double() / 2).exp(), (exact / 2).exp()
    assert ((amplitude - right).abs() / right.amax(1, keepdim=True)).max() < 1e-5


@pytest.mark.parametrize("settings", SETTINGS)
def test_all_settings_mean_what_they_mean_to_kaldi(settings):
    waveform, log_mel = 0.1 * _noise(9000, clips=2), LogMel(**settings)
    torch.testing.assert_close(log_mel(waveform), _kaldi(waveform, settings), rtol=0, atol=1e-5)
    exact = log_mel_reference(waveform.double(), log_mel)
    torch.testing.assert_close(exact, _kaldi(waveform.double(), settings), rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS)
def test_filters_and_their_centres_are_kaldis(settings):
    log_mel = LogMel(**settings)
    low, high = log_mel.low_hz, log_mel.high_hz
    expected, centres = kaldi.get_mel_banks(log_mel.mels, log_mel.fft, log_mel.sample_rate, low, high, 100, -500, 1)
    whole = mel_filters(log_mel.sample_rate, log_mel.fft, log_mel.mels, low, high)
    torch.testing.assert_close(whole.T, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.tensor(log_mel.centres_hz), centres.flatten(), rtol=1e-5, atol=0)
    # No bin with a weight was left out.
    assert log_mel.filters.sum() == pytest.approx(whole.sum().item(), rel=1e-6)


@pytest.mark.parametrize(("at_once", "clips"), [(1, 1), (7, 1), (64, 3), (2, 5)])
def test_frames_worked_on_a_few_at_a_time_are_the_same(monkeypatch, at_once, clips):
    waveform, log_mel = 0.1 * _noise(8000, clips), LogMel()
    whole = log_mel(waveform)
    monkeypatch.setattr(fbank, "AT_ONCE", at_once)
    torch.testing.assert_close(log_mel(waveform), whole, rtol=0, atol=1e-5)


def test_frames_and_samples_are_counted_as_kaldi_does_with_snipped_edges():
    log_mel = LogMel()
    assert (log_mel.window, log_mel.hop, log_mel.fft) == (400, 160, 512)
    assert [log_mel.frames(n) for n in (0, 399, 400, 559, 560, 16000)] == [0, 0, 1, 1, 2, 98]
    assert log_mel.samples(0) == 0
    for frames in (1, 2, 1024):
        assert log_mel.frames(log_mel.samples(frames)) == frames
        assert log_mel.frames(log_mel.samples(frames) - 1) == frames - 1


def test_a_sine_is_loudest_in_the_filter_that_peaks_nearest():
    log_mel = LogMel()
    centres = torch.tensor(log_mel.centres_hz)
    for hz in (300, 1000, 5000):
        loudest = log_mel(torch.sin(2 * math.pi * hz * SECOND)[None])[0].mean(1).argmax()
        assert abs((centres - hz).abs().argmin() - loudest) <= 1


def test_silence_is_kaldis_floor():
    assert LogMel()(torch.zeros(1, 400)).unique().item() == pytest.approx(math.log(FLOOR))


def test_too_short_a_sound_and_unfit_settings_are_refused_with_a_sentence():
    with pytest.raises(ValueError, match=r"at least one window, 400 samples, but got \[1, 399\]"):
        LogMel()(torch.zeros(1, 399))
    with pytest.raises(ValueError, match=r"\[B, samples\]"):
        LogMel()(torch.zeros(16000))
    with pytest.raises(ValueError, match=r"from 20\.0 to 9000\.0 Hz do not fit in 0 to 8000\.0 Hz"):
        LogMel(high_hz=9000.0)
    with pytest.raises(ValueError, match="too short at 16000 Hz"):
        LogMel(hop_ms=0.01)


def test_it_stays_fp32_under_autocast_and_for_low_precision_sound():
    waveform, log_mel = 0.1 * _noise(), LogMel()
    expected = log_mel(waveform)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(log_mel(waveform), expected)
    rounded = waveform.bfloat16()
    assert torch.equal(log_mel(rounded), log_mel(rounded.float()))


def test_it_is_built_from_shapes_alone_holds_no_state_and_no_gradient_flows():
    with torch.device("meta"):
        planned = LogMel()
    built = LogMel()
    assert {name: b.shape for name, b in planned.named_buffers()} == {n: b.shape for n, b in built.named_buffers()}
    assert planned.filters.is_meta
    assert not built.state_dict()
    assert not built(_noise().requires_grad_()).requires_grad
