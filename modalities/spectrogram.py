"""The tokenizer of sounds: waveforms become log-mel spectrograms on the model's device, and those are cut into patches.

Patches do not overlap (AST's, arXiv:2104.01778, may): a masked one must not be visible in its neighbours.
"""

import torch
from torch import Tensor

from mmssl.backbones.positions import PositionKind
from mmssl.contracts import Batch, Grid, Size
from modalities.fbank import LogMel
from modalities.patches import PatchTokenizer, TargetKind


class SpectrogramTokenizer(PatchTokenizer):
    """Cuts waveforms [B, 1, samples] into patches of their normalised log-mel spectrograms [B, 1, mels, frames].

    The grid is (frequency, time), low frequencies first. A sound of another duration has another number of columns.
    """

    def __init__(
        self,
        log_mel: LogMel,
        frames: int,
        patch_size: tuple[int, int],
        dim: int,
        mean: float,
        std: float,
        positions: PositionKind = "sincos",
        target: TargetKind = "normalized",
    ) -> None:
        """``patch_size`` is (mels, frames); raises ValueError where it does not divide the spectrogram."""
        if log_mel.mels % patch_size[0]:
            raise ValueError(f"{log_mel.mels} mel bins (signal.mels) do not divide into patches of {patch_size[0]}")
        _check_frames(frames, patch_size[1], log_mel)
        super().__init__((log_mel.mels, frames), patch_size, 1, dim, positions, target, extend=(1,))
        self.log_mel, self.mean, self.std = log_mel, mean, std
        self.size = (log_mel.samples(frames),)

    def grid_of(self, size: Size) -> Grid:
        """Return the grid of waveforms [B, 1, samples]; raises ValueError where patches do not fit."""
        (samples,) = size
        frames = self.log_mel.frames(samples)
        _check_frames(frames, self.patch_size[1], self.log_mel)
        return self.grid[0], frames // self.patch_size[1]

    def patches(self, batch: Batch) -> Tensor:
        """Cut the spectrograms of a batch into [B, N, P]."""
        return self.cut(self.spectrogram(batch))

    def spectrogram(self, batch: Batch) -> Tensor:
        """Return the normalised log-mel spectrograms, float32 [B, 1, mels, frames], of ``signal`` [B, 1, samples].

        ``spec_mask`` int64 [B, 4], where there is one, is what SpecAugment hides: the first and last frame (exclusive),
        then the same of mel bins. It becomes 0, the mean (arXiv:1904.08779, section 2).
        """
        x: Tensor = ((self.log_mel(batch["signal"][:, 0]) - self.mean) / self.std).unsqueeze(1)
        if "spec_mask" not in batch:
            return x
        start, stop, low, high = batch["spec_mask"].view(-1, 4, 1, 1, 1).unbind(1)
        frame = torch.arange(x.shape[3], device=x.device)
        bin_ = torch.arange(x.shape[2], device=x.device).unsqueeze(1)
        hidden = (frame >= start) & (frame < stop) | (bin_ >= low) & (bin_ < high)
        return x.masked_fill(hidden, 0.0)

    def pad(self, batch: Batch) -> Tensor | None:
        """Return which tokens hold frames that reach beyond ``length`` [B] samples: bool [B, N].

        The first column never counts as padding, so that nobody has nothing: of a sound shorter than a patch, what
        comes after it is silence.
        """
        if "length" not in batch:
            return None
        rows, columns = self.grid_of(batch["signal"].shape[2:])
        frames = (batch["length"] - self.log_mel.window) // self.log_mel.hop + 1
        filled = (frames // self.patch_size[1]).clamp(min=1)
        beyond = torch.arange(columns, device=filled.device) >= filled.unsqueeze(1)
        return beyond.unsqueeze(1).expand(-1, rows, -1).flatten(1)


def _check_frames(frames: int, patch: int, log_mel: LogMel) -> None:
    if frames >= patch and frames % patch == 0:
        return
    below = frames // patch * patch
    nearest = [n for n in (below, below + patch) if n > 0]
    seconds = " or ".join(f"{log_mel.seconds_of(n):.10g}" for n in nearest)
    samples = " or ".join(str(log_mel.samples(n)) for n in nearest)
    raise ValueError(
        f"a sound of {frames} frames (signal.seconds {log_mel.seconds_of(frames):.10g}) does not divide "
        f"into patches of {patch} frames; take signal.seconds {seconds} ({samples} samples)"
    )
