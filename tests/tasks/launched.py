"""Whole runs on ranks that ``mmssl.launch`` starts, for tests."""

import os
import sys

from tasks.cli import main
from tasks.pretrain import pretrain


def train(recipe, folder, out, settings, config):
    """Pre-train on all ranks."""
    pretrain(recipe, folder, out, settings, deepspeed_config=config)


def train_under_srun(*arguments):
    """Pre-train where only srun says who is who."""
    rank, size, port = (os.environ.pop(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        del os.environ[name]
    os.environ.update(
        SLURM_PROCID=rank, SLURM_NTASKS=size, SLURM_LOCALID=rank, SLURM_TASKS_PER_NODE=size, SLURM_STEP_ID="0",
        SLURM_STEP_NODELIST="localhost", SLURM_JOB_NODELIST="elsewhere[1-9]", SLURM_JOB_ID="7", MASTER_PORT=port,
    )  # fmt: skip
    train(*arguments)


def command(*words):
    """Run a command line and leave with its exit code."""
    sys.exit(main(words))
