"""The report in a real browser: on a phone and on a desk, in light and in dark, complete in itself."""

import fcntl
import json
import os
import select
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from tasks.metrics import Score
from tasks.report import Code, Curve, Facts, Pictures, Strip, Table, Words, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-extensions", "--remote-debugging-pipe"),
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no headless Chromium on this machine (Debian: apt install chromium)"),
]


class Browser:
    """One headless Chromium, spoken to through pipes: JSON messages that end with a zero byte."""

    def __init__(self, profile: Path) -> None:
        (commands, self.inbox), (self.outbox, answers) = os.pipe(), os.pipe()
        # Chromium reads from descriptor 3 and writes to 4; above 9 ours cannot be overwritten on the way there.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (commands, answers)]
        silent = (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)
        pipes = [(os.POSIX_SPAWN_DUP2, fd, place) for fd, place in zip(high, (3, 4), strict=True)]
        argv = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.pid = os.posix_spawn(CHROMIUM, argv, os.environ, file_actions=[silent, *pipes], setpgroup=0)
        for fd in (commands, answers, *high):
            os.close(fd)
        self.buffer, self.number, self.events = b"", 0, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if hasattr(self, "session"):
            message["sessionId"] = self.session
        os.write(self.inbox, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda m: m.get("id") == self.number)
        assert "error" not in answer, answer
        return answer["result"]

    def _until(self, wanted, seconds: float = 60) -> dict:
        """Collect events until a message is the wanted one."""
        end = time.monotonic() + seconds
        while True:
            while b"\0" in self.buffer:
                raw, self.buffer = self.buffer.split(b"\0", 1)
                message = json.loads(raw)
                self.events.append(message)
                if wanted(message):
                    return message
            ready = select.select([self.outbox], [], [], max(0.0, end - time.monotonic()))[0]
            data = os.read(self.outbox, 1 << 20) if ready else b""
            assert data, "Chromium does not answer"
            self.buffer += data

    def open(self, page: Path, width: int, scheme: str) -> None:
        """Load a page afresh in a window of this width and colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        if not any(m.get("method") == "Page.loadEventFired" for m in self.events):
            self._until(lambda m: m.get("method") == "Page.loadEventFired")

    def ask(self, expression: str):
        """Evaluate an expression in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def complaints(self) -> list[str]:
        """Return console errors and uncaught exceptions since the page was opened."""
        bad = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(m["params"])[:500] for m in self.events if m.get("method") in bad]

    def requests(self) -> list[str]:
        """Return what was asked for since the page was opened, other than data URIs."""
        sent = [m["params"]["request"]["url"] for m in self.events if m.get("method") == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]

    def close(self) -> None:
        for fd in (self.inbox, self.outbox):
            os.close(fd)
        # It leaves by itself when its pipes close, and takes its temporary files along.
        os.waitpid(self.pid, 0)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


