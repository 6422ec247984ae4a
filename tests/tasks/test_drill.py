"""The drills themselves: each disturbs a run of two ranks that must end as the undisturbed one did."""

import json
from itertools import pairwise

import pytest
import torch

from mmssl.data.dataset import Plan, Stream
from mmssl.data.sample_log import faults
from mmssl.distributed import World
from tasks.drill import drill
from tasks.drill_cases import DRILLS


@pytest.fixture(scope="module")
def drilled(tmp_path_factory):
    """All drills, run once."""
    torch.set_num_threads(1)
    return drill(out=tmp_path_factory.mktemp("drills"))


@pytest.mark.distributed
@pytest.mark.parametrize("name", DRILLS)
def test_a_disturbed_run_goes_on_as_if_nothing_had_happened(drilled, name):
    (outcome,) = [one for one in drilled.outcomes if one.drill == name]
    assert outcome.passed, outcome.faults
    assert outcome.done
    assert outcome.seen


def test_a_mistake_in_the_command_is_told(ask, tmp_path):
    assert ask("drill", "kil-one") == (2, "", "mmssl: 'kil-one' is not a drill; did you mean 'kill-one'?\n")
    (tmp_path / "there").touch()
    code, _, said = ask("drill", "--out", tmp_path)
    assert code == 2
    assert "is not empty" in said


def test_the_command_prints_what_came_of_it(ask, tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.drill.Ground", lambda folder: folder.mkdir(exist_ok=True))
    for faults_, expected in (([], 0), (["the samples of the steps are others"], 1)):
        monkeypatch.setitem(DRILLS, "corrupt", lambda ground, found=faults_: ("it was noticed", found))
        code, out, _ = ask("drill", "corrupt", "--json", "--out", tmp_path / str(expected))
        assert code == expected
        report = json.loads(out)
        assert report["passed"] == (expected == 0)
        assert report["drills"][0]["faults"] == faults_
        assert json.loads((tmp_path / str(expected) / "drill.json").read_text()) == report
        code, out, _ = ask("drill", "corrupt")
        assert code == expected
        assert ("passed" if expected == 0 else "FAILED: the samples") in out


def log_of(plan):
    """The lines that a run of a plan writes."""
    lines = []
    for step, keys in enumerate(plan, 1):
        epochs, samples, repeats, _ = zip(*keys, strict=True)
        lines.append({"step": step, "epochs": [*epochs], "samples": [*samples], "repeats": [*repeats]})
    return lines


@pytest.fixture
def plan():
    """5 files in batches of 4: every second step is in two epochs."""
    return Plan([Stream(range(5), seed=3)], 4, 1, World(), 0, 6)


def test_a_log_of_samples_that_is_as_planned_has_no_faults(plan):
    assert faults(log_of(plan), plan) == []


def drop_a_step(lines):
    del lines[2]


def repeat_a_step(lines):
    lines.insert(2, lines[2])


def start_a_step_late(lines):
    for line, other in pairwise(lines[3:]):
        line["samples"] = other["samples"]


def read_a_file_twice(lines):
    lines[0]["samples"][1] = lines[0]["samples"][0]


def cut_off(lines):
    del lines[-1]


@pytest.mark.parametrize("spoil", [drop_a_step, repeat_a_step, start_a_step_late, read_a_file_twice, cut_off])
def test_a_log_of_samples_that_is_not_as_planned_has_faults(plan, spoil):
    lines = log_of(plan)
    spoil(lines)
    assert faults(lines, plan)


def test_a_plan_that_reads_a_file_twice_in_an_epoch_is_seen_although_the_log_agrees(plan):
    plan.streams = [Stream([0, 1, 2, 2, 4], seed=3)]
    assert any("was read in the epochs" in fault for fault in faults(log_of(plan), plan))
