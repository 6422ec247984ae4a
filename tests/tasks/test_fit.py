"""Whole runs on tiny photos: what is written, that resuming changes nothing, and what happens when things go wrong."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

from mmssl import checkpoint
from mmssl.engine.torch_engine import TorchEngine
from mmssl.errors import MmsslError, NonFiniteLoss, Stopped, UnusableData, UserError
from mmssl.run import Run
from modalities.encoder import load
from tasks.build import load_recipe
from tasks.pretrain import pretrain
from tasks.writer import load_objective


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, moments, averages."""
    found = checkpoint.Checkpoint(run / "checkpoints" / f"step-{step:08d}")
    return {name: found.read(name) for name in found.names()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in Run(run).metrics()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, photos, tiny_settings):
    """A run of 12 steps that nothing interrupted."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("straight") / "run"
    pretrain("image-mae-tiny", photos, out, tiny_settings)
    return out


def test_a_run_folder_holds_what_the_design_names(straight, photos):
    names = {path.name for path in straight.iterdir()}
    wanted = {"config.yaml", "metrics.jsonl", "checkpoints", "objective", "encoder", "status.json", "report.html"}
    assert wanted <= names
    assert {p.name for p in (straight / "encoder").iterdir()} == {
        "model.safetensors", "config.json", "preprocess.json", "README.md",
    }  # fmt: skip
    assert json.loads((straight / "status.json").read_text())["state"] == "done"
    lines = Run(straight).metrics()
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["samples"] == 96
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert load(straight).embed(sorted(photos.rglob("*.png"))[:3]).shape == (3, 16)


def test_the_encoder_folder_holds_the_averages_and_the_objective_the_weights(straight):
    state = weights(straight, 12)
    encoder = load_file(straight / "encoder" / "model.safetensors")
    objective = load_file(straight / "objective" / "model.safetensors")
    name = "backbone.blocks.0.attn.qkv.weight"
    assert torch.equal(encoder[name], state[f"ema/encoder.{name}"])
    assert torch.equal(objective[f"encoder.{name}"], state[f"param/encoder.{name}"])
    assert not torch.equal(encoder[name], objective[f"encoder.{name}"])
    recipe, module = load_objective(straight)
    assert recipe.objective.name == "mae"
    assert torch.equal(module.state_dict()[f"encoder.{name}"], objective[f"encoder.{name}"])


@pytest.mark.parametrize(
    ("modality", "workers"),
    [("image", 0), ("image", 2), ("video", 2), ("audio", 2), ("pairs", 2), ("cpc", 2), ("clip", 2)],
)
def test_resuming_is_bitwise_the_same_whatever_the_workers(straight, materials, tmp_path, modality, workers):
    recipe, folder, settings = materials[modality]
    uninterrupted, out = straight, tmp_path / "run"
    if modality != "image":
        uninterrupted = tmp_path / "straight"
        pretrain(recipe, folder, uninterrupted, settings)
    settings = {**settings, "data.workers": workers}
    with pytest.raises(Stopped):
        stop_after(5, lambda: pretrain(recipe, folder, out, settings))
    assert json.loads((out / "status.json").read_text())["state"] == "stopped"
    pretrain(recipe, folder, out, settings, resume=True)
    assert_same(weights(uninterrupted, 12), weights(out, 12))
    assert losses(out) == losses(uninterrupted)


def stop_after(steps: int, run) -> None:
    """Send this process SIGTERM while it takes its ``steps``-th step."""
    taken, step = [0], TorchEngine.step

    def counting(self, micros, lr):
        taken[0] += 1
        if taken[0] == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, micros, lr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchEngine, "step", counting)
        run()


def test_accumulation_changes_nothing_but_rounding(straight, tmp_path, photos, tiny_settings):
    pretrain("image-mae-tiny", photos, tmp_path / "run", {**tiny_settings, "train.accumulate": 4})
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "run")), torch.tensor(losses(straight)), atol=1e-5, rtol=0
    )


def test_resuming_with_other_settings_is_refused_by_name(straight, photos, tiny_settings):
    for change, words in (({"optim.weight_decay": 0.1}, "optim.weight_decay is 0.1 here but 0.05"),
                          ({"model.backbone.dim": 32}, "model.backbone.dim")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            pretrain("image-mae-tiny", photos, straight, {**tiny_settings, **change}, resume=True)


def test_resuming_on_other_files_is_refused(straight, photos, tiny_settings):
    with pytest.raises(UserError, match="the files are not those"):
        pretrain("image-mae-tiny", photos / "train", straight, tiny_settings, resume=True)


def test_a_used_folder_is_never_overwritten(straight, photos, tiny_settings):
    with pytest.raises(UserError, match="--resume"):
        pretrain("image-mae-tiny", photos, straight, tiny_settings)


def test_init_from_a_run_and_from_an_encoder(straight, tmp_path, photos, tiny_settings):
    for source in (straight, straight / "encoder"):
        settings = {**tiny_settings, "train.init_from": str(source), "train.steps": 1, "optim.lr": 1e-12}
        out = tmp_path / source.name
        pretrain("image-mae-tiny", photos, out, settings)
        name = "encoder.backbone.blocks.0.mlp.fc1.weight"
        started = load_file(out / "objective" / "model.safetensors")[name]
        folder, key = ("encoder", name.removeprefix("encoder.")) if source.name == "encoder" else ("objective", name)
        given = load_file(straight / folder / "model.safetensors")[key]
        torch.testing.assert_close(started, given, atol=1e-6, rtol=0)
    with pytest.raises(UserError, match=r"no weight of .* fits"):
        pretrain("image-mae-tiny", photos, tmp_path / "x",
                 {**tiny_settings, "train.init_from": str(straight), "model.backbone.dim": 32})  # fmt: skip


# --- faults -----------------------------------------------------------------------------------------------------------

DRIVER = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from mmssl import checkpoint
from mmssl.engine.torch_engine import TorchEngine
from tasks.cli import main

mode, arguments = sys.argv[1], sys.argv[2:]
def die():
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "step":  # in the middle of the 9th step
    taken, step = [0], TorchEngine.step
    def counting(self, micros, lr):
        taken[0] += 1
        if taken[0] == 9:
            die()
        return step(self, micros, lr)
    TorchEngine.step = counting
if mode == "write":  # when the second checkpoint's files are written but it has not got its name
    written, commit = [0], checkpoint.commit_folder
    def counting(aside, path, old=None):
        written[0] += 1
        if written[0] == 2:
            die()
        return commit(aside, path, old)
    checkpoint.commit_folder = counting
assert "deepspeed" not in sys.modules
code = main(arguments)
assert "deepspeed" not in sys.modules, "the torch engine imported DeepSpeed"
sys.exit(code)
"""


