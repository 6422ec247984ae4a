"""MAE learns what it should, and a test that says so fails when it is wired wrongly.

The experiment: after 200 steps, the squared error of the masked pixels of held-out signals, over that of the trivial
predictor (the mean of the visible pixels), was

    as it is                         0.04
    decoder order not restored       0.46
    targets at the wrong tokens      1.07

With one fixed mask for the whole run both bugs can be learnt around, so masks and signals are fresh at every step. The
error is that of reconstructed pixels, because an objective that scores the wrong thing may well reach a low loss: with
targets at the wrong tokens it fell to 0.81 on normalised patches where the right one stood at 0.85.
"""

import math

import pytest
import torch
from ranks import at_once
from tiny import draw_batch, tiny_mae

from mmssl.contracts import Step
from mmssl.heads.decoder import MaskedDecoder
from mmssl.losses.reconstruction import patch_mse
from mmssl.masking import gather
from mmssl.objectives.mae import MAE

STEPS, BATCH, LR = 200, 32, 5e-3
CLEAR_MARGIN = 0.1


class DecoderOrderNotRestored(MaskedDecoder):
    """Planted bug: tokens get the positions of their places in [visible, masked], not of the patches they stand for."""

    def forward(self, latent, keep, drop, grid, pad=None):
        order = torch.arange(keep.shape[1] + drop.shape[1]).expand(len(keep), -1)
        return super().forward(latent, order[:, : keep.shape[1]], order[:, keep.shape[1] :], grid, pad)


class TargetsAtWrongTokens(MAE):
    """Planted bug: predictions for the dropped patches are scored against the first ones of the grid."""

    def forward(self, batch):
        tokenizer = self.encoder.tokenizer
        patches = tokenizer.patches(batch)
        first = torch.arange(batch["drop"].shape[1]).expand_as(batch["drop"])
        return Step(patch_mse(self._predict(patches, None, batch), tokenizer.target(gather(patches, first))).mean(), {})


def smooth_signals(count, rng):
    """Random sums of three slow cosines [count, 3, 8, 8]: the visible patches tell all about the masked ones."""
    place = (torch.arange(8) + 0.5) / 8
    y, x = torch.meshgrid(place, place, indexing="ij")
    cosines = torch.stack([torch.cos(math.pi * phase) for phase in (x, y, x + y)])
    signal = torch.einsum("bm,mhw->bhw", torch.randn(count, 3, generator=rng), cosines)
    return signal[:, None].expand(-1, 3, -1, -1)


def pretrain(mae):
    optimizer = torch.optim.AdamW(mae.parameters(), lr=LR, betas=(0.9, 0.95), fused=True)
    rng = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LR * min(1, (step + 1) / 30, 2 * (1 - step / STEPS))
        loss = mae(draw_batch(mae, smooth_signals(BATCH, rng), seed=step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def error_over_trivial(mae):
    """Return the squared error of the masked pixels of held-out signals over that of the mean of the visible pixels."""
    held_out = smooth_signals(256, torch.Generator().manual_seed(2))
    batch = draw_batch(mae, held_out, seed=STEPS)
    _, filled, hidden, _ = mae.reconstruct(batch)
    visible = 1 - hidden
    trivial = (held_out * visible).sum((1, 2, 3), keepdim=True) / visible.sum((1, 2, 3), keepdim=True)
    return (((filled - held_out).square() * hidden).sum() / ((trivial - held_out).square() * hidden).sum()).item()


def learned(parts):
    torch.manual_seed(0)
    mae = tiny_mae(size=(8, 8), patch_size=(2, 2), target="raw", mask_ratio=0.5, **parts)
    pretrain(mae)
    return error_over_trivial(mae)


CASES = {
    "as it is": {},
    "decoder order": {"decoder": DecoderOrderNotRestored},
    "wrong targets": {"objective": TargetsAtWrongTokens},
}


@pytest.fixture(scope="module")
def errors():
    """What is left of the error after training, by case; all are trained at once."""
    return dict(zip(CASES, at_once(learned, [*CASES.values()]), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_fresh_masks_beat_the_trivial_predictor_clearly_and_planted_bugs_do_not(errors, case):
    if case == "as it is":
        assert errors[case] < CLEAR_MARGIN
    else:
        assert errors[case] > 3 * CLEAR_MARGIN
