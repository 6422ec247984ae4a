"""The command line as a person meets it: results, JSON, exit codes, and one sentence for each mistake."""

import io
import json
import shlex
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from tasks.build import load_recipe
from tasks.pretrain import DryRun, pretrain


@pytest.fixture(scope="module")
def run(tmp_path_factory, photos, tiny_settings):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("cli") / "run"
    pretrain("image-mae-tiny", photos / "train", out, {**tiny_settings, "train.steps": 3})
    return out


@pytest.fixture
def halves(photos):
    return ["--train", str(photos / "train"), "--test", str(photos / "test")]


def test_recipes_are_listed_and_printed(ask):
    code, out, _ = ask("recipes")
    assert code == 0
    assert "image-mae-tiny" in out
    assert all(line.endswith(".") for line in out.splitlines()), "a line is cut in mid-sentence"
    code, out, _ = ask("recipes", "image-mae-b16")
    assert out.startswith("# MAE with ViT-B/16")
    code, out, _ = ask("recipes", "image-mae-b16", "--json")
    assert json.loads(out)["model"]["backbone"]["dim"] == 768


def test_dry_run_says_what_it_costs_and_writes_nothing(ask, photos, tmp_path):
    words = ["pretrain", "image-mae-tiny", "--data", photos, "--out", tmp_path / "x", "--dry-run"]
    code, out, _ = ask(*words, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["tokens_seen"] == "4 of 16"
    assert facts["files"] == 30
    assert facts["steps"] == round(100 * 30 / 256)
    assert facts["recipe"]["train"]["epochs"] == 100
    assert facts["gflop_per_sample_training"] == pytest.approx(3 * facts["gflop_per_sample_forward"])
    assert facts["estimated_memory_gb"] > 0
    assert not (tmp_path / "x").exists()
    page = ask(*words)[1]
    assert "gflop per sample forward" in page
    assert "train.accumulate or model.backbone.checkpointing=true does" in page


def test_a_dry_run_advises_only_settings_that_there_are():
    screen = io.StringIO()
    DryRun(load_recipe("cpc-audio-tiny"), None, {}, [{"ranks": 8}]).render(Console(file=screen, width=400))
    assert "train.accumulate does" in screen.getvalue()
    assert "checkpointing" not in screen.getvalue()


def test_pretrain_prints_one_json_object_on_stdout(ask, photos, tiny_settings, tmp_path):
    words = [f"{key}={json.dumps(value)}" for key, value in {**tiny_settings, "train.steps": 2}.items()]
    code, out, err = ask("pretrain", "image-mae-tiny", *words, "--data", photos, "--out", tmp_path / "r", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["steps"] == 2
    assert result["files"] == 30
    assert "step 2/2" in err


def test_knn_and_linear_probe(ask, run, halves, tmp_path):
    code, out, _ = ask("knn", run, *halves, "--k", "3,5,100", "--json", "--out", tmp_path / "k")
    assert code == 0
    result = json.loads(out)
    assert set(result["scores"]) == {"3", "5"}
    score = result["scores"]["3"]["top1"]
    assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1
    assert json.loads((tmp_path / "k" / "knn.json").read_text()) == result
    code, out, _ = ask("linear-probe", run, *halves, "--json")
    assert code == 0
    assert json.loads(out)["classes"] == ["across", "along"]
    code, out, _ = ask("linear-probe", run / "encoder", *halves)
    assert "top1" in out


def test_finetune_from_the_encoder_and_from_scratch(ask, run, halves, tmp_path):
    shared = ["finetune", run, *halves, "--shots", "4", "--json", "train.steps=3", "data.workers=0"]
    code, out, _ = ask(*shared, "--out", tmp_path / "a")
    assert code == 0
    result = json.loads(out)
    protocol = {"name": "plain", "start": "pre-trained", "labels": "4 labels per class", "seed": 0, "steps": 3}
    assert result["protocol"].items() >= protocol.items()
    assert result["train"] == 8
    assert result["test"] == 8
    code, out, _ = ask(*shared, "--out", tmp_path / "b", "--scratch")
    assert json.loads(out)["protocol"]["start"] == "scratch"
    assert (tmp_path / "a" / "encoder" / "model.safetensors").exists()
    assert "Accuracy" in (tmp_path / "a" / "report.html").read_text()
    assert json.loads((tmp_path / "a" / "finetune.json").read_text()) == result


def test_embed_writes_parquet(ask, run, photos, tmp_path):
    code, _, _ = ask("embed", run, photos / "test", "--out", tmp_path / "v.parquet")
    assert code == 0
    table = pq.read_table(tmp_path / "v.parquet")
    assert table.column_names == ["path", "split", "label", "vector"]
    assert table.num_rows == 8


def test_data_check_reports_and_exits_3(ask, photos, tmp_path):
    assert ask("data", "check", photos, "--workers", "1")[0] == 0
    copy = shutil.copytree(photos / "test", tmp_path / "copy")
    victim = next(copy.rglob("*.png"))
    victim.write_bytes(b"")
    code, out, _ = ask("data", "check", copy, "--workers", "1", "--json")
    assert code == 3
    assert json.loads(out)["broken"][0]["reason"] == "empty file"


def test_a_broken_file_in_evaluation_exits_3_unless_skipped(ask, run, photos, halves, tmp_path):
    copy = shutil.copytree(photos / "test", tmp_path / "copy")
    next(copy.rglob("*.png")).write_bytes(b"words")
    words = ["--train", photos / "train", "--test", copy]
    for command in (["knn", run, *words, "--k", "3"],
                    ["embed", run, copy, "--out", tmp_path / "v.parquet"]):  # fmt: skip
        code, _, err = ask(*command)
        assert code == 3, err
        assert ".png" in err
    code, out, _ = ask("knn", run, *words, "--k", "3", "--skip-broken", "--json")
    assert code == 0
    assert len(json.loads(out)["skipped"]) == 1


# fmt: off
# ruff: noqa: E501
MISTAKES = {
    "pretran": "No such command 'pretran'. Did you mean 'pretrain'?",
    "data chek {photos}": "Did you mean 'check'?",
    "pretrain image-mae-tin --data {photos} --out {new}": "'image-mae-tin' is not a recipe; did you mean 'image-mae-tiny'?",
    "pretrain image-mae-tiny --data {photos}x --out {new}": "does not exist; did you mean 'photos0'?",
    "pretrain image-mae-tiny --dta {photos} --out {new}": "No such option: --dta",
    "pretrain image-mae-tiny --out {new}": "pretrain needs --data",
    "pretrain image-mae-tiny --data {photos}": "pretrain needs --out",
    "pretrain image-mae-tiny --data {empty} --out {new}": "holds no file of modality image",
    "pretrain image-mae-tiny --data {photos} --out {run}": "is not empty; give --resume",
    "pretrain image-mae-tiny --data {photos} --out {new} --resume": "is not a run folder",
    "pretrain image-mae-tiny --data {photos} --out {new} --split train": "split",
    "pretrain image-mae-tiny --data {photos} --out {new} train.stepz=1": "did you mean 'train.steps'?",
    "pretrain image-mae-tiny --data {photos} --out {new} train.steps=x": "train.steps",
    "pretrain image-mae-tiny --data {photos} --out {new} train.patience=3": "which finetune alone has",
    "pretrain image-mae-tiny --data {photos} --out {new} 'optim={lr: 1, lr: 2}'": "not valid YAML",
    "pretrain image-mae-tiny --data {photos} --out {new} train.init_from={photo}": "is a .png file, but an encoder folder",
    "pretrain image-mae-tiny --data {photos} --out {new} train.init_from={photos}": "neither an encoder folder nor a run",
    "pretrain image-mae-tiny --data {photos} --out {new} train.engine=torch --deepspeed_config zero2": "one process",
    "pretrain image-mae-tiny --data {photos} --out {new} --deepspeed_config zer2": "zero2",
    "knn {run}x --train {photos} --test {photos}": "does not exist; did you mean 'run'?",
    "knn {photos} --train {photos} --test {photos}": "neither an encoder folder nor a run",
    "knn {run} --train {photos} --test {photos}": "in both the training and the test set; give two folders, or",
    "knn {run} --train {photos}/train --test {photos}/test --k ten": "--k ten: give whole numbers",
    "knn {run} --train {photos}/train --test {photos}/test --label-column speaker": "speaker",
    "knn {run} --train {photos}/train": "Missing option '--test'",
    "linear-probe {run} --train {photos}/train/along --test {photos}/test": "label",
    "finetune {run} --train {photos}/train --test {photos}/test --out {new} --labels 5": "--labels 5: give a percentage",
    "finetune {run} --train {photos}/train --test {photos}/test --out {new} --shots 999": "--shots 999: give a number",
    "finetune {run} --train {photos}/train --test {photos}/test --out {new} --shots 2 --labels 5%": "exclude each other",
    "finetune {run} --train {photos}/train --test {photos}/test --out {new} --scratch train.init_from={run}": "train.init_from cannot be set here",
    "finetune {run} --train {photos}/train --test {photos}/test --out {new} objective.classes=[a,b]": "objective.classes cannot be set here",
    "finetune {run} --train {photos}/train --test {photos}/test --out {new} 'objective={classes: [a, b]}'": "objective.classes cannot be set here",
    "finetune {run} --train {photos}/train --test {photos}/test --out {new} 'objective={name: mae}'": "objective.name cannot be set here",
    "finetune {run} --train {photos}/train --test {photos}/test --out {new} --seeds 0,1 'train={seed: 3}'": "train.seed is what --seeds sets",
    "finetune {run} --train {photos}/train --test {photos}/test --out {new} data.repeats=2 objective.mix.mixup=0.8": "data.repeats makes the same file",
    "linear-probe {run} --train {photos}/train --test {photos}/test --protocol mae 'objective={name: mae}'": "objective.name cannot be set here",
    "finetune {run} --train {photos}/train --test {photos}/test --out {new} --shots 2 train.seed=-1": "train.seed",
    "knn {run} --train {photos}/train --test {photos}/test --temperature nan": "temperature",
    "knn {run} --train {photos}/train --test {photos}/test/../train": "in both the training and the test set",
    "linear-probe {run} --train {photos}/train --test {photos}/test --seed -1": "--seed",
    "linear-probe {run} --train {photos}/train --test {photos}/test --out {run}/config.yaml": "config.yaml",
    "data check {photos} --workers -3": "--workers",
    "data check {photos} --ledger {empty}": "empty",
    "pretrain image-mae-tiny --data {photos} --out {new} signal.size=32 model.tokenizer.patch_size=32": "at least 2 tokens",
    "pretrain image-mae-tiny --data {photos} --out {new} data.timeout=1e10": "data.timeout",
    "pretrain image-mae-tiny --data {photos} --out {new} objective.name=[mae]": "is not an objective",
    "pretrain image-mae-tiny --data {photos} --out {new} modality=[image]": "is not a modality",
    "pretrain image-mae-tiny --data {photos} --out {new} train.batch_size=99999999999": "train.batch_size",
    "embed {run} {photos} --out {new}.csv": "must end in .parquet",
    "embed {run} {photos}": "Missing option '--out'",
    "data check {photos} --modality imge": "did you mean 'image'?",
    "demo --modality imgae --out {new}": "did you mean 'image'?",
    "demo --out {photos}": "is not empty",
}
# fmt: on


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_gets_one_sentence_and_exit_2(ask, run, photos, tmp_path, line):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no pictures")
    places = {"run": run, "photos": photos, "new": tmp_path / "new", "empty": tmp_path / "empty"}
    places["photo"] = next(photos.rglob("*.png"))
    words = line
    for name, path in places.items():
        words = words.replace(f"{{{name}}}", str(path))
    code, out, err = ask(*shlex.split(words))
    assert code == 2, err
    assert MISTAKES[line] in err
    assert err.startswith("mmssl: ")
    assert err.count("\n") == 1
    assert out == ""
    assert not (tmp_path / "new").exists()


def test_an_empty_argument_and_too_much_memory_are_sentences(ask):
    code, _, err = ask("pretrain", "image-mae-tiny", "--data", "")
    assert code == 2
    assert "an argument is empty" in err
    code, _, err = ask("pretrain", "image-mae-tiny", "--dry-run", "model.backbone.dim=1000000000")
    assert code == 1
    assert "out of memory" in err


def test_the_version(ask):
    assert ask("--version")[:2] == (0, "0.1.0\n")


def test_the_local_rank_of_the_launcher_is_accepted(ask):
    assert ask("pretrain", "--local_rank=0", "image-mae-tiny", "--dry-run", "--json")[0] == 0
