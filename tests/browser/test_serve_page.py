"""The service's page in a real browser: chosen, dropped, classified, searched, by mouse and by keyboard.

Planted bugs that fail here: a style on an element (which the policy forbids), a picture from elsewhere, an error that
stays, a field that the keyboard does not reach, a name with HTML in it that is read as HTML.
"""

import base64
import json
import socket
import threading

import PIL.Image
import pytest
import uvicorn
from test_report_page import COLOURS, SCHEMES, WIDTHS, _contrast, browser, pytestmark  # noqa: F401

from tests.tasks.serving import serving
from tests.tasks.towers import untrained

WAIT = """new Promise((resolve, reject) => {
  const end = Date.now() + 20000;
  const look = () => {
    const found = (%s);
    if (found) resolve(found);
    else if (Date.now() > end) reject(new Error('waited in vain'));
    else setTimeout(look, 20);
  };
  look();
})"""
READY = "document.getElementById('lead').textContent.startsWith('This service')"


class Page:
    """An address, as ``Browser.open`` takes a path."""

    def __init__(self, address):
        self.address = address

    def as_uri(self):
        return self.address


def started(service):
    """Serve on a free port in a thread; returns the address and what ends it."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(service.app, log_config=None, lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()

    def end():
        server.should_exit = True
        thread.join()

    return f"http://127.0.0.1:{listening.getsockname()[1]}", end


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("run") / "clip", "image", "text")


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    folder = tmp_path_factory.mktemp("album")
    for i, name in enumerate(["a", "<img src=x onerror=alert(1)>", "an_unbroken_name_" * 8, "d", "e"]):
        PIL.Image.new("RGB", (60 + 20 * i, 60), (40 * i, 200 - 30 * i, 90)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def address(run, album, tmp_path_factory):
    with serving(run, album, index=tmp_path_factory.mktemp("index") / "i.arrow") as service:
        address, end = started(service)
        yield address
        end()


@pytest.fixture
def page(browser, address):  # noqa: F811
    def visit(width=1280, scheme="light", path="/", ready=READY):
        browser.open(Page(address + path), width, scheme)
        wait(browser, ready)
        return browser

    return visit


def wait(browser, condition):  # noqa: F811
    answer = browser.call("Runtime.evaluate", expression=WAIT % condition, awaitPromise=True, returnByValue=True)
    assert "exceptionDetails" not in answer, (condition, browser.ask("document.body.innerText"))
    return answer["result"].get("value")


def choose(browser, path):  # noqa: F811
    field = browser.call("Runtime.evaluate", expression="document.getElementById('file')")["result"]["objectId"]
    browser.call("DOM.setFileInputFiles", files=[str(path)], objectId=field)


def fill(browser, name, text):  # noqa: F811
    browser.ask(f"document.getElementById('{name}').value = {json.dumps(text)}")


def press(browser, key, code=0, text=""):  # noqa: F811
    for kind in ("keyDown", "keyUp"):
        words = {"text": text} if text and kind == "keyDown" else {}
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **words)


def click(browser, name):  # noqa: F811
    browser.ask(f"document.getElementById('{name}').click()")


BARS = "[...document.querySelectorAll('#name-results li')].map(e => [...e.children].map(c => c.textContent))"
MESSAGE = "document.getElementById('name-message').textContent"


def own(browser, address):  # noqa: F811
    """Whether everything that was asked for lies here, or is made of bytes that came from here."""
    return all(url.startswith((address, f"blob:{address}")) for url in browser.requests())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_all_of_it_fits_loads_nothing_from_elsewhere_and_complains_about_nothing(page, address, album, width, scheme):
    tab = page(width, scheme)
    choose(tab, album / "a.png")
    fill(tab, "classes", "red square, " + "an_unbroken_name_" * 10)
    click(tab, "name-button")
    bars = wait(tab, f"{BARS}.length && {BARS}")
    assert len(bars) == 2
    fill(tab, "query", "a red square")
    tab.ask("document.querySelector('#search-form button').click()")
    wait(tab, "document.querySelectorAll('.hits img').length === 5")
    wait(tab, "[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert tab.ask("document.documentElement.scrollWidth") <= width
    assert (
        tab.ask("Math.min(...[...document.querySelectorAll('main *')].map(e => e.getBoundingClientRect().left))") >= 0
    )
    assert own(tab, address)
    assert tab.complaints() == []
    for selector in (".lead", ".note", "button", ".bars .value", ".hits figcaption", "h2", "footer a", "label span"):
        assert _contrast(*tab.ask(f"({COLOURS})('{selector}')")) >= 4.5, selector


def test_bars_are_as_long_as_their_scores_and_in_their_order(page, album):
    tab = page()
    choose(tab, album / "d.png")
    fill(tab, "classes", "cat\ndog\ncow")
    click(tab, "name-button")
    rows = wait(tab, f"{BARS}.length && {BARS}")
    scores = [float(row[1].removesuffix(" %")) for row in rows]
    assert sorted(scores, reverse=True) == scores
    assert sum(scores) == pytest.approx(100, abs=0.2)
    full = tab.ask("document.querySelector('.bar').clientWidth")
    lengths = tab.ask(
        "[...document.querySelectorAll('.bar')].map(e => parseFloat(getComputedStyle(e, '::before').width))"
    )
    assert [100 * length / full for length in lengths] == pytest.approx(scores, abs=0.5)


def test_what_is_missing_or_broken_is_said_and_the_next_answer_takes_it_away(page, album, tmp_path):
    tab = page()
    click(tab, "name-button")
    assert "Choose a file" in wait(tab, MESSAGE)
    choose(tab, album / "a.png")
    click(tab, "name-button")
    assert "classes" in wait(tab, f"{MESSAGE}.includes('classes') && {MESSAGE}")
    (tmp_path / "broken.png").write_text("no picture <b>at all</b>")
    choose(tab, tmp_path / "broken.png")
    fill(tab, "classes", "cat, dog")
    click(tab, "name-button")
    assert "cannot be read as image" in wait(tab, f"{MESSAGE}.includes('cannot') && {MESSAGE}")
    assert tab.ask("document.getElementById('name-message').getAttribute('role')") == "alert"
    choose(tab, album / "a.png")
    click(tab, "name-button")
    assert len(wait(tab, f"{BARS}.length && {BARS}")) == 2
    assert tab.ask(MESSAGE) == ""
    fill(tab, "query", " ")
    tab.ask("document.querySelector('#search-form button').click()")
    assert wait(tab, "document.getElementById('search-message').textContent")
    fill(tab, "query", "a red square")
    tab.ask("document.querySelector('#search-form button').click()")
    wait(tab, "document.querySelectorAll('.hits img').length === 5")
    assert tab.ask("document.getElementById('search-message').textContent") == ""
    fill(tab, "query", " ")
    tab.ask("document.querySelector('#search-form button').click()")
    assert wait(tab, "document.getElementById('search-message').textContent")
    assert (
        tab.ask("document.querySelectorAll('.hits li').length + document.getElementById('search-count').innerText")
        == "0"
    )
    # Chromium itself notes every answer that is an error; nothing else is wrong.
    assert all("422" in one for one in tab.complaints())


def test_names_are_words_and_files_are_found_by_an_example(page, album):
    tab = page()
    choose(tab, album / "e.png")
    click(tab, "like-button")
    names = wait(
        tab,
        "document.querySelectorAll('.hits figcaption').length === 5 && "
        "[...document.querySelectorAll('.hits figcaption')].map(e => e.lastChild.textContent)",
    )
    assert names[0] == "e.png"
    assert "<img src=x onerror=alert(1)>.png" in names
    assert tab.ask("document.getElementById('search-count').textContent") == "5 files like e.png, the nearest first"


def test_the_keyboard_reaches_everything(page):
    tab = page()
    seen = []
    for _ in range(9):
        press(tab, "Tab", 9)
        seen.append(tab.ask("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert seen[:7] == ["file", "classes", "template", "name-button", "like-button", "query", "Find"]
    fill(tab, "query", "a red square")
    tab.ask("document.getElementById('query').focus()")
    press(tab, "Enter", 13, "\r")
    wait(tab, "document.querySelectorAll('.hits li').length === 5")
    unnamed = tab.ask(
        "[...document.querySelectorAll('input:not([hidden]), select, textarea')]"
        ".filter(e => !e.labels.length).map(e => e.id)"
    )
    assert unnamed == []
    live = tab.ask("[...document.querySelectorAll('[aria-live]')].length")
    assert live >= 2


def test_what_is_asked_for_is_what_the_service_reads(page):
    tab = page()
    assert tab.ask("[...document.getElementById('template').options].map(one => one.value)") == ["", "photo", "drawing"]
    assert tab.ask("document.getElementById('query-label').textContent") == "What is to be seen"


def test_a_file_can_be_dropped(page, album):
    tab = page()
    data = base64.b64encode((album / "a.png").read_bytes()).decode()
    tab.ask(f"""(() => {{
      const bytes = Uint8Array.from(atob('{data}'), c => c.charCodeAt(0)), transfer = new DataTransfer();
      transfer.items.add(new File([bytes], 'dropped.png', {{ type: 'image/png' }}));
      const drop = document.getElementById('drop');
      drop.dispatchEvent(new DragEvent('drop', {{ dataTransfer: transfer, bubbles: true, cancelable: true }}));
    }})()""")
    assert tab.ask("document.getElementById('file').files[0].name") == "dropped.png"
    assert wait(tab, "document.querySelector('#preview img')?.naturalWidth") == 60
    fill(tab, "classes", "cat, dog")
    click(tab, "name-button")
    assert len(wait(tab, f"{BARS}.length && {BARS}")) == 2


def test_the_token_is_asked_for_and_sent(browser, run, album, tmp_path):  # noqa: F811
    with serving(run, album, token="sesame", index=tmp_path / "i.arrow") as service:
        address, end = started(service)
        try:
            browser.open(Page(address), 390, "light")
            wait(browser, "!document.getElementById('token-section').hidden")
            assert browser.ask("document.activeElement.id") == "token"
            assert browser.ask("document.getElementById('name-section').hidden")
            fill(browser, "token", "wrong")
            press(browser, "Enter", 13, "\r")
            assert "not the right one" in wait(browser, "document.getElementById('token-message').textContent")
            fill(browser, "token", "sesame")
            press(browser, "Enter", 13, "\r")
            wait(browser, READY)
            assert browser.ask("document.getElementById('token-section').hidden")
            fill(browser, "query", "a red square")
            browser.ask("document.querySelector('#search-form button').click()")
            wait(browser, "[...document.querySelectorAll('.hits img')].filter(e => e.naturalWidth > 0).length === 5")
            assert "sesame" not in "".join(browser.requests())
        finally:
            end()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_documentation_is_made_from_the_document(page, address, width):
    tab = page(width, path="/docs", ready="document.querySelectorAll('main section').length >= 8")
    assert "/v1/zero-shot" in tab.ask("document.querySelector('main').innerText")
    assert tab.ask("document.documentElement.scrollWidth") <= width
    assert own(tab, address)
    assert tab.complaints() == []
