"""The real launcher: 2 gloo ranks through ``deepspeed tasks/pretrain.py``, and their run resumed by one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmssl.run import Run
from tasks.pretrain import pretrain

ROOT = Path(__file__).parents[2]


def launch() -> list[str]:
    """The launcher's words for 2 ranks, on a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = Path(sys.executable).with_name("deepspeed")
    script = ROOT / "tasks" / "pretrain.py"
    return [str(launcher), "--num_accelerators", "2", "--master_port", str(port), str(script)]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("modality", "stage"),
    [("image", "zero3"), ("video", "zero2"), ("audio", "zero1"), ("pairs", "zero2"), ("cpc", "zero3")],
)
def test_two_ranks_equal_one_process_and_resume_in_it(tmp_path, materials, modality, stage):
    recipe, folder, settings = materials[modality]
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items() if key != "train.steps"]
    done = subprocess.run(
        [*launch(), recipe, *words, "train.steps=12", "checkpoint.every_steps=6", "checkpoint.keep=9",
         "--data", folder, "--out", tmp_path / "two", "--deepspeed_config", stage],
        capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "ext"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    pretrain(recipe, folder, tmp_path / "one", settings)
    one, two = ([line["loss"] for line in Run(tmp_path / name).metrics()] for name in ("one", "two"))
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), atol=1e-5, rtol=0)
    assert (tmp_path / "two" / "report.html").exists()
    # Take the last checkpoint away: one torch process goes on from step 6, where two ranks stood.
    last = tmp_path / "two" / "checkpoints" / "step-00000012"
    last.rename(tmp_path / "step-00000012")
    settings = {**settings, "checkpoint.every_steps": 6, "checkpoint.keep": 9}
    pretrain(recipe, folder, tmp_path / "two", settings, resume=True)
    resumed = [line["loss"] for line in Run(tmp_path / "two").metrics()]
    assert len(resumed) == 12
    torch.testing.assert_close(torch.tensor(resumed), torch.tensor(one), atol=1e-5, rtol=0)


@pytest.mark.distributed
def test_a_mistake_under_the_launcher_is_said_once(tmp_path, photos):
    done = subprocess.run(
        [*launch(), "image-mae-tiny",
         "--data", photos, "--out", tmp_path / "x", "train.stepz=1", "--deepspeed_config", "zero2"],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert said.count("'train.stepz' is not a key; did you mean 'train.steps'?") == 1
    assert not (tmp_path / "x").exists()
