"""Runs that change hands: two ranks at a ZeRO stage write what one torch process goes on from, and the reverse."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmssl.launch import run as run_ranks
from mmssl.run import Run, read_lines
from tasks.pretrain import pretrain

STAGES = {
    "image": "zero3", "video": "zero2", "audio": "zero1", "pairs": "zero3", "cpc": "zero2", "text": "zero1",
    "clip": "zero3",
}  # fmt: skip
MIDDLE, STEPS = 2, 4
SHARED = {
    "train.steps": STEPS, "checkpoint.every_steps": MIDDLE, "checkpoint.keep": 9, "data.log_samples": True,
}  # fmt: skip


def train(jobs):
    """Pre-train several times, on these ranks or here, without the reports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.pretrain.run_sections", lambda run, listing: [])
        patch.setattr("tasks.pretrain.write_report", lambda *what: None)
        for arguments, options in jobs:
            pretrain(*arguments, **options)


def losses(run):
    return torch.tensor([line["loss"] for line in Run(run).metrics()])


def take_away_the_end(run: Path) -> None:
    """Leave a run as it was in its middle, but for its last checkpoint's place."""
    last = run / "checkpoints" / f"step-{STEPS:08d}"
    last.rename(run.parent / f"{run.name}-{last.name}")


@pytest.fixture(scope="module")
def runs(materials, tmp_path_factory):
    """Per objective: one torch process, two ranks, and both again from the other's middle; started twice for all."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("elastic")
    first, second = [], []
    for name, (recipe, data, settings) in materials.items():
        settings = {**settings, **SHARED}
        one, two = folder / f"{name}-one", folder / f"{name}-two"
        first.append(((recipe, data, two, settings), {"deepspeed_config": STAGES[name]}))
        second.append(((recipe, data, one, settings), {"deepspeed_config": "zero3", "resume": True}))
    run_ranks(train, (first,), 2, timeout=600)
    for name, (recipe, data, settings) in materials.items():
        settings, one, two = {**settings, **SHARED}, folder / f"{name}-one", folder / f"{name}-two"
        train([((recipe, data, one, settings), {})])
        for run in (one, two):
            (run / "before.jsonl").write_bytes(Run(run).metrics_file.read_bytes())
            take_away_the_end(run)
        train([((recipe, data, two, settings), {"resume": True})])
    run_ranks(train, (second,), 2, timeout=600)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("name", STAGES)
def test_two_ranks_and_one_process_go_on_from_each_other(runs, name):
    one, two = runs / f"{name}-one", runs / f"{name}-two"
    straight = torch.tensor([line["loss"] for line in read_lines(one / "before.jsonl")])
    assert len(straight) == STEPS
    for found in (torch.tensor([line["loss"] for line in read_lines(two / "before.jsonl")]), losses(one), losses(two)):
        torch.testing.assert_close(found, straight, atol=1e-5, rtol=0)
    assert read_lines(Run(one).samples_file) == read_lines(Run(two).samples_file)
    assert [line["step"] for line in read_lines(Run(one).samples_file)] == [*range(1, STEPS + 1)]


def test_what_ranks_leave_opens_without_deepspeed(runs):
    folders = [runs / f"{name}-{who}" for name, who in (("image", "one"), ("image", "two"), ("cpc", "two"))]
    opening = "\n".join(f"load({str(folder)!r})" for folder in folders)
    code = f"import sys\nfrom mmssl import load\n{opening}\nassert 'deepspeed' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
