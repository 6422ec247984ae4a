"""Kaldi's log-mel filterbank on batches of waveforms.

The steps are those of Kaldi's ``compute-fbank-feats`` with a Hann window, power spectra, no dither and no energy, as
AST and Audio-MAE use it: frames that lie wholly inside the sound, each freed of its mean, pre-emphasised, windowed,
padded to a power of two, its power spectrum summed under triangles on the mel scale, and the logarithm.

In fp32 the bins of a loud frame that hold little energy are rounding error in part: on a sweep Kaldi's own fp32
values lie up to 4e-2 from the exact ones, on speech up to 2e-3. So ``LogMel`` rounds where Kaldi does, and lies within
1e-5 of it. One matrix product that folds all steps up to the spectrum is closer to the exact values, but may be more
than 1e-3 from Kaldi's, and takes twice as long on a CPU with AVX2 (``benchmarks/fbank.py``).
"""

import math

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mmssl.uncompiled import uncompiled

PREEMPHASIS = 0.97
FLOOR = torch.finfo(torch.float32).eps
"""Kaldi's least mel energy; its logarithm, -15.94, is silence."""
AT_ONCE = 512
"""Frames a CPU works on at once: about 5 MB, near its cache; all frames of a batch at once take up to twice as long."""
AT_ONCE_ON_GPUS = 2**15
"""Enough frames to keep a GPU busy, in some 0.3 GB of memory however long the sound is."""


