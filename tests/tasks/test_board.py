"""TensorBoard: every metric is a scalar, a resumed run goes on without what it takes back, and it is an extra."""

import pytest

from mmssl.errors import UserError
from mmssl.run import Run
from tasks.build import load_recipe
from tasks.pretrain import pretrain


def scalars(run):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed"
    )
    found = event_accumulator.EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_every_line_is_there_and_none_twice_after_a_resume(materials, tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    recipe, data, settings = materials["image"]
    out = tmp_path / "run"
    settings = {**settings, "train.tensorboard": True, "train.batch_size": 4}
    pretrain(recipe, data, out, {**settings, "train.steps": 4})
    # As if it had been killed: step 3 was seen, but not kept.
    run = Run(out)
    kept = [line for line in run.metrics() if line["step"] <= 4]
    pretrain(recipe, data, out, {**settings, "train.steps": 6}, resume=True)
    lines = run.metrics()
    assert lines[:4] == kept
    found = scalars(out)
    for name in ("loss", "grad_norm", "samples_per_s", "health.rank", "lr"):
        written = found[name.replace(".", "/")]
        assert [step for step, _ in written] == [line["step"] for line in lines]
        assert [value for _, value in written] == pytest.approx([line[name] for line in lines], rel=1e-5)
    assert "step" not in found


def test_a_line_that_is_taken_back_is_not_shown(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tasks.board import FOLDER, Board

    for start, steps, value in ((0, (1, 2, 3), 1.0), (2, (3, 4), 2.0)):
        board = Board(tmp_path / FOLDER, start)
        for step in steps:
            board.write({"step": step, "loss": value})
        board.close()
    assert scalars(tmp_path)["loss"] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_without_the_package_the_extra_is_named_before_there_is_a_run(materials, tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.board.find_spec", lambda _name: None)
    recipe, data, settings = materials["image"]
    with pytest.raises(UserError, match=r"mmssl\[tensorboard\]"):
        pretrain(recipe, data, tmp_path / "run", {**settings, "train.tensorboard": True})
    assert not (tmp_path / "run").exists()
    assert not load_recipe(recipe).train.tensorboard
