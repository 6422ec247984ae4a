"""Retrieval: ranks against a plain twin, ties, several captions of one picture, chance, and the gallery.

Planted bugs that fail here: ties in favour of the right one, other right candidates counted as wrong, rows of a later
block marked in the first, the same picture by two paths taken for two, frames around what is wrong.
"""

import json

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from towers import untrained, write_rows

from mmssl import JointEncoder, retrieve
from mmssl.data import inline
from mmssl.data.pairs import list_pairs
from mmssl.errors import UnusableData, UserError
from modalities.joint import joint_encoders
from tasks.panels_retrieval import FRAME, RIGHT, SIDE, gallery_panel, written
from tasks.retrieve import AT, Matches, Side, by_chance, direction, matches, ranks

WORDS = ["red", "a cat", "snow", "two dogs", "old tree", "bird", "cup of tea", "night"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("clip") / "run", "image", "text")


@pytest.fixture
def rows(photos):
    """Eight pictures with a caption each."""
    files = sorted((photos / "test").rglob("*.png"))
    return [{"path": str(file), "caption": word} for file, word in zip(files, WORDS, strict=True)]


def plain_ranks(queries, candidates, pairs):
    """Sort all candidates of each query, the wrong ones first where scores are equal."""
    found = []
    for i, query in enumerate(queries):
        right = {b for a, b in pairs.tolist() if a == i}
        order = sorted(range(len(candidates)), key=lambda j: (-float(query @ candidates[j]), j in right))
        found.append(next(place for place, j in enumerate(order) if j in right))
    # Other right ones before the first right one there are none, so a place is a number of wrong ones.
    return found


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_ranks_are_those_of_sorting_everything(chunk):
    rng = torch.Generator().manual_seed(0)
    # Whole numbers: many equal similarities, and products that are exact however they are cut.
    queries, candidates = (torch.randint(-1, 2, (n, 4), generator=rng).float() for n in (19, 23))
    pairs = torch.stack([torch.arange(19), torch.randint(0, 23, (19,), generator=rng)], dim=1)
    more = torch.stack([torch.randint(0, n, (30,), generator=rng) for n in (19, 23)], dim=1)
    pairs = torch.cat([pairs, more]).unique(dim=0)[torch.randperm(len(torch.cat([pairs, more]).unique(dim=0)))]
    expected = plain_ranks(queries, candidates, pairs)
    assert ranks(queries, candidates, pairs, chunk).tolist() == expected
    assert len(set(expected)) > 5


def test_an_encoder_that_has_collapsed_finds_nothing(run):
    vectors = F.normalize(torch.ones(40, 8), dim=1)
    tower = JointEncoder(run / "encoder-image")
    side = Side(tower, [str(i) for i in range(40)], vectors + 1e-8 * torch.randn(40, 8))
    found = direction(Matches(side, side, torch.arange(40)[:, None].expand(-1, 2)))
    assert found.recall["recall@10"].value == 0
    assert found.median_rank == 40


def test_a_perfect_encoder_finds_everything(run):
    vectors = F.normalize(torch.randn(40, 8), dim=1)
    side = Side(JointEncoder(run / "encoder-image"), [str(i) for i in range(40)], vectors)
    found = direction(Matches(side, side, torch.arange(40)[:, None].expand(-1, 2)))
    assert found.recall["recall@1"] == (1, 1, 1)
    assert found.median_rank == 1


def test_chance_is_what_random_orders_reach():
    right = torch.tensor([1, 1, 3, 5])
    rng = np.random.default_rng(0)
    for k in AT:
        hits = [rng.permutation(12)[:n].min() < k for n in right.tolist() for _ in range(5000)]
        assert by_chance(right, 12, k) == pytest.approx(np.mean(hits), abs=0.01)
    assert by_chance(right, 10, 10) == 1
    assert by_chance(torch.tensor([9]), 10, 5) == 1


def test_recall_is_that_of_the_vectors_both_ways(run, rows, tmp_path):
    result = retrieve(run, write_rows(tmp_path / "rows.csv", rows)).as_dict()
    images = JointEncoder(run / "encoder-image").embed([row["path"] for row in rows])
    texts = JointEncoder(run / "encoder-text").embed([inline.join(row["caption"]) for row in rows])
    table = images @ texts.T
    for name, scores in (("image_to_text", table), ("text_to_image", table.T)):
        rank = (scores > scores.diagonal()[:, None]).sum(1)
        assert set(result[name]) == {"recall@1", "recall@5", "recall@10"}
        for k in AT:
            score = result[name][f"recall@{k}"]
            assert score["value"] == pytest.approx(float((rank < k).float().mean()))
            assert score["low"] <= score["value"] <= score["high"]
        assert result["median_rank"][name] == float(rank.double().quantile(0.5)) + 1
        assert result["chance"][name]["recall@1"] == pytest.approx(1 / 8)
        assert 0 < result[name]["recall@5"]["value"] < 1


