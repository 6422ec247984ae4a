"""The drills: what is done to a run and what must come of it. Each returns what was seen and what is wrong with it."""

import resource
import shutil
import signal
from collections.abc import Callable

import psutil

from mmssl.launch import Ranks
from tasks.drill_ground import EVERY, STEPS, WORLD, Ended, Ground
from tasks.drill_ranks import Gate

LINE, LAST = 8, 6
"""The step at which most runs are disturbed, and that of the last checkpoint before it."""
AT_LINE = Gate("appends to", "metrics.jsonl", LINE)
SECOND = f"step-{2 * EVERY:08d}"
"""The second checkpoint."""
SMALL = 32_768
"""Bytes that a file can have at most on the full disk: less than a shard of a checkpoint, more than logs have."""

HANG = 0.1
"""Minutes after which a run in which nothing goes on is given up, at least: on a slow machine it may be beginning."""

Found = tuple[str, list[str]]


def kill_one(ground: Ground) -> Found:
    """Rank 1 is killed (-9) in the middle of a run."""
    done = ground.disturb("kill-one", AT_LINE, lambda ranks: ranks.signal(1, signal.SIGKILL))
    wrong = [] if done.codes == [1, -signal.SIGKILL] else [f"the ranks ended with {done}"]
    wrong += unsaid(done, "mmssl: rank 1 (process", "has gone")
    return f"rank 0 named it, resumed from step {LAST}", wrong + ground.resume("kill-one", LAST)


def kill_all(ground: Ground) -> Found:
    """All ranks are killed (-9) in the middle of a run, which their data workers have yet to notice."""
    done = ground.disturb("kill-all", AT_LINE, Ranks.kill, {"data.workers": 2})
    return f"ended with {done.codes}, resumed from step {LAST}", ground.resume("kill-all", LAST)


def kill_in_checkpoint(ground: Ground) -> Found:
    """All ranks are killed (-9) when a checkpoint is written and has not got its name."""
    ground.disturb("kill-in-checkpoint", Gate("renames to", SECOND), Ranks.kill)
    left = sorted(path.name for path in ground.run("kill-in-checkpoint").checkpoints.iterdir())
    return f"{', '.join(left)} were left, resumed from step {EVERY}", ground.resume("kill-in-checkpoint", EVERY)


def full_disk(ground: Ground) -> Found:
    """The disk takes no more when a checkpoint is to be written."""

    def fill(ranks: Ranks) -> None:
        for pid in ranks.pids:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (SMALL, SMALL))

    done = ground.disturb("full-disk", Gate("makes", f".{SECOND}.tmp"), fill)
    wrong = [] if done.codes == [1] * WORLD else [f"the ranks ended with {done.codes}"]
    wrong += unsaid(done, "could not be written", "earlier ones are untouched")
    return f"ended with {done.codes}, resumed from step {EVERY}", wrong + ground.resume("full-disk", EVERY)


def corrupt(ground: Ground) -> Found:
    """Bytes of the newest checkpoint are changed."""
    run = ground.run("corrupt")
    shutil.copytree(ground.undisturbed.path, run.path)
    shard = min((run.checkpoints / f"step-{STEPS:08d}").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 255
    shard.write_bytes(data)
    before = STEPS - EVERY
    wrong = ground.resume("corrupt", before)
    log = ground.folder / "corrupt-log-0" / "rank-0.txt"
    return f"it was noticed, resumed from step {before}", wrong + unsaid(
        Ended([], log.read_text(encoding="utf-8")), "damaged", "trying the one before"
    )


def sigterm(ground: Ground) -> Found:
    """SIGTERM goes to the ranks and to their data workers."""

    def stop(ranks: Ranks) -> None:
        everyone = [psutil.Process(pid) for pid in ranks.pids]
        for process in [*(child for one in everyone for child in one.children(recursive=True)), *everyone]:
            process.send_signal(signal.SIGTERM)

    done = ground.disturb("sigterm", AT_LINE, stop, {"data.workers": 2})
    wanted = 128 + signal.SIGTERM
    wrong = [] if done.codes == [wanted] * WORLD else [f"the ranks ended not with {wanted} but {done}"]
    # All ranks hear of a signal together, at the end of the step after.
    step = LINE + 1
    return f"ended with {done.codes}, resumed from step {step}", wrong + ground.resume("sigterm", step)


def stale_lock(ground: Ground) -> Found:
    """A compiler's lock was left by a process that was killed."""
    lock = ground.folder / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    done = ground.go("stale-lock", environment={"TORCH_EXTENSIONS_DIR": str(ground.folder / "extensions")})
    wrong = [] if done.codes == [0] * WORLD else [f"the ranks ended with {done}"]
    return f"warned, ended with {done.codes}", wrong + unsaid(done, str(lock)) + ground.compare("stale-lock")


def hung(ground: Ground) -> Found:
    """Rank 1 is stopped in the middle of a run, and never goes on."""
    patience = {"train.hang_minutes": max(HANG, 2 * ground.seconds / 60)}
    done = ground.disturb("hung", AT_LINE, lambda ranks: ranks.signal(1, signal.SIGSTOP), patience, grace=0.0)
    wrong = [] if done.codes[0] == 1 else [f"rank 0 ended with {done.codes[0]}"]
    wrong += unsaid(done, "mmssl: rank 1 (process", "gave no sign of life")
    return f"rank 0 named it, resumed from step {LAST}", wrong + ground.resume("hung", LAST)


def two_runs(ground: Ground) -> Found:
    """A second run is started into the folder of one that goes on."""
    seconds = []

    def start_another(_ranks: Ranks) -> None:
        seconds.append(ground.go("two-runs", resume=True))

    done = ground.disturb("two-runs", AT_LINE, start_another)
    wrong = [] if done.codes == [0] * WORLD else [f"the first ended with {done}"]
    wrong += [] if seconds[0].codes == [2] * WORLD else [f"the second ended with {seconds[0].codes}"]
    wrong += unsaid(seconds[0], "another process is writing this run")
    return f"the second ended with {seconds[0].codes}, the first with {done.codes}", wrong + ground.compare("two-runs")


def unsaid(done: Ended, *words: str) -> list[str]:
    """Return what should have been said and was not."""
    said = " ".join(done.said.split())
    return [f"nobody said '{one}'" for one in words if one not in said]


DRILLS: dict[str, Callable[[Ground], Found]] = {
    "kill-one": kill_one,
    "kill-all": kill_all,
    "kill-in-checkpoint": kill_in_checkpoint,
    "full-disk": full_disk,
    "corrupt": corrupt,
    "sigterm": sigterm,
    "stale-lock": stale_lock,
    "hung": hung,
    "two-runs": two_runs,
}
