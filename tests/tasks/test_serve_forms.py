"""What a form may be, byte by byte, and what the service says of one that it cannot use.

Planted bugs that fail here: words that are no UTF-8 read as Latin-1, a form that was cut off taken for whole, fields in
the address left aside, five classes of many, Python's names for errors told to strangers.
"""

import re
import struct
import zlib

import pytest
from media import numbered, tone, write_sound, write_video
from serving import is_problem, picture, posting, serving
from towers import untrained

from tasks.serve_openapi import MEANINGS

END = b"--b--\r\n"
TYPE = "multipart/form-data; boundary=b"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("run") / "clip", "image", "text")


@pytest.fixture(scope="module")
def service(run):
    with serving(run) as one:
        yield one


def part(name, value, more="", header=""):
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n{header}\r\n'.encode() + value + b"\r\n"


FILE = part("file", picture(), '; filename="a.png"')


def send(service, *parts, kind=TYPE, path="/v1/zero-shot"):
    return service.ask("POST", path, content=b"".join(parts), headers={"Content-Type": kind})


def test_words_are_utf_8(service):
    told = is_problem(send(service, FILE, part("classes", "Käse,dog".encode("latin-1")), END), 400)
    assert told == "classes: what it holds is not UTF-8"
    found = send(service, FILE, part("classes", "Käse,dog".encode()), END).json()
    assert {one["label"] for one in found} == {"Käse", "dog"}
    for kind in (f"{TYPE}; charset=latin-1", f'{TYPE}; charset="utf-16"', f"{TYPE}; charset=nope"):
        assert "utf-8" in is_problem(send(service, FILE, part("classes", b"cat,dog"), END, kind=kind), 415)
    assert send(service, FILE, part("classes", b"cat,dog"), END, kind=f"{TYPE}; charset=UTF-8").is_success
    header = "Content-Type: text/plain; charset=utf-16-le\r\n"
    is_problem(send(service, FILE, part("classes", "cat,dog".encode("utf-16-le"), header=header), END), 415)


def test_a_form_that_is_cut_off_is_not_taken_for_whole(service):
    whole = [FILE, part("classes", b"cat,dog"), END]
    assert send(service, *whole).is_success
    for cut in (whole[:2], [FILE, part("classes", b"cat,dog")[:-4]], [FILE, part("classes", b"cat,dog"), b"--b\r\n"]):
        assert "too early" in is_problem(send(service, *cut), 400)


def test_fields_in_the_address_are_refused(service):
    method, path, options = posting("/v1/embed", text="a")
    told = is_problem(service.ask(method, f"{path}?modality=text", **options), 422)
    assert told == "fields go into the form, not into the address"


def test_names_end_at_commas_and_lines_alone(service):
    odd = "a\u2028b\x85c\x1cd\x0be"
    found = service.post("/v1/zero-shot", ("a.png", picture()), classes=f"{odd},dog\r\ncat\nbat\rrat").json()
    assert {one["label"] for one in found} == {odd, "dog", "cat", "bat", "rat"}


def test_a_file_has_a_plain_name(service):
    star = part("file", picture(), "; filename*=UTF-8''a%2epng")
    assert "filename*" in is_problem(send(service, star, part("classes", b"cat,dog"), END), 400)
    bare = send(service, part("file", picture()), part("classes", b"cat,dog"), END)
    assert "holds no file" in is_problem(bare, 422)


def test_all_classes_are_named_unless_fewer_are_asked_for(run):
    with serving(run, top=7) as service:

        def ask(classes, **top):
            return service.post("/v1/zero-shot", ("a.png", picture()), classes=classes, **top)

        assert len(ask([*"abcdef"]).json()) == 6
        assert len(ask([*"abcdefghi"]).json()) == 7
        assert len(ask([*"abcdefghi"], top="2").json()) == 2
        assert is_problem(ask("a,b", top="100000"), 422) == "top: at most 7, but got 100000"


@pytest.mark.parametrize("given", ["", "0", "1.5", "-1", "two", "٣", "1_0", "9" * 5000])
def test_numbers_are_asked_for_in_plain_words(service, given):
    detail = is_problem(service.post("/v1/zero-shot", ("a.png", picture()), classes="cat,dog", top=given), 422)
    assert detail.startswith("the form: top: give a whole number from 1, but got '")