def command(photos: Path, settings: dict[str, Any], run: Path) -> list[str]:
    """The words of a run with a checkpoint every 4 steps."""
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    return ["pretrain", "image-mae-tiny", "--data", str(photos), "--out", str(run), *words, "checkpoint.every_steps=4"]


@pytest.fixture(scope="module")
def killed(photos, tiny_settings, tmp_path_factory):
    """By mode, the folder in which a run was killed, how it ended and what it said; both at once."""
    folders = {mode: tmp_path_factory.mktemp(mode) for mode in ("step", "write")}
    with ExitStack() as stack:
        started = {}
        for mode, folder in folders.items():
            (folder / "driver.py").write_text(textwrap.dedent(DRIVER))
            words = [str(folder / "driver.py"), mode, *command(photos, tiny_settings, folder / "run")]
            driver = subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True)
            started[mode] = stack.enter_context(driver)
        said = {mode: process.communicate(timeout=120)[1] for mode, process in started.items()}
        return {mode: (folder, started[mode].returncode, said[mode]) for mode, folder in folders.items()}


@pytest.mark.parametrize(("mode", "left"), [("step", 8), ("write", 4)])
def test_kill_9_and_resume_is_bitwise_the_same(straight, killed, photos, tiny_settings, capfd, mode, left):
    folder, code, error = killed[mode]
    assert code == -signal.SIGKILL, error
    found, notes = checkpoint.newest(folder / "run" / "checkpoints")
    assert found.step == left
    assert bool(notes) == (mode == "write")
    pretrain("image-mae-tiny", photos, folder / "run", {**tiny_settings, "checkpoint.every_steps": 4}, resume=True)
    said = capfd.readouterr().err
    assert f"resuming from step {left} of 12" in said
    assert ("was not finished" in said) == (mode == "write")
    assert_same(weights(straight, 12), weights(folder / "run", 12))
    assert losses(folder / "run") == losses(straight)


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(straight, tmp_path, photos, tiny_settings, capfd):
    settings = {**tiny_settings, "checkpoint.every_steps": 4, "checkpoint.keep": 3}
    pretrain("image-mae-tiny", photos, tmp_path / "run", settings)
    (shard,) = (tmp_path / "run" / "checkpoints" / "step-00000012").glob("shard*")
    shard.write_bytes(shard.read_bytes()[:-100])
    pretrain("image-mae-tiny", photos, tmp_path / "run", settings, resume=True)
    said = capfd.readouterr().err
    assert "checksum differs" in said
    assert "resuming from step 8" in said
    assert_same(weights(straight, 12), weights(tmp_path / "run", 12))


