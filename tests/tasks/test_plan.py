"""The planner: what it proposes fits and is the greatest that does, its arithmetic, and its sentences."""

import json
import shlex
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from mmssl.cards import CARDS, recognised
from mmssl.cost import Footprint, between
from mmssl.errors import UserError
from tasks.build import load_recipe, measure_memory, sketch_objective
from tasks.cli import main
from tasks.plan import cards, plan, processors
from tasks.plan_check import Case, row, traced
from tasks.plan_cuts import Cuts
from tasks.plan_rows import ALONE, CONFIGS, counted, duration, planned, shardings, size

SMALL = {"model.backbone": {"dim": 64, "depth": 1, "num_heads": 2}, "objective.decoder": {"dim": 32, "depth": 1}}
ENDLESS = {"signal.size": [16, 16], "model.tokenizer.patch_size": [4, 4], **SMALL}
TINY = {**ENDLESS, "train.steps": 100}


def small(gpus=8, memory=None, **options):
    """Cards with all of their memory usable, so that the tests' sums are plain."""
    machines = cards(gpus, options.pop("kind", "h100"), memory, options.pop("tflops", None), options.pop("mfu", 0.4))
    return replace(machines, fixed=0.0, lost=0.0, **options)


@pytest.fixture
def quick(monkeypatch):
    """Footprints made up instead of traced: activations in proportion to the samples."""

    def made_up(_recipe, _objective, samples):
        return Footprint(4_000_000, 4_000_000, samples, 10**6 * samples, ((0, 10**6 * samples), (4_000_000, 0)))

    monkeypatch.setattr("tasks.plan_cuts.measure_memory", made_up)


def bytes_of(recipe, ranks, config, micro, accumulate):
    """What the plan is for a cut, traced anew."""
    train = recipe.train.model_copy(update={"accumulate": accumulate})
    recipe = recipe.model_copy(update={"train": train})
    foot = measure_memory(recipe, sketch_objective(recipe), micro)
    return planned(recipe, foot, dict(shardings(recipe, ranks))[config]).total


@pytest.mark.usefixtures("quick")
def test_operations_steps_and_days_add_up():
    found = plan("image-mae-tiny", TINY, machines=small(4, tflops=2.0, mfu=0.25)).facts
    per_step = found["gflop_per_sample_training"] * 256 / 1e3
    assert found["tflop_per_step"] == pytest.approx(per_step)
    assert found["seconds_per_step"] == pytest.approx(per_step / (4 * 2.0 * 0.25))
    assert found["days"] == pytest.approx(100 * found["seconds_per_step"] / 86400)
    assert found["steps"] == 100
    epochs = plan("image-mae-tiny", {**ENDLESS, "train.epochs": 3}, machines=small(4), samples=2560).facts
    assert epochs["steps"] == 30
    assert plan("image-mae-tiny", {**ENDLESS, "train.epochs": 3}, machines=small(4)).facts["days"] is None


@pytest.mark.usefixtures("quick")
def test_all_fits_into_much_memory_uncut_and_the_words_can_be_typed():
    found = plan("image-mae-tiny", TINY, machines=small(4), data=None)
    assert found.proposal.deepspeed_config == "zero0"
    assert (found.proposal.micro_batch, found.proposal.accumulate) == (64, 1)
    words = shlex.split(found.command)
    assert words[:6] == ["deepspeed", "--num_gpus", "4", "tasks/pretrain.py", "image-mae-tiny", "--data"]
    assert 'model.backbone={"dim": 64, "depth": 1, "num_heads": 2}' in words
    assert not any(word.startswith("train.accumulate") for word in words)
    assert [row["deepspeed_config"] for row in found.stages] == list(CONFIGS)
    assert plan("image-mae-tiny", TINY, machines=small(1)).command.startswith("mmssl pretrain image-mae-tiny ")
    assert "--hostfile HOSTS" in plan("image-mae-tiny", TINY, machines=small(64)).command


def test_a_batch_that_does_not_fit_is_cut_to_the_greatest_that_does():
    recipe = load_recipe("image-mae-tiny", {**TINY, "train.precision": "bf16"})
    memory = bytes_of(recipe, 2, "zero0", 32, 4) / 1e9
    found = plan("image-mae-tiny", TINY, machines=small(2, memory=1.001 * memory))
    assert found.proposal.deepspeed_config == "zero0"
    assert (found.proposal.micro_batch, found.proposal.accumulate) == (32, 4)
    assert found.proposal.memory_gb == pytest.approx(memory)
    assert "train.accumulate=4" in shlex.split(found.command)
    assert bytes_of(recipe, 2, "zero0", 64, 2) > 1.001e9 * memory
    greatest = {row["deepspeed_config"]: row["greatest_micro_batch"] for row in found.stages}
    assert greatest["zero0"] == 32


