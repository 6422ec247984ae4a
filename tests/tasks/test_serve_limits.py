"""What the service refuses: strangers, too much of anything, and uploads that harm their decoder.

Planted bugs that fail here: a body measured by its header alone, a queue that never empties, a token compared by its
beginning, an upload left on the disk, a crash that takes the next request along.
"""

import asyncio
import os
import signal
import struct
import tempfile
import threading
import zlib
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch
from media import tone, write_sound
from serving import ORIGIN, is_problem, picture, posting, serving
from towers import untrained

from mmssl.data import local
from mmssl.data.guard import BrokenFile
from mmssl.errors import UserError
from tasks.serve import check_address
from tasks.serve_address import is_loopback
from tasks.serve_limits import Limits
from tasks.serve_media import Decoders

TOKEN = "open-sesame="


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("run") / "clip", "image", "text", "audio")


@pytest.fixture(scope="module")
def service(run):
    with serving(
        run, body=200_000, pixels=10_000, seconds=2.0, classes=5, templates=2, prompts=8, characters=50, top=3
    ) as one:
        yield one


# Who may ask


def test_an_address_that_others_reach_needs_a_token():
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(UserError, match="MMSSL_TOKEN"):
            check_address(host, 8000, None)
        assert check_address(host, 8000, "x") == "x"
    for host in ("127.0.0.1", "127.3.2.1", "::1", "::ffff:127.0.0.1", "localhost"):
        assert is_loopback(host)
        assert check_address(host, 8000, None) is None
    for token in ("", " a", "a\n", "é", "open sesame", 'a"b', "a=b"):
        with pytest.raises(UserError, match="ASCII"):
            check_address("127.0.0.1", 8000, token)
    with pytest.raises(UserError, match="--port 70000"):
        check_address("127.0.0.1", 70000, None)


@pytest.mark.parametrize("field", ["body", "queue", "decoders", "request_seconds"])
def test_limits_are_above_zero(field):
    with pytest.raises(UserError, match=field):
        Limits(**{field: 0})


def test_a_token_is_needed_where_there_is_one(run):
    with serving(run, token=TOKEN) as service:
        answer = service.get("/v1/about")
        assert "Bearer" in is_problem(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
        for wrong in ("open-sesame", "open-sesame==", TOKEN.upper(), "é", ""):
            given = {"Authorization": f"Bearer {wrong}".encode()}
            is_problem(service.get("/v1/about", headers=given), 401)
            is_problem(service.together(posting("/v1/embed", ("a.png", picture()), headers=given))[0], 401)
        is_problem(service.get("/v1/about", headers={"Authorization": TOKEN}), 401)
        is_problem(service.get("/metrics"), 401)
        for right in (f"Bearer {TOKEN}", f"bearer {TOKEN}"):
            assert service.get("/v1/about", headers={"Authorization": right}).status_code == 200
        for path in ("/", "/docs", "/openapi.json", "/healthz", "/assets/page.js"):
            assert service.get(path).status_code == 200
        paths = service.get("/openapi.json").json()["paths"]
        assert [path for path in paths if "security" not in next(iter(paths[path].values()))] == ["/healthz"]
        # Who has the token may come by any name and from any page.
        named = {"Authorization": f"Bearer {TOKEN}", "Host": "example.org", "Origin": "https://example.com"}
        assert service.get("/v1/about", headers=named).status_code == 200


def test_names_led_here_from_elsewhere_and_pages_of_others_are_refused(service):
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", ""):
        is_problem(service.get("/v1/about", headers={"Host": host}), 421)
        is_problem(service.get("/", headers={"Host": host}), 421)
    is_problem(service.get("/v1/about", headers=[("Host", "127.0.0.1"), ("Host", "evil.example")]), 400)
    for host in ("127.0.0.1:8000", "localhost", "localhost.", "LOCALHOST:1", "[::1]:8000", "[0:0:0:0:0:0:0:1]"):
        assert service.get("/v1/about", headers={"Host": host}).status_code == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9", "https://localhost"):
        sent = posting("/v1/embed", ("a.png", picture()), headers={"Origin": origin})
        is_problem(service.together(sent)[0], 403)
    assert service.get("/v1/about", headers={"Origin": ORIGIN}).status_code == 200


# How much


def test_a_body_is_measured_as_it_comes(service):
    path, options = posting("/v1/embed", ("a.png", bytes(250_000)))[1:]
    is_problem(service.ask("POST", path, **options), 413)
    fed, kept = 0, []

    async def chunks():
        # What is too much is thrown away as it comes, so that its sender gets to see the answer.
        nonlocal fed
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
        for _ in range(1000):
            fed += 10_000
            yield bytes(10_000)
            kept.append(psutil.Process().memory_info().rss)

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    is_problem(service.ask("POST", "/v1/embed", content=chunks(), headers=headers), 413)
    assert fed == 10**7
    assert max(kept) - kept[0] < 5 * 10**6
    assert service.post("/v1/embed", ("a.png", picture())).status_code == 200


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"classes": [*"abcdef"]}, "6 are given, and 5"),
        ({"classes": "a,b,c,d,e,f"}, "6 are given, and 5"),
        ({"classes": "a,b", "templates": ["x {}", "y {}", "z {}"]}, "3 are given, and 2"),
        ({"classes": "a,b,c,d,e", "templates": ["x {}", "y {}"]}, "10 prompts, and 8"),
        ({"classes": "a,b,c", "templates": "photo"}, "21 prompts, and 8"),
        ({"classes": ["a", "b" * 51]}, "50 characters"),
        ({"classes": "a,b", "templates": "x {}" + "y" * 50}, "50 characters"),
        ({"classes": "a,b", "top": "4"}, "at most 3, but got 4"),
    ],
)
def test_words_are_counted(service, fields, words):
    assert words in is_problem(service.post("/v1/zero-shot", ("x.png", picture()), **fields), 422)


