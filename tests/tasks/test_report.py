"""The report page: well-formed, escaped, complete in itself, and true to the numbers that it draws."""

import base64
import io
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tasks.metrics import Score
from tasks.per_layer import PerLayerResult
from tasks.report import Code, Curve, Facts, Pictures, Strip, Table, Words, write_report
from tasks.report_curve import BUCKETS, _axis, _line, _thin

VOID = {"meta", "link", "img", "br", "hr"}
NAN = math.nan


class Page(HTMLParser):
    """Elements with their attributes and the visible text; refuses tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.elements if name == tag]

    def of_class(self, name: str) -> list[dict[str, str]]:
        return [attrs for _, attrs in self.elements if name in (attrs.get("class") or "").split()]


def page_of(tmp_path, *sections, title="A finding", subtitle="How it was found") -> Page:
    write_report(tmp_path / "report.html", title, subtitle, sections)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def picture(seed: int = 0, size: tuple[int, int] = (6, 5)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def one_of_each(text: str = "plain") -> list:
    return [
        Table(text, text, [text, text], [[text, Score(0.5, 0.4, 0.6)], [text, text]], highlight=[0]),
        Facts(text, {text: text}, text),
        Curve(text, text, text, {text: ([0, 1, 2], [3.0, 2.0, 1.0])}, text),
        Pictures(text, text, [text, text], [[picture(0), picture(1)]]),
        Strip(text, text, [[(text, picture(0)), (f"{text}\n{text}", picture(1))], [(text, picture(2))]]),
        Words(text, f"{text}\n\n{text}", text),
        Code(text, f"{text}\n{text}", text),
    ]


def numbers(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path)]


# The page as a whole


def test_page_has_landmarks_one_heading_and_names_for_everything(tmp_path):
    page = page_of(tmp_path, *one_of_each())
    for tag in ("h1", "header", "main", "footer", "title"):
        assert len(page.all(tag)) == 1, tag
    assert page.all("html")[0]["lang"] == "en"
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids)) == 7
    labels = [attrs["aria-labelledby"] for _, attrs in page.elements if "aria-labelledby" in attrs]
    assert len(page.all("section")) == 7
    assert set(labels) == set(ids)
    assert all(attrs["alt"] for attrs in page.all("img"))
    assert [attrs["scope"] for attrs in page.all("th")] == ["col", "col", "row", "row"]


def test_page_is_complete_in_itself(tmp_path):
    page = page_of(tmp_path, *one_of_each())
    links = [attrs[key] for _, attrs in page.elements for key in ("src", "href") if key in attrs]
    assert links
    assert all(link.startswith("data:") for link in links)
    assert not page.all("script")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "url(" not in html
    assert "@import" not in html


@pytest.mark.parametrize(
    "text",
    ["<script>alert(1)</script>", "a&b &amp; c", "\"'><img src=http://x.invalid/>", "$title ${body} $$ $", "日本 🙂"],
)
def test_text_is_shown_as_it_is_and_adds_no_element(tmp_path, text):
    plain = page_of(tmp_path, *one_of_each(), title="plain", subtitle="plain")
    page = page_of(tmp_path, *one_of_each(text), title=text, subtitle=text)
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    assert page.text.count(text) == plain.text.count("plain") > 20
    assert page.all("img")[0]["alt"] == f"{text}, example 1"


def test_file_name_that_is_not_unicode_can_be_written(tmp_path):
    assert "caf\\udce9.png" in page_of(tmp_path, Words("Files", "caf\udce9.png")).text


def test_failed_write_leaves_the_report_before_it_and_nothing_else(tmp_path, monkeypatch):
    page_of(tmp_path, title="the first")

    def full(self, target):
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="no space"):
        write_report(tmp_path / "report.html", "the second", "", [])
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert "the first" in (tmp_path / "report.html").read_text()


# Tables


def test_bar_stands_where_its_score_does(tmp_path):
    table = Table(
        "t", "", ["who", "top-1"], [["a", Score(0.25, 0.125, 0.5)], ["b", Score(1.0, 1.0, 1.0)]], highlight=[1]
    )
    page = page_of(tmp_path, table)
    first, second = (attrs["style"] for attrs in page.of_class("bar"))
    assert first == "--value: 25.00%; --low: 12.50%; --high: 50.00%"
    assert second == "--value: 100.00%; --low: 100.00%; --high: 100.00%"
    assert "25.0%" in page.text
    assert "12.5 to 50.0" in page.text
    assert [attrs.get("class") for attrs in page.all("tr")] == [None, None, "best"]


@pytest.mark.parametrize(
    ("score", "shown", "hidden"),
    [
        (Score(NAN, NAN, NAN), "not measured", "nan"),
        (Score(0.5, NAN, NAN), "50.0%", "nan"),
        (Score(3.25, 3.0, 3.5), "300.0 to 350.0", "Bars run"),
    ],
)
def test_score_without_a_place_between_0_and_1_has_no_bar(tmp_path, score, shown, hidden):
    page = page_of(tmp_path, Table("t", "", ["who", "top-1"], [["a", score]]))
    assert shown in page.text
    assert hidden not in page.text
    assert page.of_class("bar") == []


@pytest.mark.parametrize(
    "section",
    [
        Table("t", "", ["a", "b"], [["only one"]]),
        Pictures("p", "", ["a", "b"], [[picture()]]),
        Pictures("p", "", ["a"], [[picture().astype(np.float32)]]),
        Pictures("p", "", ["a"], [[picture()[..., 0]]]),
        Curve("c", "x", "y", {"s": ([1, 2], [1.0])}),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path, section):
    with pytest.raises(ValueError, match=r"row of|uint8|values"):
        write_report(tmp_path / "report.html", "", "", [section])
    assert list(tmp_path.iterdir()) == []


# Pictures


def test_pictures_survive_to_the_pixel_and_in_order(tmp_path):
    rows = [[picture(1), picture(2)], [picture(3, (200, 160)), picture(4, (200, 160))]]
    images = page_of(tmp_path, Pictures("p", "", ["input", "output"], rows)).all("img")
    for attrs, expected in zip(images, [*rows[0], *rows[1]], strict=True):
        data = base64.b64decode(attrs["src"].removeprefix("data:image/png;base64,"))
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), expected)
        assert (attrs["height"], attrs["width"]) == tuple(map(str, expected.shape[:2]))
    assert [attrs["alt"] for attrs in images] == [
        "input, example 1", "output, example 1", "input, example 2", "output, example 2",
    ]  # fmt: skip
    assert ["class" in attrs for attrs in images] == [True, True, False, False], "only small pictures are drawn crisp"


def test_wide_pictures_are_stacked(tmp_path):
    wide, square = (page_of(tmp_path, Pictures("p", "", ["a"], [[picture(0, size)]])) for size in ((8, 64), (8, 8)))
    assert len(wide.of_class("stacked")) == 1
    assert square.of_class("stacked") == []


def test_one_picture_alone_and_many_side_by_side_take_the_whole_width(tmp_path):
    def is_wide(section):
        return "wide" in page_of(tmp_path, section).all("section")[0].get("class", "")

    one, many = [("a", picture())], [[("a", picture())]] * 9
    assert is_wide(Pictures("p", "", ["a"], [[picture()]]))
    assert is_wide(Strip("p", "", [one]))
    assert is_wide(Strip("p", "", many))
    assert not is_wide(Strip("p", "", many[:3]))
    assert not is_wide(Pictures("p", "", ["a"], [[picture()], [picture()]]))
    assert not is_wide(Pictures("p", "", ["a", "b"], [[picture(), picture()]]))
    assert not is_wide(Words("p", "words"))
    assert len(page_of(tmp_path, Pictures("p", "", ["a"], [[picture()]])).of_class("per-1")) == 1


def test_strip_has_every_picture_below_its_caption(tmp_path):
    name = "a/rather & long/<folder>/picture-0123.png"
    page = page_of(tmp_path, Strip("s", "", [[("input", picture(0)), (f"0.98\n{name}", picture(1))]]))
    assert [attrs["alt"] for attrs in page.all("img")] == ["input", f"0.98, {name}"]
    assert [attrs["title"] for attrs in page.all("figcaption")] == ["input", f"0.98, {name}"]
    assert f"0.98{name}" in page.text  # in pieces on the page, and yet whole
    assert page.of_class("strip")[0]["style"] == "--of: 1; --lines: 2; --least: 4.75rem"


# Curves


def test_line_passes_through_its_values(tmp_path):
    page = page_of(tmp_path, Curve("loss", "step", "loss", {"a": ([0, 5, 10], [2.0, 0.0, 1.0])}))
    (line,) = page.of_class("line")
    assert numbers(line["d"]) == [(0.0, 0.0), (500.0, 1000.0), (1000.0, 500.0)]
    labels = re.findall(r"bottom: ([\d.]+)%\">([^<]+)<", (tmp_path / "report.html").read_text())
    assert len(labels) >= 3
    assert all(float(at) == pytest.approx(50 * float(label), abs=0.01) for at, label in labels)
    assert page.of_class("plot")[0]["aria-label"] == ("loss against step. a: 2 at 0, 1 at 10, lowest 0, highest 2.")


def test_fractions_are_written_as_percentages(tmp_path):
    curve = Curve("Accuracy", "layer", "accuracy", {"top1": ([1, 2, 3], [0.5, 0.25, 0.75])}, percent=True)
    page = page_of(tmp_path, curve)
    labels = re.findall(r"bottom: ([\d.]+)%\">([^<]+)<", (tmp_path / "report.html").read_text())
    assert [label for _, label in labels] == ["20%", "30%", "40%", "50%", "60%", "70%", "80%"]
    assert numbers(page.of_class("line")[0]["d"]) == [(0.0, 500.0), (500.0, 916.7), (1000.0, 83.3)]
    assert "75.0% at the end" in page.text
    assert page.of_class("plot")[0]["aria-label"] == (
        "accuracy against layer. top1: 50.0% at 1, 75.0% at 3, lowest 25.0%, highest 75.0%."
    )


def test_accuracy_by_layer_is_in_percent_at_whole_layers(tmp_path):
    samples = SimpleNamespace(test=10)
    layers = [
        SimpleNamespace(scores={"top1": Score(top1, 0, 1)}, samples=samples, notes=[], describe=str)
        for top1 in (0.4, 0.5, 0.6)
    ]
    PerLayerResult(layers).write(tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "60.0% at the end" in html
    assert re.findall(r"left: [\d.]+%\">([^<]+)<", html) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("x", "labels"),
    [
        ([1, 2, 3, 4], ["1", "2", "3", "4"]),
        ([7], ["7"]),
        ([0, 1], ["0", "1"]),
        ([1, 2, 3.5], ["1.0", "1.5", "2.0", "2.5", "3.0", "3.5"]),
    ],
)
def test_whole_x_values_have_whole_ticks(tmp_path, x, labels):
    page_of(tmp_path, Curve("c", "layer", "loss", {"a": (x, [0.5] * len(x))}))
    assert re.findall(r"left: [\d.]+%\">([^<]+)<", (tmp_path / "report.html").read_text()) == labels


def test_gaps_lift_the_pen_and_are_counted(tmp_path):
    y = [3.0, 2.0, NAN, 1.0, math.inf, 1e308, 2.0]
    page = page_of(tmp_path, Curve("loss", "step", "loss", {"a": (range(7), y)}))
    (line,) = page.of_class("line")
    assert [len(numbers(run)) for run in line["d"].split("M")[1:] for run in ["M" + run]] == [2, 1, 1]
    assert "3 not finite" in page.text
    assert "nan" not in line["d"]


@pytest.mark.parametrize("series", [{}, {"a": ([], [])}, {"a": ([1.0, 2.0], [NAN, math.inf])}])
def test_nothing_to_draw_is_said(tmp_path, series):
    page = page_of(tmp_path, Curve("loss", "step", "loss", series))
    assert "no finite value" in page.text
    assert page.all("svg") == []


def test_empty_series_stands_beside_a_full_one(tmp_path):
    page = page_of(tmp_path, Curve("loss", "step", "loss", {"none": ([], []), "one": ([4], [0.5])}))
    assert "no value" in page.text
    assert len(numbers(page.of_class("line")[1]["d"])) == 1
    assert page_of(tmp_path, Pictures("p", "", ["a"], [])).all("img") == []


def test_thinning_keeps_spikes_gaps_and_ends():
    y = np.sin(np.arange(50_000) / 900)
    y[[12_345, 40_001]] = 9.0, -9.0
    y[30_000] = NAN
    line = _line("a", range(50_000), y)
    thin = _thin(line)
    assert len(thin.y) <= 3 * BUCKETS
    assert {0, 12_345, 30_000, 40_001, 49_999} <= set(thin.x.astype(int))
    np.testing.assert_array_equal(thin.y, y[thin.x.astype(int)])
    assert np.all(np.diff(thin.x) > 0)
    assert _thin(_line("a", range(600), y[:600])).y.size == 600


@pytest.mark.parametrize("widen", [True, False])
def test_axis_is_round_ordered_and_holds_every_value(widen):
    rng = np.random.default_rng(0)
    ranges = [rng.normal(size=2) * 10.0 ** rng.integers(-8, 9) for _ in range(300)]
    odd = [
        [0, 0],
        [7, 7],
        [-3, -3],
        [1, 1 + 4e-16],
        [0, 5e-324],
        [-1e300, 1e300],
        [1e6, 1e6 + 1],
        [0.1, 0.3],
        [0, 2999],
    ]
    for values in [*ranges, *map(np.array, odd)]:
        axis = _axis(np.asarray(values, dtype=np.float64), widen)
        slack = 1e-6 * (axis.high - axis.low)
        assert axis.low - slack <= min(values) <= max(values) <= axis.high + slack
        places, labels = zip(*axis.ticks, strict=True)
        assert 3 <= len(places) <= 10
        assert -1e-6 <= places[0] < places[-1] <= 1 + 1e-6
        assert np.allclose(np.diff(places), places[1] - places[0])
        assert not widen or np.allclose((places[0], places[-1]), (0, 1), atol=1e-6)
        assert len(set(labels)) == len(labels), labels


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0, 2999], ["0", "500", "1,000", "1,500", "2,000", "2,500"]),
        ([0, 60_000], ["0", "10k", "20k", "30k", "40k", "50k", "60k"]),
        ([0.1, 0.3], ["0.10", "0.15", "0.20", "0.25", "0.30"]),
    ],
)
def test_ticks_read_well(values, labels):
    assert [label for _, label in _axis(np.array(values, dtype=np.float64), widen=False).ticks] == labels