def test_only_the_newest_checkpoints_are_kept(tmp_path, photos, tiny_settings):
    settings = {**tiny_settings, "checkpoint.every_steps": 3, "checkpoint.keep": 2}
    pretrain("image-mae-tiny", photos, tmp_path / "run", settings)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000009", "step-00000012"]


def test_signals_checkpoint_and_give_their_exit_code(tmp_path, photos, tiny_settings):
    """Both at once: what takes long is that a program starts."""
    codes = {signal.SIGTERM: 143, signal.SIGINT: 130}
    runs = {number: tmp_path / number.name for number in codes}
    with ExitStack() as stack:
        started = {}
        for number, run in runs.items():
            words = [sys.executable, "-m", "mmssl", *command(photos, {**tiny_settings, "train.steps": 100_000}, run)]
            program = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
            started[number] = stack.enter_context(program)
        for number, process in started.items():
            ends = os.pidfd_open(process.pid)
            while not (runs[number] / "metrics.jsonl").exists() and process.poll() is None:
                select.select([ends], [], [], 0.02)
            os.close(ends)
            process.send_signal(number)
        said = {number: process.communicate(timeout=60)[1] for number, process in started.items()}
    for number, run in runs.items():
        assert started[number].returncode == codes[number], said[number]
        assert "after a checkpoint; add --resume to go on" in said[number]
        assert "Traceback" not in said[number]
        status = json.loads((run / "status.json").read_text())
        assert status["state"] == "stopped"
        assert checkpoint.newest(run / "checkpoints")[0].step == status["step"] > 0


def test_a_full_disk_is_a_sentence_and_leaves_the_checkpoint_before(tmp_path, photos, tiny_settings, monkeypatch):
    from mmssl import checkpoint as module

    opened, calls = module.TensorFile, [0]

    def full(*arguments):
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(28, "No space left on device")
        return opened(*arguments)

    monkeypatch.setattr(module, "TensorFile", full)
    settings = {**tiny_settings, "checkpoint.every_steps": 4}
    with pytest.raises(MmsslError, match=r"No space left on device.*earlier ones are untouched") as caught:
        pretrain("image-mae-tiny", photos, tmp_path / "run", settings)
    assert caught.value.exit_code == 1
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


