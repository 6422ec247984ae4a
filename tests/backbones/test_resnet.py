"""The residual network of patches: another implementation's numbers, published sizes, and no look at other samples."""

from functools import partial

import pytest
import timm
import torch
from timm.layers import GroupNormAct, create_conv2d
from timm.models.resnetv2 import ResNetV2

from mmssl.backbones.resnet import ResNet

SMALL = {"blocks": (2, 2), "channels": (32, 64), "bottlenecks": (8, 16)}


def network(dim=64, norm="layer", **settings):
    """Return a small network in which no weight is what it began as, so that every block counts."""
    made = ResNet(3, dim, **{**SMALL, **settings}, norm=norm)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made


def timms(name):
    """Translate a parameter's name into that of timm's ResNetV2 with stages of two blocks."""
    parts = name.split(".")
    if parts[0] == "stem":
        return f"stem.conv.{parts[1]}"
    if parts[0] != "blocks":
        return name
    part = {"narrow": "conv1", "look": "conv2", "widen": "conv3", "shortcut": "downsample.conv"}.get(parts[2], parts[2])
    stage, block = divmod(int(parts[1]), 2)
    return f"stages.{stage}.blocks.{block}.{part}.{parts[3]}"


@pytest.mark.parametrize(("norm", "groups"), [("layer", 1), ("group", 4)])
def test_it_is_timms_pre_activation_resnet(norm, groups, monkeypatch):
    """timm's ``models/resnetv2.py`` (huggingface/pytorch-image-models) with group norm."""
    monkeypatch.setattr("mmssl.backbones.resnet.GROUPS", groups)
    theirs = ResNetV2(
        [2, 2], channels=(32, 64), num_classes=0, stem_chs=8, conv_layer=create_conv2d,
        norm_layer=partial(GroupNormAct, num_groups=groups),
    ).eval()  # fmt: skip
    ours = network(norm=norm)
    theirs.load_state_dict({timms(name): p for name, p in ours.state_dict().items()})
    x = torch.randn(3, 3, 24, 20)
    torch.testing.assert_close(ours(x), theirs.forward_features(x).mean((2, 3)), rtol=1e-4, atol=1e-4)


def test_published_networks_have_their_published_sizes():
    """CPC's ResNet-v2-101 up to its third stage, by timm's; CPC v2's ResNet-161: 305 million in the paper."""
    with torch.device("meta"):
        first, second = ResNet(3, 1024), ResNet(3, 4096, (3, 4, 46), (256, 512, 4096), (64, 128, 512))
        theirs = timm.create_model("resnetv2_101", num_classes=0)
    cut = [theirs.stem, *list(theirs.stages)[:3]]
    last_norm = 2 * 1024
    count = sum(p.numel() for part in cut for p in part.parameters()) + last_norm
    assert sum(p.numel() for p in first.parameters()) == count
    assert sum(p.numel() for p in second.parameters()) / 1e6 == pytest.approx(305, rel=0.005)


@pytest.mark.parametrize("norm", ["layer", "group", "none"])
def test_no_picture_depends_on_another(norm):
    ours, x = network(norm=norm), torch.randn(5, 3, 16, 16)
    before = ours(x)
    x[2] += torch.randn(3, 16, 16)
    after = ours(x)
    assert torch.equal(before[[0, 1, 3, 4]], after[[0, 1, 3, 4]])
    assert not torch.allclose(before[2], after[2])
    # Nor does training differ from evaluation.
    assert torch.equal(ours.eval()(x), after)


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_it_begins_as_its_shortcuts_and_every_weight_learns(norm):
    ours = ResNet(3, 20, **SMALL, norm=norm)
    x = torch.randn(4, 3, 16, 16)
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        ours(x).square().sum().backward()
        optimizer.step()
    silent = [name for name, p in ours.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    assert isinstance(ours.project, torch.nn.Linear)
    assert ours(x).shape == (4, 20)


def test_the_layout_in_memory_changes_nothing_but_the_time():
    ours, x = network(), torch.randn(4, 16, 16, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours(x), ours(x.contiguous()), rtol=1e-4, atol=1e-4)


def test_stages_need_all_of_their_numbers():
    with pytest.raises(ValueError, match="each stage needs blocks, channels and bottlenecks"):
        ResNet(3, 8, (1, 1), (8,), (4,))
