"""What SLURM's ``srun`` says to the ranks that it starts, in the words of other launchers."""

import re
from collections.abc import Mapping


def facts(environment: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; nothing outside of srun.

    Address and port are those that are set already, else the first host of the step and a port from the job's number.
    In a batch script itself, which also has a SLURM_PROCID but no step, and where srun started another launcher, it
    says nothing.
    """
    inside = "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment
    if "RANK" in environment or not inside or int(environment.get("SLURM_NTASKS", 1)) < 2:
        return {}
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or "localhost"
    job, step = (int(environment.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_NTASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_here(environment)),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(hosts),
        # Below what systems give out by themselves; two steps of a job on a host have two ports.
        "MASTER_PORT": environment.get("MASTER_PORT") or str(10_000 + (job + 7919 * step) % 20_000),
    }


def first_host(hosts: str) -> str:
    """Return the first name in a list of hosts such as "gpu[003-006,9],login": "gpu003"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    assert first is not None, hosts
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])


def tasks_here(environment: Mapping[str, str]) -> int:
    """Return how many ranks this host has, from "4(x2),3" (four on each of two hosts, three on the next)."""
    counts = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE")
    if counts is None:
        return int(environment.get("SLURM_NTASKS_PER_NODE", 1))
    hosts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        hosts += [int(count)] * int(times or 1)
    return hosts[min(int(environment.get("SLURM_NODEID", 0)), len(hosts) - 1)]
