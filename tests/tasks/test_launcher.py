"""The launchers: 2 gloo ranks under ``deepspeed``, ``torchrun`` and ``srun`` (its environment) equal one process.

What runs under them, in all its kinds, is tested on ranks of ``mmssl.launch``; here it is how they start and what they
say.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import launched
import pytest
import torch

from mmssl import launch
from mmssl.checkpoint import Checkpoint
from mmssl.run import Run
from tasks.pretrain import pretrain

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "tasks" / "pretrain.py")


def deepspeed():
    """The words of DeepSpeed's launcher for 2 ranks."""
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return [launcher, "--num_accelerators", "2", "--master_port", str(launch.free_port()), SCRIPT]


def torchrun():
    """The words of torch's launcher for 2 ranks."""
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
            str(launch.free_port()), SCRIPT]  # fmt: skip


def started(words, folder):
    return subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(folder / "ext"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def losses(run):
    return torch.tensor([line["loss"] for line in Run(run).metrics()])


def assert_close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def one(materials, tmp_path_factory):
    """The losses of one process."""
    recipe, folder, settings = materials["image"]
    out = tmp_path_factory.mktemp("one") / "run"
    pretrain(recipe, folder, out, settings)
    return losses(out)


@pytest.mark.distributed
@pytest.mark.parametrize(("launcher", "stage"), [(deepspeed, "zero3"), (torchrun, "zero1")])
def test_a_launchers_ranks_equal_one_process(tmp_path, materials, one, launcher, stage):
    recipe, folder, settings = materials["image"]
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    done = started(
        [*launcher(), recipe, *words, "--data", folder, "--out", tmp_path / "two", "--deepspeed_config", stage],
        tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert_close(losses(tmp_path / "two"), one)
    assert Checkpoint(tmp_path / "two" / "checkpoints" / "step-00000012").facts["world"] == 2
    assert (tmp_path / "two" / "report.html").exists()


@pytest.mark.distributed
def test_sruns_ranks_equal_one_process(tmp_path, materials, one):
    recipe, folder, settings = materials["image"]
    # train.engine=auto: without a configuration it is the launcher that makes it DeepSpeed.
    launch.run(launched.train_under_srun, (recipe, folder, tmp_path / "two", settings, None), 2)
    assert_close(losses(tmp_path / "two"), one)
    assert Checkpoint(tmp_path / "two" / "checkpoints" / "step-00000012").facts["world"] == 2


@pytest.mark.distributed
def test_fp16_that_the_configuration_asks_for_goes_on_in_any_engine(tmp_path, materials, capfd):
    recipe, folder, settings = materials["image"]
    settings = {**settings, "checkpoint.every_steps": 6, "checkpoint.keep": 9}
    two = tmp_path / "two"
    launch.run(launched.train, (recipe, folder, two, settings, "zero2_fp16"), 2)
    pretrain(recipe, folder, tmp_path / "one", {**settings, "train.precision": "fp16"})
    lines = Run(two).metrics()
    assert_close(losses(two), losses(tmp_path / "one"), atol=2e-3)
    for key in ("loss_scale", "skipped"):
        assert [line[key] for line in lines] == [line[key] for line in Run(tmp_path / "one").metrics()]
    middle = Checkpoint(two / "checkpoints" / "step-00000006").facts
    assert middle["precision"] == "fp16"
    assert middle["loss_scale"] == Checkpoint(tmp_path / "one" / "checkpoints" / "step-00000006").facts["loss_scale"]
    assert middle["loss_scale"]["scale"] == lines[6]["loss_scale"]
    (two / "checkpoints" / "step-00000012").rename(tmp_path / "step-00000012")
    capfd.readouterr()
    # One DeepSpeed process with the same configuration; the plain engine, for which auto is fp32, would say so.
    pretrain(recipe, folder, two, settings, resume=True, deepspeed_config="zero3_fp16")
    assert_close(losses(two), losses(tmp_path / "one"), atol=2e-3)
    assert "instead of" not in capfd.readouterr().err
    for file in (two / "checkpoints" / "step-00000012").iterdir():
        file.unlink()
    pretrain(recipe, folder, two, settings, resume=True)
    assert "products are in fp32 instead of fp16" in capfd.readouterr().err
    assert "loss_scale" not in Run(two).metrics()[-1]


@pytest.mark.distributed
def test_a_mistake_is_said_by_one_rank(tmp_path, photos):
    words = ["pretrain", "image-mae-tiny", "--data", str(photos), "--out", str(tmp_path / "x"), "train.stepz=1"]
    with launch.Ranks(launched.command, words, 2, logs=tmp_path) as ranks:
        assert ranks.wait(60) == [2, 2]
        said = [ranks.said(0), ranks.said(1)]
    assert said[0].count("'train.stepz' is not a key; did you mean 'train.steps'?") == 1
    assert said[1] == ""
    assert not (tmp_path / "x").exists()