def test_one_picture_by_two_paths_and_one_caption_of_two_pictures_are_one(run, rows, tmp_path):
    (tmp_path / "link.png").symlink_to(rows[0]["path"])
    more = [
        {"path": str(tmp_path / "link.png"), "caption": "another red"},
        {"path": rows[0]["path"], "caption": WORDS[0]},
        {"path": rows[1]["path"], "caption": WORDS[0]},
    ]
    towers = joint_encoders(run)
    kinds = [tower.encoder.kind for tower in towers.values()]
    listing = list_pairs(write_rows(tmp_path / "rows.csv", rows + more), kinds)
    match, skipped = matches(towers["image"], towers["text"], listing)
    assert skipped == []
    assert len(match.a.paths) == 8
    assert [inline.text(path) for path in match.b.paths] == [*WORDS, "another red"]
    assert sorted(map(tuple, match.pairs.tolist())) == sorted([*((i, i) for i in range(8)), (0, 8), (1, 0)])
    assert match.turned().pairs.tolist() == match.pairs.flip(1).tolist()


def test_texts_in_files_are_told_apart_by_what_they_say(run, rows, tmp_path):
    for i, row in enumerate(rows):
        (tmp_path / f"{i}.txt").write_text("the same" if i < 3 else row["caption"])
    named = [{"image_path": row["path"], "text_path": f"{i}.txt"} for i, row in enumerate(rows)]
    result = retrieve(run, write_rows(tmp_path / "rows.csv", named))
    assert result.directions["text_to_image"].queries == 6
    assert result.directions["text_to_image"].chance["recall@1"] == pytest.approx((5 + 3) / 8 / 6)


def test_a_broken_picture_is_an_error_or_left_out_with_its_caption(run, rows, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"words")
    rows[3]["path"] = str(tmp_path / "broken.png")
    data = write_rows(tmp_path / "rows.csv", rows)
    with pytest.raises(UnusableData, match=r"broken\.png"):
        retrieve(run, data)
    result = retrieve(run, data, skip_broken=True)
    assert result.as_dict()["skipped"][0]["path"].endswith("broken.png")
    assert result.directions["text_to_image"].queries == result.directions["text_to_image"].candidates == 7
    whole = retrieve(run, write_rows(tmp_path / "others.csv", rows[:3] + rows[4:]))
    assert whole.directions == result.directions


def test_of_several_modalities_the_centre_is_measured_with_each(rows, sounds, tmp_path):
    run = untrained(tmp_path / "run", "image", "text", "audio")
    tones = sorted(sounds.rglob("*.*"))[:8]
    named = [{"image_path": row["path"], "caption": "" if i == 7 else row["caption"], "audio_path": str(tone)}
             for i, (row, tone) in enumerate(zip(rows, tones, strict=True))]  # fmt: skip
    data = write_rows(tmp_path / "rows.csv", named)
    ways = retrieve(run, data).directions
    assert list(ways) == ["image_to_text", "text_to_image", "image_to_audio", "audio_to_image"]
    assert [way.queries for way in ways.values()] == [7, 7, 8, 8]
    assert list(retrieve(run, data, between=("audio", "image")).directions) == ["audio_to_image", "image_to_audio"]
    for wrong in (["image"], ["image", "image"], ["image", "txt"]):
        with pytest.raises(UserError, match=r"name two modalities|did you mean 'text'"):
            retrieve(run, data, between=wrong)


def test_two_of_three_modalities_are_measured_on_the_rows_that_have_both(rows, sounds, tmp_path):
    run = untrained(tmp_path / "run", "image", "text", "audio")
    tones = sorted(sounds.rglob("*.*"))[:8]
    named = [{"image_path": "" if i in (0, 1) else row["path"], "caption": "" if i == 7 else row["caption"],
              "audio_path": "" if i == 5 else str(tone)}
             for i, (row, tone) in enumerate(zip(rows, tones, strict=True))]  # fmt: skip
    data = write_rows(tmp_path / "rows.csv", [*named, {"image_path": "", "caption": "", "audio_path": ""}])
    found = retrieve(run, data, between=("text", "audio"))
    assert found.as_dict()["queries"] == found.as_dict()["rows"] == {"text_to_audio": 6, "audio_to_text": 6}
    assert all("the 6 of 9 rows that have both" in line for line in found.lines())
    found = retrieve(run, data)
    assert found.rows == {"image_to_text": 5, "text_to_image": 5, "image_to_audio": 5, "audio_to_image": 5}
    assert found.as_dict()["queries"] == found.rows
    pairs = write_rows(tmp_path / "two.csv", [{**row, "caption": ""} for row in named])
    with pytest.raises(UserError, match="no row has both text and audio"):
        retrieve(run, pairs, between=("text", "audio"))
    for i, row in enumerate(named[:3]):
        for name, key in (("txt", "caption"), ("wav", "audio_path")):
            (tmp_path / "d").mkdir(exist_ok=True)
            link = tmp_path / "d" / f"{i}.{name}"
            link.write_text(row[key]) if name == "txt" else link.symlink_to(row[key])
    assert retrieve(run, tmp_path / "d", between=("audio", "text")).rows["audio_to_text"] == 3


