"""The demo of typed names: pictures are split as it says, it runs to its report, and claims what intervals allow."""

import csv
import io
import json
import shlex
import tarfile
from collections import defaultdict
from dataclasses import replace

import PIL.Image
import pytest

from tasks.demo import PRETRAINED, demos, run_demo, unpack
from tasks.demo_image_text import AMONG, FIRST, GUESSING, NEAREST, PIXELS, finding, typed
from tasks.metrics import Score

DEMO = demos()["image-text"]
KNOWN, NEW, BOTH = (one.what for one in DEMO.exam.pictures)
TINY = {
    **{
        f"towers.{name}.model.backbone.{key}": n for name in ("image", "text") for key, n in (("dim", 16), ("depth", 1))
    },
    "towers.text.model.tokenizer.vocab_size": 520,
    "towers.text.signal.context": 64,  # so few tokens are bytes: nothing is cut off, or names would read alike
    "objective.dim": 8,
    "train.epochs": None,
    "train.steps": 2,
    "train.batch_size": 4,
    "data.workers": 0,
}
EACH = 6
"""Files of each split: more than five names, or there is no accuracy among five."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    unpack(DEMO.archive, folder)
    return folder


@pytest.fixture(scope="module")
def rows(data):
    """The rows of the manifest by split."""
    found = defaultdict(list)
    with (data / "manifest.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found[row["split"]].append(row)
    return found


def test_pictures_are_whole_and_split_as_the_readme_says(data, rows):
    counts = {split: (len(some), {row["source"] for row in some}) for split, some in rows.items()}
    assert counts == {
        "train": (1312, {"google"}),
        "test": (172, {"twitter"}),
        "test-new": (172, {"google"}),
        "test-new-redrawn": (172, {"twitter"}),
    }
    for some in rows.values():
        for row in some:
            with PIL.Image.open(data / row["path"]) as image:
                assert (image.size, image.format) == ((64, 64), "WEBP")


def test_new_things_are_new_and_known_things_known_by_name_and_by_concept(rows):
    for column in ("caption", "concept"):
        train, known, new, redrawn = ({row[column] for row in rows[split]} for split in rows)
        assert known < train
        assert new == redrawn
        assert not new & train
        assert len(train) == 1312
        assert len(new) == len(known) == 172


@pytest.fixture(scope="module")
def ran(data, rows, tmp_path_factory):
    """The demo on few files with few weights: its result, and the rows that it had."""
    folder = tmp_path_factory.mktemp("ran")
    known = rows["test"][:EACH]
    names = {row["caption"] for row in known}
    few = [row for row in rows["train"] if row["caption"] in names] + rows["train"][-2:] + known
    few += [row for split in ("test-new", "test-new-redrawn") for row in rows[split][:EACH]]
    page = io.StringIO()
    writer = csv.DictWriter(page, few[0])
    writer.writeheader()
    writer.writerows(few)
    (folder / "manifest.csv").write_text(page.getvalue())
    with tarfile.open(folder / "few.tar", "w") as archive:
        archive.add(folder / "manifest.csv", "manifest.csv")
        for row in few:
            archive.add(data / row["path"], row["path"])
    small = replace(DEMO, archive=folder / "few.tar", pretraining={**DEMO.pretraining, **TINY})
    return run_demo(small, folder / "out")


def test_the_table_has_names_guesses_and_what_needs_pictures(ran):
    found = {row: list(scores) for row, scores in ran.rows.items()}
    everywhere = [KNOWN, NEW, BOTH]
    assert found == {
        (FIRST, PRETRAINED): everywhere,
        (FIRST, GUESSING): everywhere,
        (AMONG, PRETRAINED): everywhere,
        (AMONG, GUESSING): everywhere,
        (NEAREST, PRETRAINED): [KNOWN],
        (NEAREST, PIXELS): [KNOWN],
    }
    assert ran.rows[FIRST, GUESSING][NEW] == Score(1 / EACH, 1 / EACH, 1 / EACH)
    assert ran.rows[AMONG, GUESSING][NEW].value == 5 / EACH


def test_json_and_report_have_it_all_and_the_names_agree_with_retrieval(ran):
    stored = json.loads((ran.out / "demo.json").read_text())
    assert len(stored["table"]) == len(ran.rows)
    assert {*stored["retrieval"]} == {KNOWN, NEW, BOTH}
    for what, ways in stored["retrieval"].items():
        # Each has one name, and all names are typed: to name a picture is to find its name.
        assert ways["image_to_text"]["recall@1"]["value"] == ran.rows[FIRST, PRETRAINED][what].value
        assert {*ways["text_to_image"]} == {"recall@1", "recall@5", "recall@10"}
    page = (ran.out / "report.html").read_text()
    for words in ("Retrieval", "Accuracy both ways", "Type this next", "image to text, among 6", KNOWN, BOTH):
        assert words in page
    assert (ran.out / "gallery.png").stat().st_size > 5000
    assert ran.findings.title in page


def test_what_is_to_be_typed_next_works(ran, ask):
    words = shlex.split(ran.findings.next)
    code, out, _ = ask(*words[1:], "--json")
    assert (words[0], code) == ("mmssl", 0)
    (answer,) = json.loads(out)["files"]
    assert len(answer["predictions"]) == len(words[-1].split(","))


def test_typed_names_hold_no_comma_and_the_file_is_one_of_them(tmp_path, make_listing):
    listing = make_listing(["a, b", "cat", "a name of words", "dog", "moon", "sun", "red car", "tree"])
    words = shlex.split(typed(tmp_path, listing))
    assert words[-1] == "cat,dog,moon,sun,red car"
    assert words[3] == listing.paths[1]


@pytest.fixture
def make_listing(tmp_path):
    from mmssl.data.listing import Listing

    def make(names):
        return Listing(tmp_path, [str(tmp_path / f"{i}.webp") for i in range(len(names))], {"caption": names})

    return make


def test_the_finding_is_only_as_good_as_the_intervals():
    def title(known, new, pixels):
        rows = {(FIRST, PRETRAINED): {"a": known, "b": new}, (NEAREST, PIXELS): {"a": pixels}}
        guess = Score(0.01, 0.01, 0.01)
        return finding(["a", "b"], {**rows, (FIRST, GUESSING): {"a": guess, "b": guess}})

    none, low, high = Score(0.02, 0.0, 0.04), Score(0.3, 0.25, 0.35), Score(0.6, 0.55, 0.65)
    assert title(high, low, low) == "Named right: 60% of a, 30% of b; by guessing 1.0%; by raw pixels 30% of a, fewer"
    assert title(low, none, high) == "Named right: 30% of a; by guessing 1.0%; by raw pixels 60% of a, more"
    assert title(low, low, low).endswith("by raw pixels 30% of a, no clear difference")
    assert title(none, none, low).startswith("Named no better than by guessing 1.0%; by raw pixels 30% of a, more")
