"""Sound from a log-mel spectrogram, so that a reconstruction can be heard.

Phases are found by the fast Griffin-Lim algorithm (Perraudin, Balazs, Soendergaard: A fast Griffin-Lim algorithm,
WASPAA 2013), on the very frames and window that the filterbank has, and pre-emphasis is undone last.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchaudio.functional import lfilter

from modalities.fbank import FLOOR, PREEMPHASIS, LogMel

MOMENTUM = 0.99
"""The paper's alpha; 0 is the algorithm of Griffin and Lim."""
MEL_ITERATIONS = 20
"""Updates of the spectrum under the mel filters; ten times as many bring speech 1 % nearer."""


@torch.no_grad()
def invert(log_mel: Tensor, log_mel_module: LogMel, iterations: int = 32, seed: int = 0) -> Tensor:
    """Return a waveform float32 [samples] whose log-mel spectrogram is about ``log_mel`` [mels, frames].

    It lasts ``log_mel_module.samples(frames)`` and is as loud as the spectrogram says, so it may exceed 1. The first
    phases are random by ``seed``. Raises ValueError for a spectrogram of other bins or without frames.
    """
    if log_mel.ndim != 2 or log_mel.shape[0] != log_mel_module.mels or log_mel.shape[1] == 0:
        raise ValueError(f"a spectrogram of {log_mel_module.mels} mel bins is wanted, but got {list(log_mel.shape)}")
    magnitude = _power(log_mel.float().exp(), log_mel_module.filters).sqrt()
    bins = log_mel_module.bins
    magnitude = F.pad(magnitude, (bins.start, log_mel_module.fft // 2 + 1 - bins.stop))
    # Drawn on the CPU, so that the sound does not depend on the device.
    angle = torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(seed)).to(magnitude.device)
    spectrum = torch.polar(magnitude, 2 * torch.pi * angle)
    before = torch.zeros_like(spectrum)
    for _ in range(iterations):
        consistent = _analyse(_synthesise(spectrum, log_mel_module), log_mel_module)
        guess = consistent + MOMENTUM * (consistent - before)
        spectrum, before = magnitude * torch.sgn(guess), consistent
    return _deemphasised(_synthesise(spectrum, log_mel_module))


def _deemphasised(waveform: Tensor) -> Tensor:
    # torchaudio's own deemphasis() cuts at full scale.
    one = waveform.new_ones(1)
    recursion, direct = torch.cat((one, -PREEMPHASIS * one)), torch.cat((one, 0 * one))
    return lfilter(waveform, recursion, direct, clamp=False)  # type: ignore[no-any-return]


def _power(mel: Tensor, filters: Tensor) -> Tensor:
    """Return power spectra [frames, K] >= 0 that have the energies ``mel`` [mels, frames] under ``filters`` [K, mels].

    Multiplicative updates for the Kullback-Leibler divergence (Lee and Seung, NIPS 2000, eq. 5): relative errors count,
    as they do for the ear, and nothing gets negative. Bins that no filter covers stay silent.
    """
    weight = filters.sum(1)
    share = filters / weight.clamp(min=FLOOR)[:, None]
    wanted = mel.T
    power: Tensor = (wanted / filters.sum(0).clamp(min=FLOOR)) @ share.T
    for _ in range(MEL_ITERATIONS):
        power = power * ((wanted / (power @ filters).clamp(min=FLOOR)) @ share.T)
    return power


def _analyse(waveform: Tensor, settings: LogMel) -> Tensor:
    """Return the spectra [frames, fft / 2 + 1] of the windowed frames of a pre-emphasised waveform [samples]."""
    frames = waveform.unfold(0, settings.window, settings.hop) * settings.hann
    return torch.fft.rfft(frames, n=settings.fft)  # type: ignore[no-any-return]


def _synthesise(spectrum: Tensor, settings: LogMel) -> Tensor:
    """Return the waveform [samples] whose frames have spectra nearest to these (Griffin and Lim 1984, eq. 6)."""
    frames = torch.fft.irfft(spectrum, n=settings.fft)[:, : settings.window] * settings.hann
    weights = settings.hann.square().expand_as(frames)
    total, weight = _overlap(torch.stack((frames, weights)), settings)
    # The outermost samples lie under next to no window, and would be noise blown up.
    return total / weight.clamp(min=0.01)  # type: ignore[no-any-return]


def _overlap(frames: Tensor, settings: LogMel) -> Tensor:
    """Add frames [n, frames, window] up where they lie: [n, samples]."""
    length = settings.samples(frames.shape[1])
    summed = F.fold(frames.transpose(1, 2), (1, length), (1, settings.window), stride=(1, settings.hop))
    return summed[:, 0, 0]