def test_of_two_towers_a_row_without_one_is_a_mistake(run, rows, tmp_path):
    with pytest.raises(UserError, match="row 2 has no text"):
        retrieve(run, write_rows(tmp_path / "rows.csv", [rows[0], {**rows[1], "caption": ""}]))


def test_texts_that_read_alike_are_one(rows, tmp_path):
    run = untrained(tmp_path / "run", "image", "words")
    long = " ".join(f"w{i}" for i in range(20))
    for i, words in enumerate(("Red", " red ", "RED", f"{long} up", f"{long} down")):
        rows[i]["caption"] = words
    named = [{"image_path": row["path"], "text_path": f"{i}.txt"} for i, row in enumerate(rows)]
    for i, row in enumerate(rows):
        (tmp_path / f"{i}.txt").write_text(f"{row['caption']}\n")
    for data in (rows, named):
        found = retrieve(run, write_rows(tmp_path / "rows.csv", data))
        assert found.directions["text_to_image"].queries == 8 - 2 - 1
        assert found.directions["text_to_image"].chance["recall@1"] == pytest.approx((3 + 2 + 3) / 8 / 5)


def test_the_gallery_frames_what_is_right_and_the_page_shows_it(run, rows, tmp_path):
    out = tmp_path / "out"
    result = retrieve(run, write_rows(tmp_path / "rows.csv", rows), out=out)
    assert json.loads((out / "retrieve.json").read_text()) == json.loads(json.dumps(result.as_dict()))
    with PIL.Image.open(out / "gallery.png") as page:
        assert page.size[0] > 6 * SIDE
    assert "text to image, among 8" in (out / "report.html").read_text()
    towers = joint_encoders(run)
    kinds = [tower.encoder.kind for tower in towers.values()]
    match, _ = matches(towers["image"], towers["text"], list_pairs(tmp_path / "rows.csv", kinds))
    (block,) = gallery_panel([match]).blocks
    best = (match.a.vectors @ match.b.vectors.T).argsort(dim=1, descending=True)[:, :5]
    marked = 0
    for line, query in zip(block.lines, (0, 2, 4, 5, 7), strict=True):
        own = written(WORDS[query])
        for shot, place in zip(line.shots[1:], best[query].tolist(), strict=True):
            right = place == query
            marked += right
            assert ("right" in shot.caption) == right
            assert (tuple(shot.picture[0, 0]) == RIGHT) == right
            assert np.array_equal(shot.picture[FRAME:-FRAME, FRAME:-FRAME], own) == right
    assert marked


@pytest.mark.parametrize(("name", "media"), [("audio", "sounds"), ("video", "clips")])
def test_sounds_and_videos_have_a_picture_in_the_gallery(name, media, request, tmp_path):
    run = untrained(tmp_path / "run", name, "text")
    files = sorted(path for path in request.getfixturevalue(media).rglob("*.*"))[:6]
    data = write_rows(
        tmp_path / "rows.csv", [{"path": str(p), "caption": w} for p, w in zip(files, WORDS, strict=False)]
    )
    retrieve(run, data, gallery=tmp_path / "new" / "gallery.png")
    with PIL.Image.open(tmp_path / "new" / "gallery.png") as page:
        assert np.asarray(page).std() > 10


def test_a_caption_of_any_length_fits_its_card():
    empty = written(" ")
    for text in ("word " * 400, "W" * 5000, "日本語" * 200, "$x_1$ {} \a"):
        card = written(text)
        assert card.shape == (SIDE, SIDE, 3)
        assert not np.array_equal(card, empty)
        edge = np.concatenate([card[:, -4:].ravel(), card[-2:].ravel(), card[:2].ravel(), card[:, :4].ravel()])
        assert (edge == 255).all(), "words are cut by the edge"
