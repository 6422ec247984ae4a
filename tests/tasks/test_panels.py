"""The panels of `mmssl show` by themselves: the map of vectors, and where things stand on a page."""

from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_hex, to_rgb

from mmssl.errors import UnusableData, UserError
from mmssl.files import legible
from tasks.panels import Block, Line, Panel, Shot
from tasks.panels_page import CAPTION, draw, fit, shorten, wrap
from tasks.panels_tsne import read_vectors, tsne_panel

# t-SNE


def test_tsne_is_reproducible_and_says_what_it_shows(vectors, tmp_path):
    panel, facts = tsne_panel(vectors, "label", 5000, 0)
    assert np.array_equal(draw(tsne_panel(vectors, "label", 5000, 0)[0]), draw(panel))
    assert facts == {"vectors": 40, "shown": 40, "perplexity": 13.0, "color_by": "label", "seed": 0}
    assert panel.note.startswith("40 vectors, coloured by label")
    fewer, facts = tsne_panel(vectors, "split", 20, 3)
    assert (facts["vectors"], facts["shown"]) == (40, 20)
    assert fewer.note.startswith("20 of 40 vectors, drawn by lot with seed 3, coloured by split")
    drawn = [read_vectors(vectors, "label", 20, seed)[0] for seed in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_tsne_says_what_a_point_is_and_when_it_takes_long(vectors, tmp_path, monkeypatch, capsys):
    table = pq.read_table(vectors)
    moments = tmp_path / "moments.parquet"
    pq.write_table(table.append_column("start", pa.array(np.arange(40.0))).slice(0, 36), moments)
    panels = [tsne_panel(path, "label", 5000, 0)[0] for path in (vectors, moments)]
    captions = [panel.blocks[0].lines[0].shots[0].caption for panel in panels]
    assert captions == ["one point per file, coloured by label", "one point per row, coloured by label"]
    assert "perplexity 11.7," in panels[1].note
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("tasks.panels_tsne.MANY", 39)
    tsne_panel(vectors, "label", 5000, 0)
    assert capsys.readouterr().err == "t-SNE of 40 vectors takes about a minute; --most draws fewer\n"


def test_vectors_of_any_row_groups_are_the_same(vectors, tmp_path):
    pq.write_table(pq.read_table(vectors), tmp_path / "parts.parquet", row_group_size=7)
    for most in (5, 20, 40):
        (whole, groups, _), (parts, same, _) = (
            read_vectors(path, "label", most, 0) for path in (vectors, tmp_path / "parts.parquet")
        )
        assert np.array_equal(whole, parts)
        assert groups == same
        chosen = np.sort(np.random.default_rng(0).choice(40, most, replace=False)) if most < 40 else np.arange(40)
        assert np.array_equal(whole, np.stack(pq.read_table(vectors)["vector"].to_numpy())[chosen])


def test_groups_are_told_apart_by_colour_then_by_shape_and_the_rest_share_a_grey():
    from tasks.panels_tsne import HUES, OTHERS, UNLABELLED, _legend

    groups = [f"class {i:02d}" for i in range(42) for _ in range(42 - i)] + [None]
    legend = _legend(groups)
    assert len({(entry.colour, entry.marker) for entry in legend.values()}) == 30 + 2
    assert {legend[f"class {i:02d}"][1:] for i in range(10)} == {(hue, "o") for hue in HUES}
    assert {legend[f"class {i:02d}"][1:] for i in range(10, 20)} == {(hue, "^") for hue in HUES}
    assert legend["class 29"] != legend["class 30"] == legend["class 41"] == ("12 more  78", OTHERS, "o")
    assert legend[None] == ("none  1", UNLABELLED, "o")


def test_points_have_their_groups_colour_and_shape():
    from tasks.panels_tsne import _legend, _scatter

    groups = [f"{i:02d}" for i in range(12)]
    (points,) = _scatter(np.random.default_rng(0).normal(size=(12, 2)), groups).axes[0].collections
    legend = _legend(groups)
    assert [to_hex(colour) for colour in points.get_facecolors()] == [legend[group].colour for group in groups]
    corners = [len(path.vertices) for path in points.get_paths()]
    assert len(corners) == 12
    assert set(corners[10:]) == {4}  # triangles, closed
    assert min(corners[:10]) > 8


def test_hues_are_far_apart():
    """In Oklab (Ottosson, 2020), twice as far as in the pairs of light and dark hues of a palette of 20."""
    from tasks.panels_tsne import HUES, OTHERS, UNLABELLED

    colours = [oklab(to_rgb(hue)) for hue in (*HUES, OTHERS, UNLABELLED)]
    apart = [np.linalg.norm(a - b) for a, b in combinations(colours, 2)][:-1]  # the two greys may be near each other
    assert min(apart) > 0.14
    pair = [oklab(colormaps["tab20"](i)[:3]) for i in (18, 19)]
    assert np.linalg.norm(pair[0] - pair[1]) < 0.14


def oklab(rgb):
    values = np.array(rgb)
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    to_lms = [[0.4122215, 0.5363325, 0.0514460], [0.2119035, 0.6806995, 0.1073970], [0.0883025, 0.2817188, 0.6299787]]
    to_lab = [
        [0.2104543, 0.7936178, -0.0040720],
        [1.9779985, -2.4285922, 0.4505937],
        [0.0259040, 0.7827718, -0.8086758],
    ]
    return np.array(to_lab) @ np.cbrt(np.array(to_lms) @ linear)


def test_vectors_that_cannot_be_shown(tmp_path, write_vectors):
    with pytest.raises(UnusableData, match="row 6 is NaN"):
        tsne_panel(write_vectors(tmp_path / "a.parquet", ["x"] * 8, spoil=5), "label", 5000, 0)
    with pytest.raises(UserError, match="holds 3 vectors, and a map takes at least 4"):
        tsne_panel(write_vectors(tmp_path / "b.parquet", ["x"] * 3), "label", 5000, 0)
    pq.write_table(pa.table({"path": ["x"] * 5}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="holds no vectors; write it with mmssl embed"):
        tsne_panel(tmp_path / "c.parquet", "label", 5000, 0)


# The page


def test_pictures_stand_on_the_page_pixel_by_pixel():
    rng = np.random.default_rng(0)
    blocks = [
        Block(f"file {i}", [Line("label", [Shot("one\ntwo", p), Shot("one", p)])])
        for i, p in enumerate(rng.integers(0, 255, (5, 96, 80, 3), dtype=np.uint8))
    ]
    page = draw(Panel("Title", "A note. " * 60, blocks))
    assert page.dtype == np.uint8
    for block in blocks:
        expected = fit(block.lines[0].shots[0].picture, 192, 192)
        assert expected.shape == (192, 160, 3)
        where = np.argwhere((page[:-191, :-159] == expected[0, 0]).all(2))
        found = [(y, x) for y, x in where if np.array_equal(page[y : y + 192, x : x + 160], expected)]
        assert len(found) == 2
        assert found[1][1] - found[0][1] > 160


def test_many_pictures_in_a_row_shrink_to_the_width():
    shots = [Shot("a very long caption indeed, longer than the picture", np.zeros((64, 64, 3), np.uint8))] * 13
    page = draw(Panel("T", "", [Block("x", [Line("", shots)])] * 2))
    assert page.shape[1] <= 1800
    assert (page == 0).all(2).sum() >= 13 * 2 * 64 * 64


def test_fit_keeps_pixels_square_and_never_exceeds_the_side():
    picture = np.arange(10 * 4 * 3, dtype=np.uint8).reshape(10, 4, 3)
    assert np.array_equal(fit(picture, 25, 25)[::2, ::2], picture)
    assert fit(picture, 5, 5).shape == (5, 2, 3)
    assert fit(np.zeros((1000, 1, 3), np.uint8), 10, 10).shape == (10, 1, 3)


def test_text_stays_in_its_room():
    from tasks.panels_page import _ruler

    measure, long = _ruler(CAPTION), "a/rather/long/path/to/some/picture-0123456789.png"
    short = shorten(long, 120, CAPTION)
    assert measure(short) <= 120 < measure(long)
    assert short.startswith("a/r")
    assert short.endswith("9.png")
    lines = wrap("word " * 50, 200, CAPTION)
    assert all(measure(line) <= 200 for line in lines)
    assert " ".join(lines).split() == ["word"] * 50
    assert legible("a\udcffb\nc$x^2$") == "a\\udcffb\\nc$x^2$"
    draw(Panel("日本 $x", "\\alpha", [Block("$", [Line("", [Shot("_^", np.zeros((8, 8, 3), np.uint8))])])]))
