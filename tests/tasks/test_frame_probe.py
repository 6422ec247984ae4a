"""Labels of stretches of time, and the probe of frames: timing, drawing, intervals over files, mistakes."""

import io
import json

import numpy as np
import pytest
import torch
from media import write_sound
from rich.console import Console
from sound_encoders import RATE, recurrent, transformer

import tasks.frame_probe
from mmssl.data.listing import list_files
from mmssl.errors import UnusableData, UserError
from modalities.encoder import MODALITIES
from tasks.frame_probe import frame_probe
from tasks.frames import SoundFrames
from tasks.linear_probe import GRID, choose
from tasks.metrics import classification_scores, rank_scores, target_rank
from tasks.segment_labels import read_segments

AUDIO = MODALITIES["audio"]
LEVELS = {"ah": 0.1, "eh": 0.3, "oh": 0.6}


class Levels:
    """Stands in for an encoder: the mean of every 80 samples, 10 ms. Knows a phone of constant level by its frame."""

    seconds_per_step = 0.01

    def __init__(self, late=0):
        self.decode, self.late = AUDIO.decode, late

    def transform(self, sound):
        return sound.waveform[: len(sound.waveform) // 80 * 80].unsqueeze(0)

    def frames(self, signal):
        means = signal.view(-1, 80).mean(1, keepdim=True)
        means = torch.cat([means[:1].expand(self.late, 1), means])[: len(means)]
        return torch.cat([means, means.square()], 1)

    def fingerprint(self):
        return "levels"


@pytest.fixture
def spoken(tmp_path):
    """A manifest of 12 files of 6 phones, each of one level and 3 to 8 frames, and the times of the phones."""
    rng, files, phones = np.random.default_rng(0), ["path,split"], ["path,start,end,phone"]
    (tmp_path / "audio").mkdir()
    for i in range(12):
        name, samples, at = f"audio/{i:02d}.wav", [], 0
        files.append(f"{name},{'test' if i >= 8 else 'train'}")
        for phone in rng.permutation([*LEVELS] * 2):
            long = int(rng.integers(3, 9))
            phones.append(f"{name},{at / 100:.2f},{(at + long) / 100:.2f},{phone}")
            samples.append(np.full(80 * long, LEVELS[phone]))
            at += long
        write_sound(tmp_path / name, np.concatenate(samples).astype(np.float32), RATE, "FLOAT")
    (tmp_path / "manifest.csv").write_text("\n".join(files) + "\n")
    (tmp_path / "phones.csv").write_text("\n".join(phones) + "\n")
    return tmp_path


def halves(folder):
    return [list_files(folder, AUDIO, split=split) for split in ("train", "test")]


def probe(folder, extractor=None, **options):
    labels = read_segments(folder / "phones.csv", AUDIO)
    return frame_probe(extractor or Levels(), *halves(folder), labels, **options)


@pytest.fixture
def write(tmp_path):
    """Write rows under path,start,end,phone and return the table's path."""

    def make(*rows, header="path,start,end,phone", name="phones.csv"):
        (tmp_path / name).write_text("\n".join([header, *rows]) + "\n")
        return tmp_path / name

    return make


def test_a_frame_belongs_to_the_segment_that_holds_its_middle(write, tmp_path):
    """Starts are included, ends are not, and the rows may be in any order."""
    table = write("a.wav,0.02,0.035,b", "a.wav,0,0.02,a", "a.wav,0.055,0.08,a", "a.wav,0.045,0.046,c")
    labels = read_segments(table, AUDIO)
    found = labels.of_frames(str(tmp_path / "a.wav"), 9, 0.01, ["a", "b", "c"])
    assert found.tolist() == [0, 0, 1, -1, 2, 0, 0, 0, -1]
    assert labels.column == "phone"


def test_middles_meet_boundaries_written_as_decimals(write, tmp_path):
    rows = [f"a.wav,{i / 100 + 0.005:.3f},{i / 100 + 0.015:.3f},{'ab'[i % 2]}" for i in range(3000)]
    labels = read_segments(write(*rows), AUDIO)
    for start in ("0", "0.1", "1.1"):
        found = labels.of_frames(f"{tmp_path}/a.wav#t={start}", 2000, 0.01, ["a", "b"])
        first = round(100 * float(start)) % 2
        assert found.tolist() == [first, 1 - first] * 1000


def test_pieces_and_links_lead_to_the_segments_of_their_file(write, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.wav").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    labels = read_segments(write("link/a.wav,0,0.1,a", "real/a.wav,0.1,0.2,b"), AUDIO)
    found = labels.of_frames(str(tmp_path / "real" / "a.wav#t=0.08,0.13"), 5, 0.01, ["a", "b"])
    assert found.tolist() == [0, 0, 1, 1, 1]


def test_the_label_is_the_only_other_column_or_the_one_named(write):
    table = write("a.wav,0,1,x,y", header="path,start,end,phone,word")
    assert read_segments(table, AUDIO, "word").column == "word"
    with pytest.raises(UserError, match=r"name it with --label-column \(one of phone, word\)"):
        read_segments(table, AUDIO)
    with pytest.raises(UserError, match=r"phones\.csv has no 'phon' column; did you mean 'phone'"):
        read_segments(table, AUDIO, "phon")
    with pytest.raises(UserError, match="no other column than path, start and end"):
        read_segments(write("a.wav,0,1", header="path,start,end"), AUDIO)


@pytest.mark.parametrize(
    ("header", "rows", "words"),
    [
        ("path,start,end,phone", ["a.wav,0,1,a", "a.wav,0.5,0.5,b"], "row 2 starts at '0.5' and ends at '0.5'"),
        ("path,start,end,phone", ["a.wav,0,1,a", "a.wav,one,2,b"], "row 2 starts at 'one'"),
        ("path,start,end,phone", ["a.wav,1,2,a", "b.wav,1,2,a", "a.wav,0,1.01,b"], "rows 1 and 3 overlap in time"),
        ("path,start,end,phone", ["a.wav,0,1,a", "a.wav,1,2,"], r"row 2 \(a\.wav#t=1,2\) has no phone"),
        ("path,start,end,phone", ["a.wav,0,1,a", "a.wav,1,,b"], "row 2 has no end"),
        ("path,start,ends,phone", ["a.wav,0,1,a"], "has no 'end' column; rename 'ends' to 'end'"),
        ("path,start,stop,phone", ["a.wav,0,1,a"], "has no 'end' column; a table of labels has path, start, end and"),
        ("file,start,end,phone", ["a.wav,0,1,a"], "has no 'path' column"),
        ("path,start,end,phone", [], "lists no file"),
    ],
)
def test_tables_that_are_none(write, header, rows, words):
    with pytest.raises(UserError, match=words) as caught:
        read_segments(write(*rows, header=header), AUDIO)
    assert "phones.csv" in str(caught.value)


def test_what_is_no_table_is_refused(tmp_path):
    with pytest.raises(UserError, match="a table of path, start, end and label"):
        read_segments(tmp_path, AUDIO)
    with pytest.raises(UserError, match="does not exist"):
        read_segments(tmp_path / "no.csv", AUDIO)


def test_frames_that_say_their_phone_score_one_and_a_step_late_less(spoken):
    assert probe(spoken).scores["top1"].value == 1.0
    assert probe(spoken, Levels(late=1)).scores["top1"].value < 0.95


def test_result_says_what_was_measured(spoken):
    lines = (spoken / "phones.csv").read_text().splitlines()
    (spoken / "phones.csv").write_text("\n".join([*lines[:2], *lines[3:]]) + "\n")  # a gap in the first file
    (start, end) = map(float, lines[2].split(",")[1:3])
    train, test = halves(spoken)
    counts = [sum(len(AUDIO.decode(path).waveform) for path in half.paths) // 80 for half in (train, test)]
    result = probe(spoken, seed=3)
    report = json.loads(json.dumps(result.as_dict()))
    gap = round(100 * (end - start))
    assert report["train"] == report["frames"]["train_available"] == counts[0] - gap
    assert report["test"] == counts[1]
    expected = {"label_column": "phone", "seconds_per_frame": 0.01, "train_files": 8, "test_files": 4,
                "train_unlabelled": gap, "test_unlabelled": 0}  # fmt: skip
    assert report["frames"].items() >= expected.items()
    assert report["classes"] == ["ah", "eh", "oh"]
    assert report["task"] == "linear-probe"
    assert report["protocol"].items() >= {"name": "logistic", "hold_out_by": "file", "seed": 3}.items()
    assert set(report["scores"]) == {"top1", "mean_per_class"}
    assert 0.25 < report["commonest_class"] < 0.5
    screen = io.StringIO()
    result.render(Console(file=screen, width=200))
    assert "95 % bootstrap intervals over test files" in screen.getvalue()
    assert f"{counts[0] - gap} training frames of 8 files and all {counts[1]} test frames of 4" in screen.getvalue()
    assert f"{gap} training and 0 test frames in no segment left out" in screen.getvalue()


def test_many_frames_are_drawn_by_lot_and_always_the_same(spoken, monkeypatch):
    draws = []

    def remember(vectors, targets, *rest):
        draws.append((vectors, targets))
        return choose(vectors, targets, *rest)

    monkeypatch.setattr(tasks.frame_probe, "choose", remember)
    first, again, _, whole = (
        probe(spoken, max_frames=most, seed=seed) for most, seed in ((40, 0), (40, 0), (40, 1), (10**6, 0))
    )
    assert first.as_dict() == again.as_dict()
    assert first.probe.samples.train == 40
    assert first.available == whole.available == whole.probe.samples.train > 200
    assert first.probe.samples.test == whole.probe.samples.test
    screen = io.StringIO()
    first.render(Console(file=screen, width=200))
    assert f"40 of {whole.available} training frames" in screen.getvalue()
    assert not torch.equal(draws[0][1], draws[2][1])
    # Pruning on the way, and a larger share, draw the same lots: the few are among the many.
    more = probe(spoken, max_frames=80)
    assert more.probe.samples.train == 80
    few, many = ({(*row, int(target)) for row, target in zip(v.tolist(), t, strict=True)} for v, t in
                 (draws[0], draws[-1]))  # fmt: skip
    assert few <= many


def test_the_regularisation_is_chosen_on_few_and_all_are_fitted(spoken, monkeypatch):
    monkeypatch.setattr(tasks.frame_probe, "CHOOSE_ON", 50)
    result = probe(spoken)
    assert result.chosen_on == 50
    assert 0 < result.probe.choice.hold_out < 25
    assert result.probe.samples.train == result.available
    assert result.scores["top1"].value == 1.0


def test_intervals_are_over_files(spoken, monkeypatch):
    seen = []
    monkeypatch.setattr(tasks.frame_probe, "rank_scores", lambda *args: seen.append(args) or rank_scores(*args))
    probe(spoken)
    ((_, targets, classes, groups, _),) = seen
    lengths = [len(AUDIO.decode(path).waveform) // 80 for path in halves(spoken)[1].paths]
    assert groups.bincount().tolist() == lengths
    assert (len(targets), classes) == (sum(lengths), 3)


def test_pieces_of_one_file_count_as_one(spoken):
    rows = ["path,split,start,end", *(f"audio/{i:02d}.wav,train,0,0.1\naudio/{i:02d}.wav,train,0.1," for i in range(8))]
    rows += [f"audio/{i:02d}.wav,test,," for i in range(8, 12)]
    before = probe(spoken).as_dict()
    (spoken / "manifest.csv").write_text("\n".join(rows) + "\n")
    after = probe(spoken).as_dict()
    assert len(halves(spoken)[0]) == 16
    assert after["frames"] == before["frames"]
    assert after["scores"] == before["scores"]


def test_mistakes_are_found_before_anything_is_decoded(spoken):
    train, test = halves(spoken)
    labels = read_segments(spoken / "phones.csv", AUDIO)
    extractor = Levels()
    extractor.decode = None
    lines = (spoken / "phones.csv").read_text().splitlines()

    def asked(rows, **options):
        (spoken / "other.csv").write_text("\n".join(rows) + "\n")
        frame_probe(extractor, train, test, read_segments(spoken / "other.csv", AUDIO), **options)

    with pytest.raises(UserError, match=r"other\.csv: audio/00\.wav and 1 more files have no segment"):
        asked([line for line in lines if "00.wav" not in line and "01.wav" not in line])
    strange = [line + "?" if line[6:8] in ("08", "09", "10", "11") else line for line in lines]
    with pytest.raises(UserError, match=r"other\.csv: no training frame has a label that a frame of .* has"):
        asked(strange)
    with pytest.raises(UserError, match="--max-frames 2: a linear probe needs at least 3"):
        asked(lines, max_frames=2)
    with pytest.raises(UserError, match="in both the training and the test set"):
        frame_probe(extractor, train, train, labels)


def test_frames_of_labels_that_were_not_trained_are_left_out_and_counted(spoken):
    """One is in no training file, the other in a segment of one that is too short to hold the middle of a frame."""
    lines = (spoken / "phones.csv").read_text().splitlines()
    whole = probe(spoken)
    rows = [i for i, line in enumerate(lines) if "08.wav" in line]
    frames = 0
    for row, label in ((rows[0], "aw"), (rows[1], "aw"), (rows[2], "uh")):
        path, start, end, _ = lines[row].split(",")
        lines[row] = f"{path},{start},{end},{label}"
        frames += round(100 * (float(end) - float(start)))
    last = round(100 * (float(end) - float(start)))
    lines.append("audio/00.wav,9,9.001,uh")
    (spoken / "phones.csv").write_text("\n".join(lines) + "\n")
    result = probe(spoken)
    assert result.probe.samples.test == whole.probe.samples.test - frames
    assert result.scores["top1"].value == 1.0
    assert result.as_dict()["frames"]["test_without_training"] == {"aw": frames - last, "uh": last}
    said = f"{frames} test frames of 2 classes without training frames left out: aw, uh"
    assert result.as_dict()["notes"] == [said]
    screen = io.StringIO()
    result.render(Console(file=screen, width=200))
    assert said in screen.getvalue()
    assert "all" not in screen.getvalue().partition("test frames of")[0].rpartition("training frames of")[2]


def test_classes_of_which_no_frame_was_drawn_are_said(spoken):
    lines = (spoken / "phones.csv").read_text().splitlines()
    rows = [next(i for i, line in enumerate(lines) if name in line) for name in ("00.wav", "08.wav")]
    for row in rows:
        lines[row] = f"{lines[row].rpartition(',')[0]},rare"
    (spoken / "phones.csv").write_text("\n".join(lines) + "\n")
    seed, result = next((s, r) for s in range(9) if "rare" in (r := probe(spoken, max_frames=12, seed=s)).not_drawn)
    assert result.as_dict()["frames"]["classes_not_drawn"] == result.not_drawn
    assert f"{len(result.not_drawn)} of 4 classes have training frames of which none was drawn" in result.probe.notes[0]
    whole = probe(spoken, seed=seed)
    assert whole.not_drawn == []
    assert result.probe.samples.test == whole.probe.samples.test
    assert result.scores["top1"].value < 1.0


def test_labels_that_leave_nothing_to_learn(spoken):
    lines = (spoken / "phones.csv").read_text().splitlines()
    (spoken / "phones.csv").write_text("\n".join([lines[0], *(f"audio/{i:02d}.wav,9,10,ah" for i in range(12))]))
    with pytest.raises(UserError, match=r"no frame of .* lies in any of its segments"):
        probe(spoken)
    (spoken / "phones.csv").write_text("\n".join([lines[0], *(f"audio/{i:02d}.wav,0,10,ah" for i in range(12))]))
    with pytest.raises(UserError, match="labelled training frames and 2 classes"):
        probe(spoken)


def test_broken_files_are_errors_or_left_out_and_said(spoken):
    (spoken / "audio" / "03.wav").write_bytes(b"")
    (spoken / "audio" / "09.wav").write_bytes(b"")
    with pytest.raises(UnusableData, match=r"03\.wav: empty file"):
        probe(spoken)
    result = probe(spoken, skip_broken=True)
    assert [file["path"] for file in result.as_dict()["skipped"]] == ["audio/03.wav", "audio/09.wav"]
    assert (result.train_files, result.test_files) == (7, 3)


def test_on_the_command_line(ask, spoken, tmp_path):
    recurrent().save(tmp_path / "encoder")
    base = ["linear-probe", tmp_path / "encoder", "--train", spoken, "--test", spoken]
    words = [*base, "--frames", spoken / "phones.csv"]
    code, out, _ = ask(*words, "--json", "--max-frames", "100", "--out", tmp_path / "out")
    assert code == 0
    result = json.loads(out)
    assert json.loads((tmp_path / "out" / "linear-probe.json").read_text()) == result
    assert result["train"] == 100
    assert result["scores"]["top1"]["value"] > result["commonest_class"]
    for wrong, said in {
        ("--protocol", "mae"): "leave out --protocol mae",
        ("--per-layer",): "leave out --per-layer",
        ("optim.lr=1",): "leave out optim.lr",
        ("--no-batch-norm",): "leave out objective.head.batch_norm",
        ("--label-column", "fone"): "no 'fone' column; did you mean 'phone'",
    }.items():
        code, _, err = ask(*words, *wrong)
        assert code == 2
        assert said in err
    code, _, err = ask(*base, "--frames", "phones.csv")
    assert code == 2
    assert f"phones.csv does not exist; did you mean '{spoken / 'phones.csv'}'?" in err
    assert ask(*words, "--max-frames", "2")[0] == 2
    code, _, err = ask(*base, "--max-frames", "10")
    assert code == 2
    assert "--max-frames is for --frames" in err


def test_encoders_of_whole_sounds_are_probed_too(spoken):
    result = probe(spoken, SoundFrames(transformer()))
    assert result.seconds_per_frame == pytest.approx(0.08)
    assert result.test_files == 4


@pytest.fixture
def alike():
    """Scores of 2000 frames in 20 files of very different size; in a file nearly all are right, or nearly none."""
    rng = np.random.default_rng(0)
    group = np.sort(rng.choice(20, 2000, p=np.arange(1, 21) / 210))
    target = rng.choice(7, 2000)
    right = rng.random(2000) < np.where(group % 2, 0.9, 0.2)
    scores = rng.normal(size=(2000, 7)) + 5 * np.eye(7)[np.where(right, target, (target + 1) % 7)]
    return torch.from_numpy(scores), torch.from_numpy(target), torch.from_numpy(group)


def test_intervals_over_files_equal_those_of_resampled_files_and_are_wider(alike):
    scores, target, group = alike
    rank = target_rank(scores, target)
    by_file = rank_scores(rank, target, 7, group, resamples=4000)
    by_frame = classification_scores(scores, target, resamples=4000)
    rng, drawn = np.random.default_rng(1), {"top1": [], "top5": [], "mean_per_class": []}
    truth, ranks, where = target.numpy(), rank.numpy(), [np.flatnonzero(group == g) for g in range(20)]
    for _ in range(3000):
        rows = np.concatenate([where[g] for g in rng.integers(0, 20, 20)])
        hit = ranks[rows] < 1
        drawn["top1"].append(hit.mean())
        drawn["top5"].append((ranks[rows] < 5).mean())
        drawn["mean_per_class"].append(np.mean([hit[truth[rows] == c].mean() for c in np.unique(truth[rows])]))
    for name, values in drawn.items():
        low, high = np.quantile(values, [0.025, 0.975])
        assert by_file[name].value == by_frame[name].value
        assert by_file[name].low == pytest.approx(low, abs=0.015), name
        assert by_file[name].high == pytest.approx(high, abs=0.015), name
    assert by_file["top1"].high - by_file["top1"].low > 3 * (by_frame["top1"].high - by_frame["top1"].low)


def test_files_of_one_frame_have_the_intervals_of_frames(alike):
    scores, target, _ = alike
    rank = target_rank(scores, target)
    alone = rank_scores(rank, target, 7, torch.randperm(2000), resamples=4000)["top1"]
    plain = rank_scores(rank, target, 7, resamples=4000)["top1"]
    assert alone == pytest.approx(plain, abs=0.004)
    assert plain == classification_scores(scores, target, resamples=4000)["top1"]


def test_whole_groups_are_held_out():
    """Vectors that give away their group: no group is both fitted and held out, so nothing is to be known."""
    groups = torch.arange(10).repeat_interleave(12)
    targets = torch.arange(10)[groups] % 2
    shuffled = torch.randperm(10)[groups]
    vectors = torch.eye(10)[shuffled]
    assert max(choose(vectors, targets).accuracy.values()) == 1.0
    choice = choose(vectors, targets, groups=groups)
    assert choice.hold_out == 24
    assert not choice.stratified
    assert set(choice.accuracy.values()) <= {0.0, 0.5, 1.0}
    assert len({tuple(choose(vectors, targets, s, groups).accuracy.values()) for s in range(8)}) > 1
    assert choose(vectors, targets, groups=torch.zeros(120)).stratified


def test_weaker_regularisation_is_left_out_once_it_only_gets_worse():
    rng = np.random.default_rng(0)
    targets = torch.arange(200) % 2
    vectors = torch.from_numpy(rng.normal(size=(200, 120))).float()
    vectors[:, 0] += 1.5 * targets
    whole, short = choose(vectors, targets), choose(vectors, targets, patience=2)
    tried = [c for c in GRID if c in short.accuracy]
    assert tried == list(GRID[: len(tried)])
    assert len(tried) < len(GRID) == len(whole.accuracy)
    assert short.accuracy.items() <= whole.accuracy.items()
    worst = [short.accuracy[c] < max(short.accuracy.values()) for c in tried]
    assert worst[-2:] == [True, True]
    assert short.c == max(tried, key=lambda c: (short.accuracy[c], -c))
