"""``mmssl serve`` as a process: what it says, whom it lets in, how it stops.

Planted bugs that fail here: a signal that ends what is in flight, an exit before its answer, one that lets new work in.
"""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from serving import picture
from towers import untrained

from tasks.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("run") / "clip", "image", "text")


@contextmanager
def started(*words, **environment):
    """Start the service on a free port; yields the process, its port, and what it has said so far."""
    inherited = {name: value for name, value in os.environ.items() if name != "MMSSL_TOKEN"}
    process = subprocess.Popen(
        [sys.executable, "-m", "mmssl", "serve", *map(str, words), "--port", "0", "--decoders", "1"],
        cwd=ROOT, env={**inherited, "OMP_NUM_THREADS": "1", **environment}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if match := re.search(r"http://127\.0\.0\.1:(\d+)/", line):
                break
        else:
            raise AssertionError("".join(said))
        yield process, int(match[1]), said
    finally:
        process.kill()
        process.communicate(timeout=60)


def question(port, method, path, body=b"", **headers):
    """Ask on a connection of its own; returns status, headers and what JSON says."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    link.request(method, path, body, headers)
    return answer(link)


def answer(link):
    got = link.getresponse()
    found = got.status, dict(got.getheaders()), json.loads(got.read())
    link.close()
    return found


FORM = {"Content-Type": "multipart/form-data; boundary=b"}


def form(data, name="a.png"):
    head = f'--b\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
    return head.encode() + data + b"\r\n--b--\r\n"


def test_a_signal_finishes_what_is_in_flight_and_refuses_what_is_new(run, tmp_path):
    with started(run, TMPDIR=str(tmp_path)) as (process, port, _):
        body = form(picture())
        link = half_sent(port, body)
        process.send_signal(signal.SIGTERM)
        while question(port, "GET", "/healthz")[0] != 503:
            pass
        status, headers, problem = question(port, "POST", "/v1/embed", form(picture()), **FORM)
        assert (status, problem["title"]) == (503, "Service Unavailable")
        assert int(headers["retry-after"]) > 0
        # For as long as something is in flight, whoever comes is told.
        for _ in range(60):
            assert question(port, "GET", "/healthz")[0] == 503
        link.send(body[100:])
        status, _, found = answer(link)
        assert status == 200
        assert len(found["vector"]) == 8
        _, rest = process.communicate(timeout=60)
        # DESIGN's table: stopped by SIGTERM, so that a command behind it does not go on.
        assert process.returncode == 143
        last = rest.strip().splitlines()[-1]
        assert last == "mmssl: stopped by SIGTERM; every request that was there is answered"
        assert "Traceback" not in rest
        assert [path for path in tmp_path.iterdir() if path.name.startswith("mmssl-serve")] == []
        assert children(process.pid) == []


def half_sent(port, body):
    """Return a connection whose request is there, but for most of its body."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    link.putrequest("POST", "/v1/embed")
    for name, value in {**FORM, "Content-Length": str(len(body))}.items():
        link.putheader(name, value)
    link.endheaders(body[:100])
    while not in_flight(port):
        pass
    return link


def test_a_second_signal_ends_what_is_there_and_all_that_is_said_is_json(run):
    with started(run) as (process, port, _):
        with socket.create_connection(("127.0.0.1", port)) as nonsense:
            nonsense.sendall(b"nonsense\r\n\r\n")
            assert b" 400 " in nonsense.recv(1000)
        link = half_sent(port, form(picture()))
        process.send_signal(signal.SIGINT)
        while question(port, "GET", "/healthz")[0] != 503:
            pass
        process.send_signal(signal.SIGINT)
        status, _, problem = answer(link)
        assert (status, problem["detail"]) == (503, "the service was stopped before this was answered")
        _, rest = process.communicate(timeout=60)
        assert process.returncode == 130
        *lines, last = rest.strip().splitlines()
        assert last == "mmssl: stopped by SIGINT; 1 request got no answer"
        assert {json.loads(line)["status"] for line in lines} >= {400, 503}
        assert "Traceback" not in rest


def in_flight(port):
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    link.request("GET", "/metrics")
    text = link.getresponse().read().decode()
    link.close()
    return "mmssl_requests_in_flight 1.0" in text


def children(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[1] == str(pid):
            found.append(stat)
    return found


def test_it_says_where_it_is_searches_and_takes_the_token_of_the_environment(run, photos, capsys):
    with started(run, "--data", photos, MMSSL_TOKEN="sesame") as (process, port, said):
        assert "mmssl: 30 files can be found (30 new, 0 as before, 0 gone, 0 broken)\n" in said
        assert re.fullmatch(r"mmssl: image and text at http://127\.0\.0\.1:\d+/ \(stop with Ctrl-C\)\n", said[-1])
        assert question(port, "GET", "/v1/about")[0] == 401
        own = {"Authorization": "Bearer sesame"}
        assert question(port, "GET", "/v1/about", **own)[2]["searched"] == 30
        text = b'--b\r\nContent-Disposition: form-data; name="text"\r\n\r\na wave\r\n--b--\r\n'
        status, _, hits = question(port, "POST", "/v1/search", text, **own, **FORM)
        assert status == 200
        assert len(hits) == 20
        # The port is taken: one sentence, before anything is loaded.
        assert main(["serve", str(run), "--port", str(port)]) == 2
        (sentence,) = capsys.readouterr().err.strip().splitlines()
        assert sentence.startswith(f"mmssl: 127.0.0.1:{port} cannot be listened at")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--host", "0.0.0.0"], "set MMSSL_TOKEN"),
        (["--host", "nowhere.invalid", "--token", "t"], "--host nowhere.invalid is not an address of this machine"),
        (["--port", "65536"], "--port 65536"),
        (["--token", "two words"], "RFC 6750"),
        (["--index", "a.arrow"], "--data"),
        (["--max-mb", "0"], "the limit body is 0"),
        (["--data", "nowhere"], "nowhere does not exist"),
    ],
)
def test_mistakes_of_the_command_line_get_one_sentence(run, words, sentence, capsys, monkeypatch):
    monkeypatch.delenv("MMSSL_TOKEN", raising=False)
    assert main(["serve", str(run), "--port", "0", *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said.strip().splitlines()) == 1


def test_folders_that_hold_no_encoder_are_told(tmp_path, capsys):
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2
    assert main(["serve", str(tmp_path / "no"), "--port", "0"]) == 2
    assert "does not exist" in capsys.readouterr().err
