"""The DeepSpeed engine at ZeRO 0, 1, 2 and 3 on 2 gloo ranks equals the torch engine with the whole batch: losses,
gradient norms, every parameter, moment, average and buffer, and also across a checkpoint in either direction.

Planted bugs that fail here: AdamW's step not restored (bias correction starts anew: every resumed case), one group at
another learning rate under ZeRO (every case of stages 1 to 3), parameters of stage 3 that stay gathered not overwritten
on load (resume3-used), moments mapped once, as DeepSpeed does (stages 1 and 2 with several groups: no state at all).
"""

import json
from pathlib import Path

import deepspeed_ranks
import pytest
import torch
from deepspeed_ranks import (
    ACCUMULATE,
    BATCH,
    BLAMED,
    CLIP,
    EMA_DECAY,
    HALF_PACE,
    MIDDLE,
    OVERFLOW,
    STAGES,
    STEPS,
    make_objective,
    make_optimizer,
    overflow,
    run_steps,
    snapshot,
    split,
    whole_batch,
)
from safetensors.torch import load_file, save_file

from mmssl import launch
from mmssl.engine.deepspeed_setup import autocast_precision, merge, stale_locks, system_config
from mmssl.engine.torch_engine import TorchEngine
from mmssl.errors import UserError

TIMEOUT = 200
TRAINED = ["zero0", "zero1", "zero2", "zero3", "zero3-cut"]
RESUMED = ["resume0", "resume2", "resume3-cut", "resume2-used", "resume3-used"]
OFFLOADED = ["resume2-offload", "resume3-offload"]


def torch_engine(precision="fp32"):
    objective = make_objective()
    return TorchEngine(objective, make_optimizer(objective), torch.device("cpu"), precision, CLIP, EMA_DECAY)


def micros(step):
    return split(whole_batch(step), ACCUMULATE)


@pytest.fixture(scope="module")
def reference():
    """Loss and norm series, and the states in the middle and at the end, of one process with the whole batch."""
    torch.set_num_threads(1)
    engine = torch_engine()
    series = run_steps(engine, range(MIDDLE), micros)
    middle = snapshot(engine)
    series += run_steps(engine, range(MIDDLE, STEPS), micros)
    return {"series": torch.tensor(series), "middle": middle, "end": snapshot(engine)}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, reference, fp16):
    folder = tmp_path_factory.mktemp("two")
    save(folder / "torch-middle.safetensors", reference["middle"])
    save(folder / "torch-fp16.safetensors", fp16["middle"])
    (folder / "torch-fp16.json").write_text(json.dumps(fp16["facts"]))
    # Whoever was killed while something was compiled leaves a lock, for which the next to compile it waits for ever.
    lock = folder / "extensions" / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))
        launch.run(deepspeed_ranks.two_ranks, (folder,), 2, TIMEOUT)
    return folder


@pytest.mark.distributed
def test_nothing_is_compiled_so_that_no_lock_is_waited_for(two_ranks):
    left = [path.name for path in (two_ranks / "extensions").rglob("*") if path.is_file()]
    assert left == ["lock"]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, reference):
    folder = tmp_path_factory.mktemp("one")
    save(folder / "torch-middle.safetensors", reference["middle"])
    launch.run(deepspeed_ranks.one_rank, (folder,), 1, TIMEOUT)
    return folder


def save(file, state):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)


def check(folder, case, reference, moment="end", first=0):
    report = json.loads((folder / f"{case}-{moment}.json").read_text())
    steps = STEPS if moment == "end" else MIDDLE
    series = torch.tensor(report["series"])
    torch.testing.assert_close(series, reference["series"][first:steps], rtol=0, atol=1e-5)
    assert report["counts"] == [steps, steps * ACCUMULATE]
    assert_states_close(load_file(folder / f"{case}-{moment}.safetensors"), reference[moment])


def assert_states_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_reference_clips_and_moves(reference):
    norms = reference["series"][:, 1]
    assert (norms > CLIP).all()
    start = dict(make_objective().named_parameters())
    moved = [n for n, p in start.items() if (reference["end"][f"param/{n}"] - p).abs().max() > 1e-3]
    assert set(start) - set(moved) == {"encoder.cls_token"}


@pytest.mark.distributed
@pytest.mark.parametrize("moment", ["middle", "end"])
@pytest.mark.parametrize("case", TRAINED)
def test_two_ranks_equal_one_process(two_ranks, reference, case, moment):
    check(two_ranks, case, reference, moment)


