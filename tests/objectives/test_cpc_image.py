"""CPC on pictures: contexts see nothing of what is to come, every direction learns, and so it learns a simple rule."""

import math

import pytest
import torch
from predictors import roused

from mmssl.objectives.cpc import CPCConfig
from mmssl.objectives.mae import MAEConfig
from modalities.encoder import Encoder, EncoderConfig, typed

NETWORK = {"blocks": (1, 1), "channels": (8, 16), "bottlenecks": (4, 4)}
DIRECTIONS = ("forward", "backward", "right", "left")


def encoder(size, dim=16):
    """Make an encoder of patches of 8 x 8 every 4 pixels, in which no weight is what it began as."""
    model = {
        "tokenizer": {"name": "crops", "patch_size": 8, "stride": 4, **NETWORK},
        "backbone": {"name": "pixelcnn", "dim": 12, "depth": 2, "input_dim": dim},
        "cls_token": False,
        "output": "latent",
    }
    made = Encoder(typed(EncoderConfig, "image", "test")(modality="image", signal={"size": size}, model=model))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return made


def objective(size, directions=("forward",), steps=1, skip=1, **negatives):
    config = CPCConfig(steps=steps, skip=skip, directions=directions, negatives={"count": 16, **negatives})
    return config.build({"image": encoder(size)})


def contexts(made, signal):
    """Return the contexts of every direction as they were computed, [B, T, L, D]."""
    found, rows = [], made.encoder.tokenizer.grid
    modules = [made.encoder.backbone, *made.contexts]
    handles = [m.register_forward_hook(lambda _, __, out: found.append(out.detach())) for m in modules]
    made({"signal": signal, "seed": torch.arange(len(signal))})
    for handle in handles:
        handle.remove()
    shapes = [rows[::-1] if direction in ("right", "left") else rows for direction in made.directions]
    return [c.unflatten(1, shape) for c, shape in zip(found, shapes, strict=True)]


def beyond(direction, row, size, patch=8, stride=4):
    """Return which pixels no patch up to ``row``, counted along the direction, covers: bool of ``size``."""
    y, x = torch.meshgrid(*(torch.arange(side) for side in size), indexing="ij")
    place, side = (y, size[0]) if direction in ("forward", "backward") else (x, size[1])
    return (
        place >= row * stride + patch if direction in ("forward", "right") else side - 1 - place >= row * stride + patch
    )


@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_context_sees_nothing_beyond_its_patches_to_the_bit(direction, row):
    size = (24, 28)
    made = objective(size, DIRECTIONS)
    signal, which = torch.randn(2, 3, *size), DIRECTIONS.index(direction)
    changed = signal.clone()
    changed[:, :, beyond(direction, row, size)] += 1
    before, after = contexts(made, signal)[which], contexts(made, changed)[which]
    assert torch.equal(before[:, : row + 1], after[:, : row + 1])
    assert not torch.isclose(before[:, row + 1 :], after[:, row + 1 :]).all(-1).any()
    # One line of pixels nearer, and it is seen.
    nearer = beyond(direction, row, size) ^ beyond(direction, row, size, patch=7)
    changed = signal.clone()
    changed[:, :, nearer] += 1
    assert not torch.isclose(before[:, row], contexts(made, changed)[which][:, row]).all(-1).any()


@pytest.mark.parametrize("directions", [DIRECTIONS[:2], DIRECTIONS])
def test_every_direction_learns_and_teaches_the_patch_network(directions):
    made = roused(objective((20, 20), directions))
    step = made({"signal": torch.randn(4, 3, 20, 20), "seed": torch.arange(4)})
    step.loss.backward()
    silent = [name for name, p in made.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    assert {name.split(".")[1] for name, _ in made.named_parameters() if name.startswith("heads")} == {
        str(i) for i in range(len(directions))
    }


def test_the_loss_depends_on_what_is_done_to_patches():
    made, signal = roused(objective((20, 20))), torch.randn(4, 3, 20, 20)
    batch = {"signal": signal, "seed": torch.arange(4)}
    dropped = batch | {"patch_colour_drop": torch.ones(4)}
    plain, changed = made(batch).loss, made(dropped).loss
    assert not torch.isclose(plain, changed)
    assert torch.equal(made(dropped).loss, changed)


def test_masked_autoencoding_refuses_patches_that_overlap():
    with pytest.raises(ValueError, match="do not overlap"):
        MAEConfig().build({"image": encoder((20, 20))})


def circle(angles):
    """Return colours of the colour circle, [..., 3]."""
    return 0.5 + 0.5 * torch.cos(angles.unsqueeze(-1) + torch.tensor([0, 2, 4]) * math.pi / 3)


def stripes(count, generator, ordered):
    """Return pictures of six stripes, each a step further on the colour circle than the one above, or any."""
    start = 2 * math.pi * torch.rand(count, 6, generator=generator)
    angles = start[:, :1] + torch.arange(6) if ordered else start
    return circle(angles).movedim(2, 1).repeat_interleave(4, 2).unsqueeze(3).expand(-1, -1, -1, 8)


def learned(ordered):
    """Return by how much the mean loss of the last of 40 steps is below log N, in nats."""
    torch.manual_seed(0)
    made, generator, gains = objective((24, 8)), torch.Generator().manual_seed(1), []
    optimizer = torch.optim.Adam(made.parameters(), 3e-3)
    for i in range(40):
        step = made({"signal": stripes(64, generator, ordered), "seed": 64 * i + torch.arange(64)})
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        gains.append(float(step.metrics["log_n"] - step.loss.detach()))
    return sum(gains[-10:]) / 10


def test_it_learns_stripes_that_go_on_and_nothing_of_stripes_that_do_not():
    assert learned(ordered=True) > 0.5
    assert learned(ordered=False) < 0.05