def test_nan_names_the_step_the_samples_and_the_tensor(tmp_path, photos, tiny_settings, monkeypatch):
    from mmssl.heads.decoder import MaskedDecoder

    forward, calls = MaskedDecoder.forward, [0]

    def poisoned(self, latent, keep, drop, grid, pad):
        calls[0] += 1
        return forward(self, latent, keep, drop, grid, pad) * (float("nan") if calls[0] >= 4 else 1.0)

    monkeypatch.setattr(MaskedDecoder, "forward", poisoned)
    with pytest.raises(NonFiniteLoss, match=r"step 4.*nan.*output of decoder.*\.png") as caught:
        pretrain("image-mae-tiny", photos, tmp_path / "run", {**tiny_settings, "checkpoint.every_steps": 2})
    assert caught.value.exit_code == 1
    state = weights(tmp_path / "run", 2)
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_out_of_memory_is_a_sentence_that_names_the_keys(tmp_path, photos, tiny_settings, monkeypatch):
    def no_memory(self, micros, lr):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(TorchEngine, "step", no_memory)
    with pytest.raises(MmsslError, match=r"micro-batches of 8 samples.*9 bytes.*train\.accumulate.*train\.batch_size"):
        pretrain("image-mae-tiny", photos, tmp_path / "run", tiny_settings)


