"""Sound from spectrograms: pitch, loudness and the spectrogram itself come back."""

import math

import pytest
import torch

from modalities.fbank import LogMel
from modalities.griffin_lim import invert

SECOND = torch.arange(16000) / 16000


def _chirps():
    # Three gliding tones that fade in and out, over a little noise.
    tones = [torch.sin(2 * math.pi * (f * SECOND + f / 4 * SECOND**2)) for f in (200, 700, 2500)]
    fades = [0.1 + torch.sin((i + 2) * math.pi * SECOND) ** 2 for i in range(3)]
    noise = 0.01 * torch.randn(16000, generator=torch.Generator().manual_seed(0))
    return 0.2 * sum(t * f for t, f in zip(tones, fades, strict=True)) + noise


@pytest.mark.parametrize(("hz", "gain"), [(250, 0.5), (1000, 0.5), (3000, 0.5), (1000, 3.0)])
def test_a_sine_comes_back_at_its_frequency_and_loudness(hz, gain):
    log_mel = LogMel()
    sine = gain * torch.sin(2 * math.pi * hz * SECOND)
    sound = invert(log_mel(sine[None])[0], log_mel)
    assert sound.shape == (log_mel.samples(98),)
    middle = sound[4000:12000]
    loudest = torch.fft.rfft(middle).abs().argmax() * 16000 / len(middle)
    assert loudest.item() == pytest.approx(hz, rel=0.05)  # filters are that wide
    assert middle.square().mean().sqrt().item() == pytest.approx(gain / math.sqrt(2), rel=0.15)


@pytest.mark.parametrize("settings", [{}, {"sample_rate": 8000, "mels": 80}, {"window_ms": 32.0, "hop_ms": 8.0}])
def test_the_spectrogram_of_the_sound_is_the_one_that_was_asked_for(settings):
    log_mel = LogMel(**settings)
    wanted = log_mel(_chirps()[None])[0]
    got = log_mel(invert(wanted, log_mel)[None])[0]
    assert got.shape == wanted.shape
    loud = wanted > wanted.amax(0) - 6
    assert (got - wanted)[loud].abs().mean() < 0.3
    # Iterations are what brings the phases together.
    rough = log_mel(invert(wanted, log_mel, iterations=0)[None])[0]
    assert (got - wanted)[loud].abs().mean() < 0.5 * (rough - wanted)[loud].abs().mean()


def test_it_depends_on_the_seed_alone():
    log_mel = LogMel()
    wanted = log_mel(_chirps()[None])[0]
    first = invert(wanted, log_mel, iterations=4, seed=1)
    torch.rand(3)
    assert torch.equal(invert(wanted, log_mel, iterations=4, seed=1), first)
    assert not torch.allclose(invert(wanted, log_mel, iterations=4, seed=2), first)


def test_silence_and_a_single_frame_are_finite():
    log_mel = LogMel()
    silence = invert(log_mel(torch.zeros(1, 4000))[0], log_mel)
    assert silence.abs().max() < 0.01
    assert invert(log_mel(_chirps()[None, :400])[0], log_mel).isfinite().all()


def test_a_spectrogram_of_other_bins_is_refused():
    with pytest.raises(ValueError, match=r"128 mel bins is wanted, but got \[80, 10\]"):
        invert(torch.zeros(80, 10), LogMel())
    with pytest.raises(ValueError, match=r"128 mel bins is wanted, but got \[128, 0\]"):
        invert(torch.zeros(128, 0), LogMel())