CLASSES = [["cat", Score(1.0, 1.0, 1.0)], ["dog", Score(0.051, 0.0, 0.1)], ["a long name " * 3, Score(0.5, 0.45, 0.55)]]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A page with ordinary sections, and with names that leave no room and values that cannot be drawn."""
    rng = np.random.default_rng(0)
    long, nan = "an_unbroken_name_" * 12, float("nan")
    squares = [[rng.integers(0, 256, (28, 28, 3), dtype=np.uint8) for _ in range(3)] for _ in range(4)]
    wide = [[rng.integers(0, 256, (16, 300, 3), dtype=np.uint8) for _ in range(3)]]
    scores = [Score(0.69, 0.66, 0.72), Score(nan, nan, nan)]
    noise = rng.normal(size=5000)
    noise[[10, 2500]] = nan, 40
    sections = [
        Table("Results", long, ["who", "top-1", "top-5"], [[f"row {i}", *scores] for i in range(4)], highlight=[0]),
        Table("Many columns", "", ["who", *"abcdefgh"], [[long, *[scores[0]] * 8]]),
        Facts("Cost", {"seconds": "171", long: "1", "samples per second": long}),
        Curve("Loss", "step", long, {"train": (range(5000), noise), long: ([0, 90_000], [1e5, 2e5])}),
        Curve("Nothing", "step", "loss", {"train": ([], [])}),
        Pictures("Digits", "", ["input", "masked", "reconstruction"], squares),
        Pictures("Sounds", "", ["input", "masked", long], wide),
        Pictures("Map", "", ["points"], [[rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)]]),
        Strip("Neighbours", "", [[(f"0.98\n{long}", squares[0][0])] * (1 + (i > 0)) for i in range(9)]),
        Table("Classes", "", ["class", "recall"], CLASSES, highlight=[0]),
        Table("Two scores", "", ["who", "top-1", "top-5"], [[a, b, b] for a, b in CLASSES]),
        Words(long, f"{long}\n\n<script>alert(1)</script>"),
        Code("Recipe", f"model: {long}\n" * 3),
    ]
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, f"A finding with {long}", long, sections)
    return path


WIDTHS, SCHEMES = (390, 1280), ("light", "dark")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_page_fits_loads_nothing_and_complains_about_nothing(browser, report, width, scheme):
    browser.open(report, width, scheme)
    # Folded sections are opened: what they hold must fit too.
    browser.ask("document.querySelectorAll('details').forEach(details => { details.open = true })")
    assert browser.ask("innerWidth") == width
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.requests() == [report.as_uri()]
    assert browser.complaints() == []
    assert browser.ask("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    # What sticks out to the left cannot be scrolled to, so scrollWidth does not know of it.
    assert (
        browser.ask("Math.min(...[...document.querySelectorAll('main *')].map(e => e.getBoundingClientRect().left))")
        >= 0
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_captions_stand_above_each_first_group_only(browser, report, width):
    browser.open(report, width, "light")
    shown = browser.ask(
        "[...document.querySelectorAll('.groups:not(.stacked, .per-1) figcaption')]"
        ".filter(e => e.offsetHeight).map(e => e.innerText)"
    )
    assert shown == ["input", "masked", "reconstruction"] * (1 if width < 640 else 2)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_bars_of_a_column_begin_and_end_together(browser, report, width, scheme):
    browser.open(report, width, scheme)
    for title in ("Results", "Classes", "Two scores"):
        rows = browser.ask(f"({BARS})('{title}')")
        assert len(rows) >= 3
        assert len({str(row) for row in rows}) == 1, rows
        assert all(length >= 60 for _, length in rows[0])


BARS = """title => {
  const section = [...document.querySelectorAll('section')].find(s => s.querySelector('h2').innerText === title);
  return [...section.querySelectorAll('tbody tr')].map(row => [...row.querySelectorAll('.bar')].map(bar => {
    const box = bar.getBoundingClientRect();
    return [Math.round(10 * box.left) / 10, Math.round(10 * box.width) / 10];
  }));
}"""


@pytest.mark.parametrize("width", WIDTHS)
def test_the_label_of_an_axis_stands_clear_of_its_ticks(browser, report, width):
    browser.open(report, width, "light")
    bottoms = "Math.max(...[...plot.querySelectorAll('.tick.x')].map(tick => tick.getBoundingClientRect().bottom))"
    top = "plot.querySelector('.x-label').getBoundingClientRect().top"
    gaps = browser.ask(f"[...document.querySelectorAll('.plot')].map(plot => {top} - {bottoms})")
    assert gaps
    assert min(gaps) >= 2


@pytest.mark.parametrize("width", WIDTHS)
def test_a_picture_alone_fills_the_page_and_captions_keep_to_their_line(browser, report, width):
    browser.open(report, width, "light")
    inner = browser.ask("document.querySelector('main').clientWidth - 40")
    assert browser.ask("document.querySelector('img[alt^=points]').clientWidth") == inner
    shape = browser.ask("[...document.querySelectorAll('.strip figure')].map(e => [e.clientWidth, e.clientHeight])")
    assert len(shape) == 1 + 2 * 8
    assert min(width for width, _ in shape) >= 76
    # The square picture and two lines of caption.
    assert max(height - width for width, height in shape) <= 42


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_stands_out_from_its_background(browser, report, scheme):
    """WCAG 2.2 asks for a contrast of 4.5 for text of this size."""
    browser.open(report, 1280, scheme)
    for selector in (
        ".lead",
        ".note",
        ".value",
        "tr.best .interval",
        "thead th",
        ".tick",
        ".legend small",
        "summary",
        "dt",
    ):
        assert _contrast(*browser.ask(f"({COLOURS})('{selector}')")) >= 4.5, selector


COLOURS = """selector => {
  let element = document.querySelector(selector), ink = getComputedStyle(element).color, paper;
  do { paper = getComputedStyle(element).backgroundColor; element = element.parentElement }
  while (paper === 'rgba(0, 0, 0, 0)' && element);
  return [ink, paper];
}"""


def _contrast(ink: str, paper: str) -> float:
    def luminance(colour: str) -> float:
        parts = np.array([int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]) / 255
        return float(
            np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
        )

    low, high = sorted((luminance(ink), luminance(paper)))
    return (high + 0.05) / (low + 0.05)


def test_light_and_dark_differ(browser, report):
    papers = []
    for scheme in SCHEMES:
        browser.open(report, 1280, scheme)
        papers.append(browser.ask("getComputedStyle(document.body).backgroundColor"))
    assert papers == ["rgb(252, 251, 248)", "rgb(20, 23, 26)"]


def test_a_bad_page_is_noticed(browser, report, tmp_path):
    """The checks above see what they look for: a wide box, a script, a picture from outside."""
    bad = "<p style='width: 2000px'>wide</p><script>1</script>"
    page = report.read_text(encoding="utf-8").replace("</main>", bad + "</main>")
    (tmp_path / "bad.html").write_text(page, encoding="utf-8")
    browser.open(tmp_path / "bad.html", 390, "light")
    assert browser.ask("document.documentElement.scrollWidth") > 390
    assert any("Content Security Policy" in complaint for complaint in browser.complaints())
    (tmp_path / "open.html").write_text("<link rel=icon href=data:,><img src=missing.png>", encoding="utf-8")
    browser.open(tmp_path / "open.html", 390, "light")
    assert browser.requests() == [(tmp_path / name).as_uri() for name in ("open.html", "missing.png")]