@pytest.fixture
def damaged(tmp_path):
    """30 photos of which one is empty, one truncated and one no picture."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for i in range(30):
        PIL.Image.new("RGB", (20, 20), (8 * i, 100, 100)).save(folder / f"{i:02d}.jpg")
    (folder / "03.jpg").write_bytes(b"")
    (folder / "07.jpg").write_bytes((folder / "08.jpg").read_bytes()[:300])
    (folder / "11.jpg").write_bytes(b"these are words")
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_files_are_skipped_and_ledgered_once(tmp_path, damaged, tiny_settings, workers):
    settings = {**tiny_settings, "data.max_bad_fraction": 0.1, "data.workers": workers}
    result = pretrain("image-mae-tiny", damaged, tmp_path / "run", settings)
    ledger = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert {entry["path"]: entry["reason"].split(":")[0] for entry in ledger}.keys() == {"03.jpg", "07.jpg", "11.jpg"}
    assert len(ledger) == result.broken == 3
    assert "empty" in next(entry["reason"] for entry in ledger if entry["path"] == "03.jpg")


def test_too_many_broken_files_stop_the_run(tmp_path, damaged, tiny_settings):
    with pytest.raises(UnusableData, match=r"max_bad_fraction.*\(1\)") as caught:
        pretrain("image-mae-tiny", damaged, tmp_path / "run", tiny_settings)  # 5 % of 30
    assert caught.value.exit_code == 3


def test_a_folder_of_broken_files_stops_at_once(tmp_path, tiny_settings):
    folder = tmp_path / "broken"
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}.png").write_bytes(b"no")
    for workers in (0, 1):
        with pytest.raises(UnusableData, match="file after file is broken"):
            pretrain("image-mae-tiny", folder, tmp_path / f"run{workers}",
                     {**tiny_settings, "data.workers": workers, "data.max_bad_fraction": 1})  # fmt: skip
        assert len((tmp_path / f"run{workers}" / "ledger.jsonl").read_text().splitlines()) > 3


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiling_changes_nothing_but_rounding(straight, tmp_path, photos, tiny_settings, monkeypatch, backend):
    """The graph is captured and differentiated in the default run; generating C++ for it takes minutes: slow."""
    compiled, compile = [], torch.nn.Module.compile

    def recording(self):
        compiled.append(type(self).__name__)
        compile(self, backend=backend)

    monkeypatch.setattr(torch.nn.Module, "compile", recording)
    pretrain("image-mae-tiny", photos, tmp_path / "run", {**tiny_settings, "train.compile": True})
    assert compiled == ["MAE"]
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "run")), torch.tensor(losses(straight)), atol=1e-5, rtol=0
    )


def test_bf16_is_close_and_keeps_fp32_weights(straight, tmp_path, photos, tiny_settings):
    pretrain("image-mae-tiny", photos, tmp_path / "run", {**tiny_settings, "train.precision": "bf16"})
    a, b = torch.tensor(losses(tmp_path / "run")), torch.tensor(losses(straight))
    assert not torch.equal(a, b)
    torch.testing.assert_close(a, b, atol=2e-2, rtol=0)
    assert {tensor.dtype for tensor in weights(tmp_path / "run", 12).values()} == {torch.float32}


def test_a_kill_between_a_checkpoint_and_its_export_is_mended_by_resuming(straight, tmp_path, photos, tiny_settings):
    out = shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(out / "objective")
    stale = out / "encoder" / "model.safetensors"
    fresh = stale.read_bytes()
    stale.write_bytes((straight / "objective" / "model.safetensors").read_bytes())
    pretrain("image-mae-tiny", photos, out, tiny_settings, resume=True)
    assert stale.read_bytes() == fresh
    assert (out / "objective" / "model.safetensors").exists()


def test_two_processes_never_write_one_run(straight, tmp_path, photos, tiny_settings):
    out = shutil.copytree(straight, tmp_path / "run")
    with Run(out) as other:
        other.hold()
        with pytest.raises(UserError, match="another process is writing this run"):
            pretrain("image-mae-tiny", photos, out, tiny_settings, resume=True)
    pretrain("image-mae-tiny", photos, out, tiny_settings, resume=True)


def test_a_longer_run_says_that_the_schedule_changes(straight, tmp_path, photos, tiny_settings, capfd):
    out = shutil.copytree(straight, tmp_path / "run")
    pretrain("image-mae-tiny", photos, out, {**tiny_settings, "train.steps": 14}, resume=True)
    assert "14 steps instead of 12: the learning rate follows the new schedule" in capfd.readouterr().err
    assert len(losses(out)) == 14


def test_overrides_reach_a_recipe_object_too(tmp_path, photos, tiny_settings):
    recipe = load_recipe("image-mae-tiny", tiny_settings)
    assert pretrain(recipe, photos, tmp_path / "run", {"train.steps": 2}).steps == 2
    with pytest.raises(UserError, match=r"did you mean 'train\.steps'"):
        pretrain(recipe, photos, tmp_path / "x", {"train.stepz": 2})


def test_file_names_of_any_bytes_are_trained_on(tmp_path, tiny_settings):
    folder = tmp_path / "names"
    folder.mkdir()
    for i, name in enumerate((b"\xff\xfe", b"a b=c", "ü\n".encode(), b"-x")):
        PIL.Image.new("RGB", (20, 20), (60 * i, 9, 9)).save(os.fsdecode(bytes(folder) + b"/" + name + b".png"))
    assert pretrain("image-mae-tiny", folder, tmp_path / "run", {**tiny_settings, "train.steps": 2}).broken == 0


def test_a_program_that_an_error_ends_does_not_wait_for_its_data_workers(tmp_path, photos, tiny_settings):
    (tmp_path / "mixed").mkdir()
    for i, path in enumerate(sorted(photos.rglob("*.png"))[:12]):
        shutil.copy(path, tmp_path / "mixed" / f"{i}.png")
        (tmp_path / "mixed" / f"{i}-broken.png").write_bytes(b"no picture")
    settings = {**tiny_settings, "data.workers": 1}
    code = f"from mmssl import pretrain; pretrain('image-mae-tiny', {str(tmp_path / 'mixed')!r}, 'run', {settings!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "more than data.max_bad_fraction allows" in done.stderr


class Fatal:
    """Views in whose worker the system kills the process, as it does where memory runs out."""

    def __call__(self, path, rngs, size):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_data_worker_is_a_sentence(tmp_path, photos, tiny_settings, monkeypatch):
    monkeypatch.setattr("modalities.image.Image.views", lambda self, signal, tokenizer: Fatal())
    with pytest.raises(MmsslError, match=r"a data worker was killed.*lower data\.workers"):
        pretrain("image-mae-tiny", photos, tmp_path / "run", {**tiny_settings, "data.workers": 1})
