"""What the tests of whole fine-tuning runs share: settings for runs of a second, and reading what a run left."""

import torch
from safetensors.torch import load_file

from mmssl import checkpoint

FAST = {"data.workers": 0, "train.batch_size": 4, "train.steps": 4, "train.log_every": 1, "optim.base_lr": 0.1}
MEASURED = {**FAST, "train.steps": 10, "train.ema": 0.5, "train.validate_every": 0.4, "checkpoint.every_steps": 4,
            "checkpoint.keep": 9, "model.backbone.drop_path": 0.2}  # fmt: skip
"""A measurement every 2 of the 10 steps on 18 files, a checkpoint every 4."""


def stored(run, step):
    found = checkpoint.Checkpoint(run / "checkpoints" / f"step-{step:08d}")
    return {name: found.read(name) for name in found.names()}


def tensors(folder):
    return {f"{file.parent.name}/{file.name}/{name}": tensor for file in sorted(folder.rglob("*.safetensors"))
            for name, tensor in load_file(file).items()}  # fmt: skip


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]