def test_the_least_stage_that_fits_is_proposed():
    wide = {**TINY, "model.backbone": {"dim": 1024, "depth": 2, "num_heads": 8}, "train.batch_size": 8}
    recipe = load_recipe("image-mae-tiny", {**wide, "train.precision": "bf16"})
    sizes = [bytes_of(recipe, 8, name, 1, 1) / 1e9 for name in ("zero0", "zero1", "zero2")]
    assert sizes[0] > sizes[1]
    found = plan("image-mae-tiny", wide, machines=small(8, memory=(sizes[0] + sizes[1]) / 2))
    assert found.proposal.deepspeed_config == "zero1"


@pytest.mark.usefixtures("quick")
def test_where_nothing_fits_the_sentence_says_what_is_missing_and_what_helps():
    found = plan("image-mae-tiny", TINY, machines=small(8, memory=0.0001))
    assert found.proposal is None
    least = min(row["memory_gb"] for row in found.stages)
    assert f"the least is {1e3 * least:.3g} MB" in found.problem
    assert "model.backbone.checkpointing=true" in found.problem
    again = plan("image-mae-tiny", {**TINY, "model.backbone.checkpointing": True}, machines=small(8, memory=0.0001))
    assert "checkpointing" not in again.problem
    none = plan("image-mae-tiny", TINY, machines=cards(8, "h100", 1.0, None, 0.4)).problem
    assert none.startswith("nothing fits: 1.0 GB are less than CUDA, cuBLAS and NCCL and")


@pytest.mark.usefixtures("quick")
def test_processes_without_cards_offload_nothing():
    found = plan("image-mae-tiny", TINY, machines=processors(2, 0.9, 0.1, 0.5))
    assert [row["deepspeed_config"] for row in found.stages] == ["zero0", "zero1", "zero2", "zero3"]


@pytest.mark.usefixtures("quick")
def test_what_the_time_leaves_out_is_said():
    chunked = {**TINY, "model.backbone.checkpointing": True}
    short, long = (plan("image-mae-tiny", chunked, machines=small(2, tflops=t)).remarks for t in (1000.0, 1e-3))
    assert "model.backbone.checkpointing computes what it spares again" in long[0]
    assert len(long) == 1
    assert "per step is less than" in short[1]
    assert plan("image-mae-tiny", TINY, machines=small(2, tflops=1e-3)).remarks == []


@pytest.mark.usefixtures("quick")
def test_names_of_files_are_quoted_in_the_words_to_type(tmp_path):
    folder = tmp_path / "my data"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"")
    found = plan("image-mae-tiny", TINY, machines=small(2), data=folder)
    assert str(folder) in shlex.split(found.command)


def test_sizes_and_durations_have_units_that_people_take():
    assert [size(x) for x in (0.0123, 0.5, 12.34, 1234.5)] == ["12.3 MB", "500 MB", "12.3 GB", "1,234.5 GB"]
    seconds = (0.0021, 1.5, 600, 7300, 400_000)
    assert [duration(x) for x in seconds] == ["2.1 ms", "1.5 s", "10 minutes", "2.03 hours", "4.63 days"]
    assert [counted(n, "step") for n in (1, 2000)] == ["1 step", "2,000 steps"]


def test_what_compares_samples_is_cut_into_chunks_and_never_accumulated(materials):
    recipe, _, settings = materials["clip"]
    settings = {**settings, "objective.chunk": None, "train.batch_size": 16, "towers.image.signal.size": [32, 32]}
    settings |= {f"towers.{name}.model.backbone": {"dim": 16, "depth": 1, "num_heads": 2} for name in ("image", "text")}
    whole = plan(recipe, settings, machines=small(2)).proposal
    assert (whole.micro_batch, whole.accumulate, whole.chunk) == (8, 1, None)
    parsed = load_recipe(recipe, {**settings, "train.precision": "bf16"})
    cuts = Cuts(parsed, 2)
    assert cuts.footprint(4).peak() < cuts.footprint(8).peak()
    total = planned(parsed, cuts.trace(4), dict(shardings(parsed, 2))["zero0"]).total
    found = plan(recipe, settings, machines=small(2, memory=1.0001e-9 * total))
    assert (found.proposal.micro_batch, found.proposal.accumulate) == (8, 1)
    assert found.proposal.chunk == 4
    assert f"objective.chunk={found.proposal.chunk}" in found.command


