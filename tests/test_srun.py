"""What SLURM's srun says, in each of the forms that it has for hosts and for counts."""

import pytest

from mmssl.distributed import World, launched, world
from mmssl.srun import facts, first_host, tasks_here

INSIDE = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "gpu[003-004]", "SLURM_TASKS_PER_NODE": "4,3", "SLURM_STEP_ID": "0",
}  # fmt: skip


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node7", "node7"),
        ("a.b-c,d", "a.b-c"),
        ("gpu[003-006,9],login", "gpu003"),
        ("gpu[12]", "gpu12"),
        ("r[1-2]n[04-05,07],x", "r1n04"),
        ("rack[1-2]-ib0", "rack1-ib0"),
    ],
)
def test_the_first_host(hosts, first):
    assert first_host(hosts) == first


@pytest.mark.parametrize(("node", "count"), [(0, 4), (1, 4), (2, 3)])
def test_the_ranks_of_each_host(node, count):
    assert tasks_here({"SLURM_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": str(node)}) == count


def test_srun_is_a_launcher(monkeypatch):
    for name, value in INSIDE.items():
        monkeypatch.setenv(name, value)
    assert launched()
    assert world() == World(5, 7, 1, 3)
    found = facts(INSIDE)
    assert found["MASTER_ADDR"] == "gpu003"
    assert 10_000 <= int(found["MASTER_PORT"]) < 30_000
    assert facts({**INSIDE, "SLURM_STEP_ID": "1"})["MASTER_PORT"] != found["MASTER_PORT"]
    assert facts({**INSIDE, "MASTER_ADDR": "me", "MASTER_PORT": "7"})["MASTER_ADDR"] == "me"


@pytest.mark.parametrize(
    "change",
    [{"RANK": "0"}, {"SLURM_NTASKS": "1"}, {"SLURM_PROCID": None}, {"SLURM_STEP_ID": None}, {"SLURM_NTASKS": None}],
    ids=["another launcher's rank", "one task", "a login host", "a batch script", "no tasks"],
)
def test_elsewhere_it_says_nothing(change):
    assert facts({name: value for name, value in {**INSIDE, **change}.items() if value is not None}) == {}


def test_without_a_launcher_a_process_is_alone():
    assert not launched()
    assert world() == World()


def test_the_deepspeed_launchers_word_for_the_ranks_of_a_host(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert world() == World(1, 2, 1, 2)