@pytest.mark.distributed
@pytest.mark.parametrize("case", RESUMED + OFFLOADED)
def test_two_ranks_go_on_from_the_torch_engine(two_ranks, reference, case):
    check(two_ranks, case, reference, first=MIDDLE)


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["zero2", "zero3", "zero3-cut"])
def test_the_torch_engine_goes_on_from_two_ranks(two_ranks, reference, case):
    engine = torch_engine()
    engine.load(load_file(two_ranks / f"{case}-middle.safetensors").__getitem__, MIDDLE)
    series = torch.tensor(run_steps(engine, range(MIDDLE, STEPS), micros))
    torch.testing.assert_close(series, reference["series"][MIDDLE:], rtol=0, atol=1e-5)
    assert_states_close(snapshot(engine), reference["end"])


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 2])
def test_one_rank_without_a_launcher_equals_the_torch_engine(one_rank, reference, stage):
    check(one_rank, f"zero{stage}", reference)
    check(one_rank, f"resume{stage}", reference, first=MIDDLE)


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["zero2-bf16", "zero3-bf16"])
def test_bf16_keeps_fp32_parameters_and_the_losses(two_ranks, bf16_losses, case):
    report = json.loads((two_ranks / f"{case}-end.json").read_text())
    assert report["dtypes"] == ["torch.float32"]
    losses = torch.tensor(report["series"])[:, 0]
    torch.testing.assert_close(losses, bf16_losses, rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def bf16_losses():
    losses, exact = (
        torch.tensor(run_steps(torch_engine(precision), range(STEPS), micros, HALF_PACE))[:, 0]
        for precision in ("bf16", "fp32")
    )
    assert (losses - exact).abs().max() > 1e-4  # it does compute in bf16
    return losses


@pytest.fixture(scope="module")
def fp16():
    """What one process makes of gradients that overflow at two steps; and what it had in the middle."""
    engine = torch_engine("fp16")
    overflow(engine.objective, OVERFLOW)
    found = run_steps(engine, range(MIDDLE), micros, HALF_PACE)
    middle, facts = snapshot(engine), engine.scale.facts()
    found += run_steps(engine, range(MIDDLE, STEPS), micros, HALF_PACE)
    return {"series": torch.tensor(found), "middle": middle, "facts": facts, "end": snapshot(engine)}


def test_an_overflow_is_skipped_and_lowers_the_scale(fp16):
    series, facts = fp16["series"], fp16["facts"]
    assert [step for step, skipped in enumerate(series[:, 3]) if skipped] == list(OVERFLOW)
    assert [step for step, norm in enumerate(series[:, 1]) if not norm.isfinite()] == list(OVERFLOW)
    assert series[:, 2].log2().tolist() == [16, 16, 16, 15, 15, 14]
    assert facts == {"scale": 2.0**15, "good": 0, "skipped": 1}


@pytest.mark.distributed
@pytest.mark.parametrize("case", [*(f"zero{stage}-fp16" for stage in STAGES), "zero2-offload-fp16"])
def test_fp16_on_two_ranks_skips_what_overflows_on_one_and_equals_one_process(two_ranks, fp16, case):
    for moment, first in (("end", 0), ("resumed", MIDDLE)):
        report = json.loads((two_ranks / f"{case}-{moment}.json").read_text())
        assert report["dtypes"] == ["torch.float32"]
        series, expected = torch.tensor(report["series"]), fp16["series"][first:]
        torch.testing.assert_close(series[:, 0], expected[:, 0], rtol=0, atol=1e-3)
        torch.testing.assert_close(series[:, 1], expected[:, 1], rtol=1e-2, atol=0)
        assert torch.equal(series[:, 2:], expected[:, 2:])
        state = load_file(two_ranks / f"{case}-{moment}.safetensors")
        for name, tensor in fp16["end"].items():
            torch.testing.assert_close(
                state[name], tensor, rtol=0, atol=2e-3, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.distributed
@pytest.mark.parametrize("stage", BLAMED)
def test_a_bad_loss_on_one_rank_stops_all_and_names_its_samples(two_ranks, stage):
    said = json.loads((two_ranks / f"bad{stage}.json").read_text())
    first = BATCH // 2 + BATCH // 4  # the second micro-batch of the second rank
    assert said[0] == said[1]
    tensor, samples = said[0]
    assert tensor.startswith("the output of ")
    assert samples == list(range(first, first + BATCH // 4))


SHIPPED = [
    "zero0", "zero1", "zero2", "zero2_bf16", "zero2_fp16", "zero2_offload",
    "zero3", "zero3_bf16", "zero3_fp16", "zero3_offload",
]  # fmt: skip


def test_all_that_is_shipped_is_in_the_table_of_the_readme():
    folder = Path(__file__).parents[2] / "ds_configs"
    assert sorted(path.stem for path in folder.glob("*.json")) == SHIPPED
    rows = [line.split("|")[1] for line in (folder / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert sorted(word for row in rows for word in row.replace("`", "").replace(",", " ").split()) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_hold_systems_settings_only(name):
    system = system_config(name)
    assert set(system) <= {"zero_optimization", "zero_force_ds_cpu_optimizer", "torch_autocast"}
    assert str(system["zero_optimization"]["stage"]) == name[4]
    assert ("offload_optimizer" in system["zero_optimization"]) == name.endswith("offload")
    asked = autocast_precision(system)
    assert asked == (name[6:] if name.endswith("16") else None)
    merged = merge(system, 4, 2, 1.0, asked or "bf16")
    assert merged["train_batch_size"] == 8
    assert merged["gradient_clipping"] == 1.0
    assert merged["torch_autocast"] == {"enabled": True, "dtype": "float16" if asked == "fp16" else "bfloat16"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["ds.json", "neither"]),
        ("{\n  'a': 1\n}", ["ds.json", "line 2"]),
        ("[1]", ["ds.json", "list"]),
    ],
)
def test_unreadable_configurations_are_one_sentence(tmp_path, text, words):
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as error:
        system_config(str(path))
    assert all(word in str(error.value) for word in words)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UserError, match="did you mean 'zero2'"):
        system_config("zeor2")
    assert system_config("zero2.json") == system_config("zero2")


@pytest.mark.parametrize(
    ("system", "words"),
    [
        ({"optimizer": {"type": "Adam"}}, ["optimizer", "optim"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "optim.warmup"]),
        ({"bf16": {"enabled": True}}, ["bf16", "train.precision"]),
        ({"torch_autocast": {"enabled": True}}, ["torch_autocast", "bf16", "train.precision", "fp32"]),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, ["torch_autocast", "fp16", "train.precision"]),
        ({"torch_autocast": {"enabled": "yes"}}, ["torch_autocast", "'yes'", "float16"]),
        ({"torch_autocast": True}, ["torch_autocast", "True", "float16"]),
        ({"fp16": {"enabled": True}}, ["fp16", "torch_autocast", "float16", "train.precision=fp16"]),
        ({"train_batch_size": 16}, ["train_batch_size", "train.batch_size", "16", "8"]),
        ({"gradient_accumulation_steps": 4}, ["gradient_accumulation_steps", "train.accumulate"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping", "optim.clip"]),
        ({"zero_optimization": {"stage": 4}}, ["stage"]),
        ({"zero_optimisation": {"stage": 2}}, ["'zero_optimisation'", "did you mean 'zero_optimization'"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, ["offload_optimizer", "object", "'cpu'"]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ["nvme"]),
    ],
)
def test_what_the_recipe_decides_names_both_places(system, words):
    with pytest.raises(UserError) as error:
        merge(system, 4, 2, where="ds.json")
    assert all(word in str(error.value) for word in ["ds.json", *words])


def test_auto_and_equal_values_are_filled_in():
    system = {"train_batch_size": "auto", "gradient_clipping": 1.0, "bf16": {"enabled": "auto"}, "optimizer": "auto"}
    merged = merge(system, 4, 2, 1.0)
    assert (merged["train_batch_size"], merged["gradient_clipping"]) == (8, 1.0)
    assert "bf16" not in merged
    assert "optimizer" not in merged


def test_only_locks_without_an_owner_are_stale(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("left", "held"):
        (tmp_path / "py311_cpu" / name).mkdir(parents=True)
        (tmp_path / "py311_cpu" / name / "lock").touch()
    with (tmp_path / "py311_cpu" / "held" / "lock").open():
        assert stale_locks() == [tmp_path / "py311_cpu" / "left" / "lock"]
