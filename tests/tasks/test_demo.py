"""The demos: their data are whole, licensed and fairly split, and each runs from its archive to its report."""

import csv
import io
import json
import tarfile
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import scipy.fft
import torch
from threadpoolctl import threadpool_limits

from mmssl.data.fragment import overlapping
from mmssl.data.listing import list_files
from mmssl.errors import UserError
from modalities.audio_read import info
from modalities.audio_settings import filterbank
from modalities.encoder import MODALITIES, Encoder
from tasks.build import load_recipe
from tasks.demo import DATA, PRETRAINED, demo, demos, run_demo, unpack
from tasks.demo_audio import CEPSTRA, Statistics
from tasks.demo_labels import SCRATCH, FewLabels, finding, probe_top1, sides
from tasks.metrics import Score

DEMOS = demos()
LABELLED = [name for name, one in DEMOS.items() if isinstance(one.exam, FewLabels)]
MODEL = {
    "model.backbone": {"dim": 16, "depth": 1, "num_heads": 2},
    "objective.decoder": {"dim": 16, "depth": 1, "num_heads": 2},
}
MODELS = defaultdict(lambda: MODEL, speech={"model.backbone.dim": 16, "model.backbone.input_dim": 16})
RUN = {"train.steps": 2, "train.batch_size": 8, "data.workers": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The unpacked archives by modality; of the pictures, which are many, the manifest alone."""
    folders = {name: tmp_path_factory.mktemp(name) for name in DEMOS}
    for name in set(DEMOS) - {"image"}:
        unpack(DEMOS[name].archive, folders[name])
    with tarfile.open(DEMOS["image"].archive) as tar:
        tar.extract("manifest.csv", folders["image"], filter="data")
    return folders


@pytest.fixture(autouse=True)
def _one_thread():
    # BLAS has threads of its own, which wait for each other where tests share a machine.
    with threadpool_limits(1):
        yield


def read_rows(folder):
    with (folder / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", DEMOS)
def test_every_file_is_listed(name, data):
    with tarfile.open(DEMOS[name].archive) as tar:
        there = {member.name for member in tar if member.isfile()}
    assert {row["path"] for row in read_rows(data[name])} == there - {"manifest.csv"}


@pytest.mark.parametrize(("name", "inspect"), [("audio", info), ("video", MODALITIES["video"].inspect)])
def test_every_file_can_be_read(name, inspect, data):
    # In this process, a thousand sounds are quick.
    for path in {row["path"] for row in read_rows(data[name])}:
        assert inspect(str(data[name] / path))[0] > 0


@pytest.mark.parametrize("name", LABELLED)
def test_what_is_tested_was_neither_labelled_nor_pre_trained_on(name, data):
    pretrained = [str(data[name] / row["path"]) for row in read_rows(data[name]) if row["split"] == "train"]
    for question in DEMOS[name].exam.questions:
        train, test = sides(question, DEMOS[name].exam.modality, data[name])
        labels = train.labels(question.labels)
        assert set(test.labels(question.labels)) == set(labels)
        assert min(labels.count(label) for label in set(labels)) >= question.shots
        assert not overlapping(train.paths, test.paths)
        assert not overlapping(pretrained, test.paths)


def test_prompts_sentences_and_clips_are_on_one_side(data):
    sides_of = defaultdict(set)
    for row in read_rows(data["audio"]):
        # A word is cut out of a file, and the file's sentence is said by four voices.
        key = row["path"] if row["source"] == "words" else row["said"]
        sides_of[row["source"], key].add(row["split"].partition("-")[0])
        if row["source"] == "sentences":
            sides_of["words", row["path"]].add(row["split"])
    for row in read_rows(data["video"]):
        if row["source"] != "scenes":
            sides_of["films", row["scene"]].add(row["split"].partition("-")[0])
    assert {*map(len, sides_of.values())} == {1}


def test_the_same_frames_are_there_at_three_speeds(data):
    clips = data["video"] / "clips"
    counts = [MODALITIES["video"].inspect(str(clips / f"bbb07{speed}.mp4")) for speed in ("", "-double", "-fourfold")]
    assert counts == [(192, 72, 128)] * 3


def test_licences_and_names_are_beside_the_data():
    texts = (DATA / "LICENSES.txt").read_text(encoding="utf-8")
    for words in (
        "Juan Cazala",
        "Noto Emoji",
        "Blender Foundation",
        "Allison Smith",
        "June Wallack",
        "Carlo Flora",
        "Twemoji",
    ):
        assert words in texts
    for words in ("The MIT License", "Apache License", "licenses/by-sa/3.0", "licenses/by/3.0", "licenses/by/4.0"):
        assert words in texts
    for words in ("Carnegie Mellon", "Attribution, ShareAlike", "Section 5 -- Disclaimer of Warranties"):
        assert words in texts  # the texts themselves
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    assert all(one.archive.name in readme for one in DEMOS.values())
    # What a person downloads with the package.
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 9.5e6


@pytest.fixture
def small(data, tmp_path):
    """Make of a demo one of three labels, three files of each and few weights."""

    def make(name):
        whole, left, labels, kept = DEMOS[name], defaultdict(lambda: 3), defaultdict(set), []
        for row in read_rows(data[name]):
            some, key = labels[row["source"]], (row["source"], row["split"], row["label"])
            if len(some) < 3:
                some.add(row["label"])
            if row["label"] in some and left[key] > 0:
                left[key] -= 1
                kept.append(row)
        manifest = io.StringIO()
        writer = csv.DictWriter(manifest, kept[0])
        writer.writeheader()
        writer.writerows(kept)
        page = tarfile.TarInfo("manifest.csv")
        page.size = len(manifest.getvalue())
        archive, names = tmp_path / "few.tar", {row["path"] for row in kept}
        with tarfile.open(whole.archive) as all_files, tarfile.open(archive, "w") as few:
            few.addfile(page, io.BytesIO(manifest.getvalue().encode()))
            for member in all_files:
                if member.name in names:
                    few.addfile(member, all_files.extractfile(member))
        questions = [replace(one, shots=2, finetuning={**one.finetuning, **RUN}) for one in whole.exam.questions]
        pretraining, exam = {**whole.pretraining, **MODELS[name], **RUN}, replace(whole.exam, questions=questions)
        return replace(whole, archive=archive, pretraining=pretraining, exam=exam)

    return make


@pytest.mark.parametrize("name", LABELLED)
def test_a_demo_runs_from_its_archive_to_its_report(name, small, tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.demo_labels.NEIGHBOURS", 5)  # of the six labels that there are
    one, out, probed = small(name), tmp_path / "out", []
    monkeypatch.setattr(
        "tasks.demo_labels.probe_top1",
        lambda _, train, test, by: probed.append((by, train)) or probe_top1(_, train, test, by),
    )
    result = run_demo(one, out)
    columns = [question.column for question in one.exam.questions]
    starts = [PRETRAINED, "random weights", *one.exam.baselines(Encoder(load_recipe(one.recipe, one.pretraining)))]
    methods = {method: [start for m, start in result.rows if m == method] for method, _ in result.rows}
    assert methods == {
        "fine-tuned": [PRETRAINED, SCRATCH],
        "linear probe": starts,
        "5 nearest neighbours": starts,
    }
    for question in one.exam.questions:
        # Frozen features and fine-tuning have the same labels.
        own = [listing for by, listing in probed if by == question.labels]
        frozen = [one for one in own if question.source in (None, one.columns["source"][0])]
        folder = f"{question.source or question.what}-from-{SCRATCH}"
        tuned = json.loads((out / folder / "finetune.json").read_text())
        classes = set(frozen[0].labels(question.labels))
        assert {len(listing) for listing in frozen} == {tuned["train"]} == {2 * len(classes)}
    for scores in result.rows.values():
        assert list(scores) == columns
        assert all(0 <= score.low <= score.value <= score.high <= 1 for score in scores.values())
    table = json.loads((out / "demo.json").read_text())["table"]
    assert len(table) == len(result.rows)
    assert columns[0] in table[0]
    page = (out / "report.html").read_text()
    if name == "speech":
        assert "Accuracy by step ahead" in page
        assert "Utterances by speaker" in page
        assert (out / "speakers.png").stat().st_size > 10_000
    else:
        assert "Reconstructions" in page
        test = list_files(out / "data", MODALITIES[one.exam.modality], split="test")
        assert page.count("<img") >= 3 * min(8, len(one.exam.shown(test)))
    assert all(column in page for column in columns)


def test_the_finding_is_only_as_good_as_the_intervals():
    (question,) = DEMOS["image"].exam.questions

    def title(tuned, scratch, probed, pixels):
        rows = {
            ("fine-tuned", PRETRAINED): tuned,
            ("fine-tuned", SCRATCH): scratch,
            ("linear probe", PRETRAINED): probed,
            ("linear probe", "raw pixels"): pixels,
        }
        return finding(question, {key: {question.column: score} for key, score in rows.items()})

    low, high, between = Score(0.5, 0.45, 0.55), Score(0.7, 0.65, 0.75), Score(0.6, 0.5, 0.7)
    assert title(high, low, low, high) == "With 10 labels per class: 70% right after pre-training, 50% from scratch"
    assert title(between, low, high, low) == (
        "With 10 labels per class, a linear probe is 70% right after pre-training and 50% on raw pixels; "
        "fine-tuning shows no clear difference"
    )
    assert title(between, low, between, low).endswith("made no clear difference here")
    assert title(low, between, low, between).endswith("made no clear difference here")
    assert title(low, high, high, low).endswith("did harm here")


def test_statistics_are_means_and_deviations_over_time():
    encoder = Encoder(load_recipe("audio-mae-tiny", DEMOS["audio"].pretraining))
    signal = torch.randn(2, 1, 4000) * 0.1
    log_mel = filterbank(encoder.config.signal)(signal[:, 0]).numpy()
    plain, cepstral = Statistics(encoder), Statistics(encoder, CEPSTRA)
    for statistics, values in ((plain, log_mel), (cepstral, scipy.fft.dct(log_mel, axis=1, norm="ortho")[:, :CEPSTRA])):
        expected = np.concatenate([values.mean(2), values.std(2, ddof=1)], axis=1)
        np.testing.assert_allclose(statistics.features(signal), expected, rtol=1e-3, atol=1e-4)
        views = torch.stack([signal, signal.flip(0)], dim=1)
        np.testing.assert_allclose(statistics.features(views)[0], expected.mean(0), rtol=1e-3, atol=1e-4)
    assert plain.fingerprint() != cepstral.fingerprint()


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="'speach' has no demo; did you mean 'speech'"):
        demo("speach", tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not empty"):
        demo("audio", tmp_path)
    assert not list(tmp_path.glob("out*"))