def test_too_many_fields_or_one_too_long_are_refused(service):
    many = service.post("/v1/zero-shot", ("x.png", picture()), classes=["a"] * 100)
    assert "fields that are allowed" in is_problem(many, 400)
    long = service.post("/v1/zero-shot", ("x.png", picture()), classes="a" * 50_000)
    assert "classes: longer than" in is_problem(long, 413)
    assert "characters that are allowed" in is_problem(service.post("/v1/embed", text="a" * 51), 422)


def test_large_pictures_and_long_sounds_are_refused_unread(service, tmp_path):
    assert "allowed" in is_problem(service.post("/v1/embed", ("a.png", picture(size=(101, 100)))), 413)
    assert service.post("/v1/embed", ("a.png", picture(size=(100, 100)))).status_code == 200
    sound = write_sound(tmp_path / "a.flac", np.zeros(8000 * 3, np.float32), 8000).read_bytes()
    assert "3 s long" in is_problem(service.post("/v1/embed", ("a.flac", sound)), 413)


def bomb(width, height):
    """Return a PNG of a few kilobytes that claims so many pixels, all of them there and black."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, rows = zlib.compressobj(9), []
    for _ in range(height):
        rows.append(packer.compress(bytes(1 + width // 8)))
    data = b"".join(rows) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_what_is_no_file_of_the_kind_is_told(service, tmp_path):
    good, sound = picture(), write_sound(tmp_path / "a.wav", tone(0.4, 8000), 8000).read_bytes()
    nan = write_sound(tmp_path / "b.wav", np.full(4000, np.nan, np.float32), 8000, "FLOAT").read_bytes()
    for name, data, words in (
        ("a.png", b"", "empty"),
        ("a.png", good[: len(good) // 2], "truncated"),
        ("a.png", sound, "not an image"),
        ("a.wav", good, "not a sound"),
        ("a.wav", sound[:100], "truncated"),
        ("a.wav", nan, "NaN"),
        ("a.wav", b"", "empty"),
        ("a.txt", b"\xff\xfe\x00", "text"),
    ):
        detail = is_problem(service.post("/v1/embed", (name, data)), 422)
        assert words in detail
        assert "mmssl-serve" not in detail
        assert "/proc" not in detail
        assert "memfd" not in detail
    is_problem(service.post("/v1/embed", ("a.png", bomb(30_000, 5_000))), 413)


def test_the_queue_is_bounded_and_empties(run):
    with serving(run, queue=3, window=0.05) as service:
        requests = [posting("/v1/embed", ("a.png", picture(i))) for i in range(12)]
        answers = service.together(*requests)
        statuses = [answer.status_code for answer in answers]
        assert statuses.count(200) == 3
        assert statuses.count(429) == 9
        for answer in answers:
            if answer.status_code == 429:
                assert "again" in is_problem(answer, 429)
                assert int(answer.headers["retry-after"]) >= 1
        # Nothing is left behind, also of requests that fail.
        for _ in range(4):
            is_problem(service.post("/v1/embed", ("a.png", b"nothing")), 422)
        assert service.app.in_flight == 0
        assert service.post("/v1/embed", ("a.png", picture())).status_code == 200


def test_requests_that_take_too_long_are_ended(run):
    with serving(run, request_seconds=0.3) as service:

        async def slow():
            yield b"--b\r\n"
            await asyncio.Event().wait()

        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        is_problem(service.ask("POST", "/v1/embed", content=slow(), headers=headers), 408)
        # The models' thread is at work on something long.
        gate, held = threading.Event(), service.models.batcher

        async def both():
            transport = httpx.ASGITransport(service.app)
            async with httpx.AsyncClient(transport=transport, base_url=ORIGIN) as client:
                blocked = asyncio.ensure_future(held.call(gate.wait))
                method, path, options = posting("/v1/embed", text="a")
                answer = await client.request(method, path, **options)
                gate.set()
                await blocked
                return answer

        answer = asyncio.run(both())
        assert "busy" in is_problem(answer, 503)
        assert "retry-after" in answer.headers
        assert service.post("/v1/embed", text="a").status_code == 200
        assert service.app.in_flight == 0


# What uploads do to their decoders


def _crash(path):
    os.kill(os.getpid(), signal.SIGSEGV)


def _hang(path):
    signal.pause()


def _fill(path):
    return len(bytearray(2**31))


class Reader:
    modality = "text"

    def __init__(self, decode):
        self.decode = decode

    def transform(self, found):
        return torch.tensor([float(found)])


def _size(path):
    assert Path(path).suffix in (".txt", "")
    return len(Path(path).read_bytes())


@pytest.fixture
def decoders(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(local, "_LINKS", str(tmp_path))
    made = Decoders(Limits(decoders=1, decode_seconds=0.5, decode_memory=2**29))
    made.warm()
    yield made
    made.close()


def test_a_decoder_that_crashes_hangs_or_grows_costs_its_own_upload(decoders, tmp_path):
    for function, words in ((_crash, "crashes"), (_hang, "timed out"), (_fill, "too large")):
        with pytest.raises(BrokenFile, match=words):
            asyncio.run(decoders.signal(Reader(function), b"abc", ".txt"))
        assert asyncio.run(decoders.signal(Reader(_size), b"abcd", ".txt")).item() == 4
    assert list(tmp_path.iterdir()) == []


def _once(mark, path):
    """Be killed at the first time."""
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 7


def test_an_upload_is_not_blamed_where_its_decoder_is_killed_from_outside(decoders, tmp_path):
    decoders.limits = Limits(decode_seconds=60.0)
    found = asyncio.run(decoders.signal(Reader(partial(_once, tmp_path / "mark")), b"abc", ".txt"))
    assert found.item() == 7


def _tell(path):
    link = Path(path).readlink()
    raise ValueError(f"bad {path} {link} {os.path.realpath(path)} in {Path(path).parent}")


def test_a_decoder_that_tells_of_the_server_is_not_passed_on(decoders, tmp_path):
    with pytest.raises(BrokenFile) as caught:
        asyncio.run(decoders.signal(Reader(_tell), b"abc", ".txt"))
    reason = caught.value.reason
    assert "bad" in reason
    assert "/" not in reason
    assert "memfd" not in reason


def test_uploads_leave_nothing_on_the_disk(decoders, tmp_path):
    found = []

    async def some():
        for size in (0, 1, 5_000_000):
            found.append((await decoders.signal(Reader(_size), bytes(size), "")).item())

    asyncio.run(some())
    assert found == [0, 1, 5_000_000]
    assert list(tmp_path.iterdir()) == []


def test_files_are_used_where_there_is_no_file_of_memory(decoders, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_IN_MEMORY", False)
    assert asyncio.run(decoders.signal(Reader(_size), b"abcd", ".txt")).item() == 4
    with pytest.raises(BrokenFile):
        asyncio.run(decoders.signal(Reader(_crash), b"abcd", ".txt"))
    assert list(tmp_path.iterdir()) == []