def test_what_is_wrong_with_a_form_is_a_sentence(service):
    two = send(service, FILE, FILE, part("classes", b"cat,dog"), END)
    assert is_problem(two, 400) == "the form holds more than one file"
    many = send(service, FILE, *[part("classes", b"a")] * 300, END)
    assert is_problem(many, 400) == "the form has more than the 228 fields that are allowed"
    nameless = send(service, b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n", END)
    assert is_problem(nameless, 400) == "the form cannot be read: a part of it has no name"
    assert "boundary" in is_problem(send(service, END, kind="multipart/form-data"), 400)
    assert "multipart/form-data, as curl -F sends it" in is_problem(service.ask("POST", "/v1/embed", json={}), 415)
    assert "file" in is_problem(service.post("/v1/embed", ("a.png", picture()), picture="x"), 422)
    long = service.post("/v1/zero-shot", ("a.png", picture()), classes="a" * 2_000_000)
    assert "bytes" in is_problem(long, 413)


def test_all_letters_of_all_prompts_are_counted(run):
    with serving(run, letters=20) as service:
        for templates, status in ((["{} and"], 200), (["{}, so", "an {}"], 422)):
            asked = service.post("/v1/zero-shot", ("a.png", picture()), classes="one,two", templates=templates)
            assert asked.status_code == status
        assert is_problem(asked, 422) == "the prompts have 26 letters, and 20 are allowed"


# Files


@pytest.mark.parametrize(
    ("route", "name", "words"),
    [
        ("zero-shot", "note.txt", "this service names pictures, and note.txt is a .txt file"),
        ("zero-shot", "a.mp4", "this service names pictures, and a.mp4 is a .mp4 file"),
        ("embed", "a.MP4", "this service reads pictures and texts, and a.MP4 is a .mp4 file"),
    ],
)
def test_files_of_other_kinds_are_called_what_they_are(service, route, name, words):
    fields = {"classes": "cat,dog"} if route == "zero-shot" else {}
    assert is_problem(service.post(f"/v1/{route}", (name, b"x"), **fields), 415) == words
    # A name that says nothing is no reason.
    assert service.post(f"/v1/{route}", ("blob", picture()), **fields).is_success
    assert service.post(f"/v1/{route}", (name, picture()), modality="image", **fields).is_success


def chunk(kind, data):
    """Return a chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_reasons_are_told_without_the_names_of_errors(tmp_path):
    run = untrained(tmp_path / "clip", "image", "text", "audio", "video")
    good = picture()
    text = chunk(b"zTXt", b"c\0\0" + zlib.compress(bytes(2**21), 9))
    wav = write_sound(tmp_path / "a.wav", tone(0.3, 8000), 8000).read_bytes()
    mp4 = write_video(tmp_path / "a.mp4", numbered(4)).read_bytes()
    files = [
        ("a.png", b"text", "not an image"),
        ("a.png", good[:33] + text + good[33:], ""),
        ("a.png", good.replace(b"IDAT", b"IDAX"), ""),
        ("a.png", good[:60] + bytes(20) + good[80:], ""),
        ("a.tif", b"II*\0" + bytes(60), ""),
        ("a.wav", wav[:20] + b"\xff\xff" + wav[22:], ""),
        ("a.wav", wav[:22] + bytes(2) + wav[24:], ""),
        ("a.mp4", b"ffconcat version 1.0\nfile x.ts\n", "not a video"),
        ("a.mp4", mp4.replace(b"moov", b"moox"), ""),
    ]
    with serving(run) as service:
        for name, data, words in files:
            detail = is_problem(service.post("/v1/embed", (name, data)), 422)
            assert detail.startswith("the file cannot be read as ")
            assert words in detail
            assert "cannot identify" not in detail
            assert not re.search(r"[A-Z]\w+(Error|Exception)|SF_INFO|Errno", detail), detail


# Methods and the document


def test_head_is_answered_and_a_405_says_what_is(service):
    for path in ("/", "/docs", "/healthz", "/metrics", "/v1/about", "/openapi.json", "/assets/page.js"):
        assert service.ask("HEAD", path).status_code == service.get(path).status_code == 200
    answer = service.get("/v1/embed")
    assert is_problem(answer, 405) == "this address takes POST alone"
    assert answer.headers["allow"] == "POST"
    assert is_problem(service.ask("DELETE", "/healthz"), 405) == "this address takes GET and HEAD alone"


def test_limits_are_told(run):
    with serving(run, pixels=12_345) as service:
        told = service.get("/v1/about").json()["limits"]
        assert told["pixels"] == 12_345
        assert {"seconds", "prompts", "letters", "queue", "request_seconds"} <= told.keys()


def test_the_document_tells_defaults_limits_answers_errors_and_what_is_missing(service):
    document = service.get("/openapi.json").json()
    forms = {
        path: route["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
        for path, route in document["paths"].items()
        if "post" in route
    }
    assert forms["/v1/zero-shot"]["top"].items() >= {"type": "integer", "minimum": 1, "maximum": 200}.items()
    assert "default" not in forms["/v1/zero-shot"]["top"]
    assert forms["/v1/search"]["top"]["default"] == 20
    assert forms["/v1/search"]["text"]["maxLength"] == 1000
    assert forms["/v1/zero-shot"]["classes"]["maxItems"] == 200
    for name, schema in document["components"]["schemas"].items():
        assert all("description" in one for one in schema["properties"].values()), name
    for path, methods in document["paths"].items():
        assert "head" not in methods
        (what,) = methods.values()
        assert ("does not offer" in what["description"]) == (path in ("/v1/classify", "/v1/search", "/v1/media/{id}"))
        errors = {int(status): one["description"] for status, one in what["responses"].items() if status != "200"}
        assert errors == {status: MEANINGS[status] for status in errors}
    assert "20,000" in document["paths"]["/v1/media/{id}"]["get"]["description"]