def test_between_two_traces_lies_the_third():
    recipe = load_recipe("image-mae-tiny", TINY)
    objective = sketch_objective(recipe)
    low, middle, high = (measure_memory(recipe, objective, n) for n in (8, 16, 32))
    guess = between(low, high, 1 / 3)
    assert guess.peak() == pytest.approx(middle.peak(), rel=0.002)
    assert guess.activations == pytest.approx(middle.activations, rel=0.002)
    assert between(low, replace(high, timeline=high.timeline[:-1]), 0.5) is None


def test_sizes_that_are_not_on_a_line_are_traced(monkeypatch):
    recipe = load_recipe("image-mae-tiny", TINY)

    def bent(recipe, _objective, samples):
        peak = samples**2
        return Footprint(100, 80, samples, peak, ((0, peak), (80, 0)))

    monkeypatch.setattr("tasks.plan_cuts.measure_memory", bent)
    cuts = Cuts(recipe, 1)
    assert cuts.sizes == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert cuts.greatest(lambda foot: foot.peak() <= 900) == 16
    assert cuts.greatest(lambda foot: foot.peak() <= 2000) == 32
    assert cuts.greatest(lambda foot: False) is None
    assert cuts.greatest(lambda foot: True) == 256


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["train.batch_size=100", "--gpus", "8"], "96 and 104 do"),
        (["train.batch_size=4", "--gpus", "8"], "8 does"),
        (["--gpu", "h10"], "did you mean 'h100'"),
        (["--gpu", "v100", "train.precision=bf16"], "v100 does not have"),
        (["--samples", "5", "--data", "."], "one of them"),
        (["optim.name=sgd"], "'adamw' alone"),
        (["--split", "train"], "give --data too"),
        (["--cpu", "--gpu", "a100"], "--cpu is for processes without cards"),
    ],
)
def test_mistakes_get_one_sentence(options, words, capsys):
    assert main(["plan", "image-mae-tiny", *options]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.usefixtures("quick")
def test_the_command_prints_json_or_tables_and_fails_where_nothing_fits(capsys):
    settings = [f"{key}={json.dumps(value)}" for key, value in TINY.items()]
    assert main(["plan", "image-mae-tiny", *settings, "--gpus", "2", "--json"]) == 0
    page = json.loads(capsys.readouterr().out)
    assert page["proposal"]["micro_batch"] == 128
    assert {row["deepspeed_config"] for row in page["stages"]} == set(CONFIGS)
    assert main(["plan", "image-mae-tiny", *settings, "--cpu", "--memory", "0.7"]) in (0, 1)
    assert "700 MB are less than the libraries" in capsys.readouterr().out
    assert main(["plan", "image-mae-tiny", *settings, "--memory", "1.6"]) == 1
    assert "nothing fits" in capsys.readouterr().out


def test_drivers_names_of_cards():
    names = {
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA H100 NVL": "h100-nvl",
        "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA A100-SXM4-40GB": "a100-40gb", "NVIDIA A10": "a10",
        "NVIDIA L4": "l4", "NVIDIA L40S": "l40s", "Tesla V100-SXM2-32GB": "v100", "NVIDIA RTX A6000": "rtx-a6000",
    }  # fmt: skip
    for name, key in names.items():
        assert recognised(name) is CARDS[key], name
    for name in ("NVIDIA A10G", "NVIDIA GeForce GTX 1080", "cpu"):
        assert recognised(name) is None


@pytest.mark.usefixtures("quick")
def test_unknown_cards_need_their_numbers():
    own = cards(2, "mine", 64.0, 100.0, 0.5)
    assert own.tflops["bf16"] == 100
    for memory, tflops in ((64.0, None), (None, 100.0)):
        with pytest.raises(UserError, match="--tflops and --memory"):
            cards(2, "mine", memory, tflops, 0.5)
    assert plan("image-mae-tiny", TINY, machines=cards(2, "v100", None, None, 0.4)).facts["precision"] == "fp32"


@pytest.mark.distributed
def test_measured_steps_take_what_was_planned():
    wide = {"model.backbone": {"dim": 512, "depth": 6, "num_heads": 8}, "objective.decoder": {"dim": 64, "depth": 1}}
    page = load_recipe("image-mae-tiny", {"train.precision": "fp32", **wide}).as_dict()
    for config in (ALONE, "zero1"):
        case = Case(page, 8, config)
        found = row(case, traced(case))
        assert 0.75 < found["planned_by_measured"] < 1.1, found
    case = Case(page, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.plan_check.free", lambda: 1e6)
        assert row(case, traced(case))["measured_gb"] is None


@pytest.mark.usefixtures("quick")
def test_a_plan_is_printed_within_the_page():
    console = Console(width=160, record=True, file=StringIO())
    plan("image-mae-tiny", TINY, machines=processors(1, 4.0, 0.1, 0.5)).render(console)
    page = console.export_text()
    assert "proposed: one process without DeepSpeed" in page
    assert "time in all" in page