class LogMel(nn.Module):
    """Waveforms [B, samples] to log-mel spectrograms float32 [B, mels, frames]; nothing here is learned.

    ``window``, ``hop`` and ``fft`` are in samples; ``hann`` float32 [window] is the window and ``filters`` float32
    [K, mels] holds the triangles' heights at the K DFT bins of the slice ``bins``, those that any triangle covers.
    """

    hann: Tensor
    filters: Tensor

    def __init__(
        self,
        sample_rate: int = 16000,
        mels: int = 128,
        window_ms: float = 25.0,
        hop_ms: float = 10.0,
        low_hz: float = 20.0,
        high_hz: float = 0.0,
    ) -> None:
        """Make one for sounds of ``sample_rate``; ``high_hz`` is 0 for the Nyquist frequency, or negative: below it.

        Raises ValueError where a window is shorter than 2 samples, a hop than 1, or the band is empty or too wide.
        """
        super().__init__()
        self.sample_rate, self.mels, self.hop_ms = sample_rate, mels, hop_ms
        # Kaldi's order of products: what is an exact multiple in milliseconds is not always one in binary.
        self.window, self.hop = int(sample_rate * window_ms * 0.001), int(sample_rate * hop_ms * 0.001)
        if self.window < 2 or self.hop < 1:
            raise ValueError(f"windows of {window_ms} ms every {hop_ms} ms are too short at {sample_rate} Hz")
        self.fft = 1 << (self.window - 1).bit_length()
        nyquist = sample_rate / 2
        high_hz = high_hz if high_hz > 0 else nyquist + high_hz
        if mels < 1 or not 0 <= low_hz < high_hz <= nyquist:
            raise ValueError(f"{mels} mel filters from {low_hz} to {high_hz} Hz do not fit in 0 to {nyquist} Hz")
        self.low_hz, self.high_hz = low_hz, high_hz
        step = sample_rate / self.fft
        self.bins = slice(math.floor(low_hz / step), min(math.ceil(high_hz / step) + 1, self.fft // 2))
        hann = torch.hann_window(self.window, periodic=False, dtype=torch.float32)
        filters = mel_filters(sample_rate, self.fft, mels, low_hz, high_hz)[self.bins].contiguous()
        self.register_buffer("hann", hann, persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    def frames(self, samples: int) -> int:
        """Return how many frames lie wholly inside so many samples."""
        return 0 if samples < self.window else 1 + (samples - self.window) // self.hop

    def frames_in(self, seconds: float) -> int:
        """Return how many frames ``seconds`` stand for in settings: by the hop as it was asked for, in milliseconds.

        ``hop`` is that of whole samples, so at 11025 Hz the 1024 frames of 10.24 s are 0.2 % shorter than that.
        """
        return round(seconds * 1000 / self.hop_ms)

    def seconds_of(self, frames: int) -> float:
        """Return the seconds that stand for so many frames in settings: of them ``frames_in`` makes the same number."""
        return frames * self.hop_ms / 1000

    def samples(self, frames: int) -> int:
        """Return how many samples exactly so many frames cover."""
        return 0 if frames < 1 else self.window + (frames - 1) * self.hop

    @property
    def centres_hz(self) -> list[float]:
        """The frequency at which each mel filter peaks, in Hz, rising."""
        low, high = _mel(self.low_hz), _mel(self.high_hz)
        spacing = (high - low) / (self.mels + 1)
        return [700 * math.expm1((low + (i + 1) * spacing) / 1127) for i in range(self.mels)]

    # Not compiled: the loop over slices that fit the cache would be unrolled, and take minutes.
    @uncompiled
    @torch.no_grad()
    def forward(self, waveform: Tensor) -> Tensor:
        """Return the natural logarithms of mel energies, float32 [B, mels, frames], of waveforms [B, samples].

        In fp32 under autocast too; no gradient flows. Raises ValueError for sounds shorter than one window.
        """
        if waveform.ndim != 2 or waveform.shape[1] < self.window:
            raise ValueError(
                f"a log-mel filterbank takes waveforms [B, samples] of at least one window, {self.window} samples, "
                f"but got {list(waveform.shape)}"
            )
        frames = waveform.float().unfold(1, self.window, self.hop)
        out = frames.new_empty(len(frames), self.mels, frames.shape[1])
        if isinstance(waveform, FakeTensor) or waveform.is_meta:
            return out  # shapes alone are wanted, and the slices take next to no memory
        at_once = AT_ONCE if waveform.device.type == "cpu" else AT_ONCE_ON_GPUS
        size = max(1, at_once // len(frames))
        with torch.autocast(waveform.device.type, enabled=False):
            for some, place in zip(frames.split(size, dim=1), out.split(size, dim=2), strict=True):
                place.copy_(self._of_frames(some).transpose(1, 2))
        return out

    def _of_frames(self, frames: Tensor) -> Tensor:
        centred = frames - frames.mean(-1, keepdim=True)
        padded = frames.new_zeros(*frames.shape[:-1], self.fft)
        # Hann's window is 0 at a frame's first sample, so its pre-emphasis need not be known. Product and sum are
        # rounded one by one, as Kaldi's are; and no copy is made to pad.
        shaped = padded[..., 1 : self.window]
        torch.mul(centred[..., :-1], -PREEMPHASIS, out=shaped)
        shaped += centred[..., 1:]
        shaped *= self.hann[1:]
        spectrum = torch.fft.rfft(padded)[..., self.bins]
        # Squaring both parts is much faster than abs(), which takes care of overflow with a root.
        power = spectrum.real.square() + spectrum.imag.square()
        return (power @ self.filters).clamp_(min=FLOOR).log_()  # type: ignore[no-any-return]


def log_mel_reference(waveform: Tensor, log_mel: LogMel) -> Tensor:
    """Return what ``log_mel`` makes of waveforms [B, samples], frame by frame and step by step: [B, mels, frames].

    The slow twin, in the type of ``waveform``: in float64 it is Kaldi's formula as good as exactly.
    """
    window, dtype = log_mel.window, waveform.dtype
    turn = 2 * math.pi * torch.arange(window, dtype=dtype) / (window - 1)
    hann = 0.5 - 0.5 * torch.cos(turn)
    filters = log_mel.filters.to(dtype)
    clips = []
    for clip in waveform:
        columns = []
        for index in range(log_mel.frames(len(clip))):
            start = index * log_mel.hop
            frame = clip[start : start + window]
            frame = frame - frame.mean()
            before = torch.cat((frame[:1], frame[:-1]))
            spectrum = torch.fft.rfft((frame - PREEMPHASIS * before) * hann, n=log_mel.fft)
            energy = spectrum.abs().square()[log_mel.bins] @ filters
            columns.append(energy.clamp(min=FLOOR).log())
        clips.append(torch.stack(columns, dim=1))
    return torch.stack(clips)


def mel_filters(sample_rate: int, fft: int, mels: int, low_hz: float, high_hz: float) -> Tensor:
    """Return triangles of height 1 that are equally wide on the mel scale: float32 [fft // 2, mels].

    The scale is 1127 ln(1 + hz / 700), as in HTK. Triangles between two DFT bins, as low ones may be, are all zero.
    Worked out in fp32 as in Kaldi: exact heights would put faint energies 1e-4 away from Kaldi's.
    """
    low, high = _mel(low_hz), _mel(high_hz)
    corners = low + torch.arange(mels + 2, dtype=torch.float32) * ((high - low) / (mels + 1))
    hz = torch.arange(fft // 2, dtype=torch.float32) * (sample_rate / fft)
    at = (1127.0 * (1.0 + hz / 700.0).log())[:, None]
    left, peak, right = corners[:-2], corners[1:-1], corners[2:]
    rising, falling = (at - left) / (peak - left), (right - at) / (right - peak)
    return torch.minimum(rising, falling).clamp(min=0)


def _mel(hz: float) -> float:
    return 1127 * math.log1p(hz / 700)
