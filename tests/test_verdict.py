"""Verdicts on made-up metrics, each rule by itself; and on real runs, some with a collapse planted in them."""

import json
from collections.abc import Callable

import pytest
import torch

from mmssl.backbones.vit import ViT
from mmssl.heads.decoder import MaskedDecoder
from mmssl.run import Run
from mmssl.verdict import History, Verdict, judge, verdict
from tasks.pretrain import pretrain

GOOD = {
    "lr": 1e-3, "loss": 0.5, "trivial": 1.0, "grad_norm": 0.3, "wait": 0.1, "health.rank": 20.0, "health.std": 0.5,
}  # fmt: skip


def lines(count=20, every=10, **changed: float | Callable[[int], float]):
    """Lines of metrics of a run that is well but for what is ``changed``; dots in names are written as ``__``."""
    changed = {name.replace("__", "."): value for name, value in changed.items()}
    return [
        {"step": (i + 1) * every, **GOOD, **{k: v(i) if callable(v) else v for k, v in changed.items()}}
        for i in range(count)
    ]


def keys(found: Verdict) -> set[str]:
    return {finding.key for finding in found.findings}


def test_a_run_that_is_well_is_called_healthy_and_why():
    found = judge(lines())
    assert found.word == "healthy"
    assert not found.findings
    assert "the loss is 0.5, 50 % below the 1 of guessing without a look at the input" in str(found)
    assert "20.0 directions (deviation 0.50 of 1)" in str(found)


BAD = {
    "health.std": lines(health__std=0.001, health__rank=40.0),
    "health.rank": lines(health__rank=1.3),
    "trivial": lines(loss=0.995),
    "loss": [{k: v for k, v in line.items() if k != "trivial"} for line in lines()],
    "scale": lines(scale=100.0, scale_most=100.0),
    "teacher_entropy": lines(teacher_entropy=0.001, teacher_entropy_most=8.0),
    "queue_age": lines(queue_age=300.0, queue_age_most=200.0),
    "padding": lines(padding=0.1),
    "grad_norm": lines(count=40, grad_norm=lambda i: 0.3 if i < 20 else 90.0),
    "wait": lines(wait=0.7),
    "skipped": lines(skipped=0.5),
}


@pytest.mark.parametrize("key", BAD)
def test_every_rule_finds_its_sign_and_no_other(key):
    found = judge(BAD[key])
    assert found.word == "doubtful"
    assert keys(found) == {key}
    (finding,) = found.findings
    assert any(letter.isdigit() for letter in finding.what)
    assert finding.hint
    assert "\n" not in str(finding)


WELL = {
    "nothing learned in the warm-up yet": lines(count=60, loss=1.0, lr=lambda i: 1e-5 * i),
    "one bad line": lines(health__std=lambda i: 0.001 if i == 18 else 0.5, wait=lambda i: float(i == 18)),
    "near the limit": lines(scale=lambda i: 100.0 if i < 19 else 90.0, scale_most=100.0),
    "a teacher between the extremes": lines(teacher_entropy=4.0, teacher_entropy_most=8.0),
    "no padding": lines(padding=0.0),
    "no better than guessing, but on its way": lines(loss=lambda i: 1.6 - 0.03 * i),
    "the loss of an easy end": lines(loss=lambda i: 1 / (i + 1), grad_norm=lambda i: 1 / (i + 1)),
    "a skipped step now and then": lines(skipped=0.05),
    "an infinite gradient in a skipped step": lines(grad_norm=lambda i: float("inf") if i == 4 else 0.3),
    "nothing to guess": lines(trivial=0.0, loss=lambda i: 2.0 - i / 20),
}


@pytest.mark.parametrize("what", WELL)
def test_no_false_alarm(what):
    assert not judge(WELL[what]).findings, judge(WELL[what])


def test_a_loss_above_guessing_that_falls_is_too_early_to_tell_and_at_the_end_too_little():
    falling = lines(loss=lambda i: 1.6 - 0.03 * i)
    early = judge(falling, steps=1000)
    assert early.word == "unknown"
    words = "health unknown: too early to tell: the loss is 1.06, above the 1 of guessing without a look"
    assert str(early).startswith(words)
    assert "and falls" in str(early)
    ended = judge(falling, steps=200)
    assert (ended.word, keys(ended)) == ("doubtful", {"trivial"})
    assert "train longer" in str(ended)


def test_a_warm_up_is_too_early_to_tell_whatever_the_loss():
    found = judge(lines(loss=0.9, lr=lambda i: 1e-5 * i))
    assert (found.word, found.findings) == ("unknown", ())
    assert "10 % below" in str(found)


def test_both_extremes_of_a_teacher_and_of_a_gradient_are_told():
    uniform = judge(lines(teacher_entropy=7.99, teacher_entropy_most=8.0))
    assert "apart" in str(uniform)
    vanished = judge(lines(count=40, grad_norm=lambda i: 0.3 if i < 20 else 1e-6))
    assert "fallen" in str(vanished)


def test_towers_are_told_apart():
    towers = lines(
        **{"image.health.std": 0.5, "image.health.rank": 9.0, "text.health.std": 0.0, "text.health.rank": 0.0}
    )
    towers = [{k: v for k, v in line.items() if not k.startswith("health")} for line in towers]
    found = judge(towers)
    assert keys(found) == {"text.health.std"}
    assert "the text encoder" in str(found)
    assert "image features spread" in found.grounds


def test_little_is_judged_of_few_lines_and_a_long_run_takes_no_more_memory():
    assert judge(lines(2)).word == judge([]).word == "unknown"
    history = History()
    for line in lines(5000):
        history.add(line)
    assert len(history.first) + len(history.recent) < 50
    assert verdict(history).word == "healthy"


LONG = 130
"""Steps until something should have been learned."""


EASY = {
    "signal.crop_scale": [1.0, 1.0], "signal.flip": False, "model.tokenizer.patch_size": [8, 8],
    "objective.mask_ratio": 0.5, "model.backbone.dim": 64, "objective.decoder.dim": 64, "model.backbone.drop_path": 0.0,
    "train.batch_size": 16, "optim.lr": 3e-3,
}  # fmt: skip
"""Half a wave is to be told from the other half."""


def outcome(material, out, capfd, steps=30, **settings):
    settings = {**material.settings, "train.steps": steps, "train.log_every": 5, "optim.lr": 5e-3, **settings}
    pretrain(material.recipe, material.folder, out, settings)
    status = json.loads((out / "status.json").read_text())["health"]
    said = capfd.readouterr().err
    assert f"{status['verdict']}: " in said.splitlines()[-1] or f"{status['verdict']}: " in said
    page = (out / "report.html").read_text()
    assert f"Health: {status['verdict']}" in page
    return status, said


def found_in(status):
    return {finding["key"] for finding in status["findings"]}


def test_a_tiny_mae_is_healthy(materials, tmp_path, capfd):
    status, said = outcome(materials["image"], tmp_path / "run", capfd, LONG, **EASY)
    lines = Run(tmp_path / "run").metrics()
    assert {"compute", "wait", "gflop_per_s", "memory_gb", "grad_norm", "trivial", "health.rank"} <= set(lines[-1])
    # Whether it waits for data is this machine's affair.
    found = judge([{**line, "wait": 0.0} for line in lines])
    assert found.word == "healthy", found
    assert "guessing" in status["grounds"]
    assert found_in(status) <= {"wait"}
    assert not any("at step" in line and "waiting" not in line for line in said.splitlines()), said


def planted(monkeypatch, change):
    """Let every backbone put out ``change`` of what it did."""
    forward = ViT.forward
    monkeypatch.setattr(ViT, "forward", lambda self, *args, **kwargs: change(forward(self, *args, **kwargs)))


def test_an_encoder_that_became_constant_is_flagged(materials, tmp_path, capfd, monkeypatch):
    planted(monkeypatch, lambda tokens: 0 * tokens + torch.linspace(-1, 1, tokens.shape[-1]))
    status, said = outcome(materials["image"], tmp_path / "run", capfd)
    assert "health.std" in found_in(status)
    assert said.count("says nearly the same of everything") == 2  # once early, once at the end


def test_features_on_a_line_are_flagged(materials, tmp_path, capfd, monkeypatch):
    def on_a_line(tokens):
        where = torch.linspace(-1, 1, tokens.shape[-1])
        return (tokens * torch.randn(where.shape, generator=torch.Generator().manual_seed(0))).sum(-1, True) * where + 1

    planted(monkeypatch, on_a_line)
    status, _ = outcome(materials["image"], tmp_path / "run", capfd)
    assert "health.rank" in found_in(status)


def test_a_decoder_that_can_only_say_the_mean_is_flagged(materials, tmp_path, capfd, monkeypatch):
    forward = MaskedDecoder.forward
    monkeypatch.setattr(
        MaskedDecoder, "forward", lambda self, *args: 0 * (made := forward(self, *args)) + made.mean((0, 1))
    )
    status, _ = outcome(materials["image"], tmp_path / "run", capfd, 190, **EASY)
    assert "trivial" in found_in(status)


def test_a_temperature_at_its_limit_is_flagged(materials, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("mmssl.objectives.clip.Temperature.scale", lambda self: 0 * self.log_scale.sum() + 100.0)
    status, said = outcome(materials["clip"], tmp_path / "run", capfd, 40)
    assert "scale" in found_in(status)
    assert "0.01" in said
