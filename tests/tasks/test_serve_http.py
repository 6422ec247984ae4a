"""The service's HTTP by the byte, in front of a small application: who is slow, leaves, never reads or sends nonsense.

Planted bugs that fail here: see the name of each test; the plain protocol of Uvicorn fails all but the first.
"""

import asyncio
import io
import json
import logging
import socket
import struct
import warnings
from contextlib import asynccontextmanager

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tasks import serve_front
from tasks.serve import Server
from tasks.serve_front import Front
from tasks.serve_limits import Limits
from tasks.serve_log import json_lines
from tasks.serve_metrics import Metrics
from tasks.serve_problem import MEDIA_TYPE, Problem

HOST = b"Host: 127.0.0.1\r\n"
GET = b"GET /healthz HTTP/1.1\r\n" + HOST
POST = b"POST /v1/length HTTP/1.1\r\n" + HOST


class Small:
    """A service that is open, with requests that wait for ``gate``."""

    def __init__(self, port, front, server):
        self.port, self.front, self.server = port, front, server
        self.gate, self.waiting, self.cancelled = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def link(self, *sent):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        for one in sent:
            writer.write(one)
        return reader, writer

    async def talk(self, *sent):
        """Send bytes and return all that comes back until the service closes."""
        reader, writer = await self.link(*sent)
        found = await reader.read()
        writer.close()
        return found


@asynccontextmanager
async def small(**limits):
    lines = []

    async def length(request: Request):
        return JSONResponse(len(await request.body()))

    async def wait(request: Request):
        await request.body()
        one.waiting.set()
        try:
            await one.gate.wait()
        except asyncio.CancelledError:
            one.cancelled.set()
            raise
        return Response(b"waited")

    async def much(request: Request):
        return Response(bytes(30_000_000))

    routes = [
        Route("/healthz", lambda request: Response(b"ok")),
        Route("/v1/about", lambda request: Response(b"ok")),
        Route("/v1/length", length, methods=["POST"]),
        Route("/v1/wait", wait, methods=["POST"]),
        Route("/v1/much", much),
    ]

    async def told(request: Request, error: Problem):
        return Response(error.body(request.scope["request_id"]), error.status, error.headers, MEDIA_TYPE)

    front = Front(
        Starlette(routes=routes, exception_handlers={Problem: told}), Limits(**limits), Metrics(), log=lines.append
    )
    listening = socket.create_server(("127.0.0.1", 0))
    server = Server(front)
    server.config.timeout_keep_alive = 600  # whatever is to end must end for its own reason
    one = Small(listening.getsockname()[1], front, server)
    one.lines = lines
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    await server.startup([listening])
    running = asyncio.create_task(server.main_loop())
    try:
        yield one
    finally:
        server.should_exit = True
        await running
        await server.shutdown([listening])


def parts(answer):
    """Return status, headers and body of an answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    return int(first.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body


def problem(answer, status):
    """Whether an answer is a problem with all headers; returns its sentence."""
    found, headers, body = parts(answer)
    assert found == status, answer
    assert headers["content-type"] == "application/problem+json"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["connection"] == "close"
    return json.loads(body)["detail"]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def test_requests_follow_each_other_on_a_connection():
    async def main():
        async with small() as one:
            found = await one.talk(
                GET + b"\r\n" + POST + b"Content-Length: 3\r\n\r\nabc" + GET + b"Connection: close\r\n\r\n"
            )
            assert found.count(b"HTTP/1.1 200") == 3
            found = await one.talk(b"\r\n" + GET + b"Connection: close\r\n\r\n")  # an empty line before it is no harm
            assert parts(found)[0] == 200
            head = await one.talk(b"HEAD /healthz HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n")
            status, headers, body = parts(head)
            assert (status, headers["content-length"], body) == (200, "2", b"")
            assert json.loads(one.lines[-1])["sent"] == 0
            away = await one.talk(b"GET http://127.0.0.1:9/healthz HTTP/1.1\r\nHost: a.b\r\nConnection: close\r\n\r\n")
            assert parts(away)[0] == 200
            assert b"421" in await one.talk(
                b"GET http://evil.com/healthz HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
            )

    run(main())


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 300_000, 431),
        (b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: a\r\n" * 60_000, 431),
        (b"GET /" + b"a" * 300_000, 431),
        (GET + b"X: " + b"a" * 70_000 + b"\r\nConnection: close\r\n\r\n", 431),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"X: a\r\n" * 60_000, 431),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\nzz\r\n", 400),
        (POST + b"Transfer-Encoding: gzip\r\n\r\n", 501),
        (b"\x16\x03\x01\x02\x00\x01", 400),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
        (GET + HOST + b"\r\n", 400),
        (GET + b"Authorization: Bearer a\r\nAuthorization: Bearer b\r\nConnection: close\r\n\r\n", 400),
        (b"GET /healthz?" + b"a" * 70_000 + b" HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n", 431),
        (b"GET /healthz HTTP/2.0\r\n" + HOST + b"Connection: close\r\n\r\n", 505),
        (POST + b"Content-Length: +3\r\n\r\nabc", 400),
    ],
)
def test_what_is_no_request_is_told_noted_and_counted(sent, status):
    async def main():
        async with small() as one:
            assert problem(await one.talk(sent), status)
            (line,) = map(json.loads, one.lines)
            assert line["status"] == status
            assert f'status="{status}"' in one.front.metrics.text().decode()
            assert parts(await one.talk(GET + b"Connection: close\r\n\r\n"))[0] == 200

    run(main())


def test_methods_that_are_none_are_told():
    async def main():
        async with small() as one:
            for method in (b"BREW", b"get"):
                assert b"501" in await one.talk(
                    method + b" /healthz HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
                )
            assert parts(await one.talk(b"PUT /healthz HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"))[0] == 405
            assert [json.loads(line)["route"] for line in one.lines] == ["/healthz"] * 3

    run(main())


def test_headers_and_bodies_that_stop_coming_are_given_up():
    async def main():
        async with small(head_seconds=0.05, body_seconds=0.05) as one:
            for sent in (b"", b"GET /healthz HTTP/1.1\r\nX: a"):
                assert await one.talk(sent) == b""
            reader, writer = await one.link(GET + b"\r\n")
            await reader.readuntil(b"ok")
            writer.write(b"GET")
            assert await reader.read() == b""
            writer.close()
            assert "nothing of the body" in problem(await one.talk(POST + b"Content-Length: 3\r\n\r\na"), 408)

    run(main())


def test_answers_that_nobody_takes_are_given_up():
    async def main():
        async with small(request_seconds=0.1) as one:
            _, writer = await one.link(b"GET /v1/much HTTP/1.1\r\n" + HOST + b"\r\n")
            while not one.server.server_state.connections:
                await asyncio.sleep(0)
            (connection,) = one.server.server_state.connections
            # However little it is: any at all counts.
            assert connection.transport.get_write_buffer_limits() == (0, 0)
            while one.server.server_state.connections:
                await asyncio.sleep(0.01)
            writer.close()

    run(main())


def test_there_are_only_so_many_connections():
    async def main():
        async with small(connections=2) as one:
            links = [await one.link(b"POST /v1/wait HTTP/1.1\r\n" + HOST + b"\r\n") for _ in range(2)]
            while one.front.in_flight < 2:
                await asyncio.sleep(0)
            assert "too many connections" in problem(await one.talk(GET + b"\r\n"), 503)
            one.gate.set()
            for reader, _ in links:
                await reader.readuntil(b"waited")
            # Those that might ask for more make room, the one that was answered first first.
            assert parts(await one.talk(GET + b"Connection: close\r\n\r\n"))[0] == 200
            assert await links[0][0].read() == b""
            for _, writer in links:
                writer.close()
            # Those that ask for nothing make room.
            silent = [await one.link() for _ in range(5)]
            assert parts(await one.talk(GET + b"Connection: close\r\n\r\n"))[0] == 200
            assert await silent[0][0].read() == b""
            links = silent
            for _, writer in links:
                writer.close()

    run(main())


def test_slow_bodies_take_nobodys_place_and_only_so_much_room(monkeypatch):
    monkeypatch.setattr(serve_front, "DRAINED", 0.05)

    async def main():
        async with small(queue=10, body=1000) as one:
            begun = POST + b"Content-Length: 1000\r\n\r\n" + bytes(990)
            slow = [await one.link(begun) for _ in range(8)]
            slow += [await one.link(POST + b"Content-Length: 9\r\n\r\n") for _ in range(9)]
            while one.front._held < 8 * 990:
                await asyncio.sleep(0)
            # The ninth is one too many; whoever holds less is let in.
            assert "send this one again" in problem(await one.talk(begun), 429)
            # One that is refused takes no room, however long it takes to see that.
            monkeypatch.setattr(serve_front, "DRAINED", 60)
            refused = await one.link(begun)
            while len(one.front._there) < len(slow) + 1 or one.front._held != 8 * 990:
                await asyncio.sleep(0)
            slow.append(refused)
            for size in (b"3", b"700"):
                sent = POST + b"Content-Length: " + size + b"\r\nConnection: close\r\n\r\n" + bytes(int(size))
                assert (await one.talk(sent)).endswith(size)
            for _, writer in slow:
                writer.close()
            while one.front.in_flight:
                await asyncio.sleep(0)
            assert one.front._held == one.front._queued == 0

    run(main())


def test_what_is_not_work_is_answered_while_all_places_are_taken():
    async def main():
        async with small(queue=1) as one:
            _, writer = await one.link(b"POST /v1/wait HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\n\r\nx")
            await one.waiting.wait()
            assert parts(await one.talk(POST + b"Connection: close\r\n\r\n"))[0] == 429
            assert parts(await one.talk(b"GET /v1/about HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"))[0] == 200
            one.gate.set()
            writer.close()
            assert [json.loads(line)["route"] for line in one.lines[:2]] == ["/v1/length", "/v1/about"]

    run(main())


@pytest.mark.parametrize("how", ["reset", "close"])
def test_work_is_dropped_when_its_client_leaves(how):
    async def main():
        async with small() as one:
            _, writer = await one.link(
                b"POST /v1/wait HTTP/1.1\r\n" + HOST + b"Content-Length: 70000\r\n\r\n" + bytes(70_000)
            )
            await one.waiting.wait()
            if how == "reset":
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.close()
            await one.cancelled.wait()
            while one.front.in_flight:
                await asyncio.sleep(0)
            assert [json.loads(line)["status"] for line in one.lines] == [499]

    run(main())


def test_who_sends_no_more_is_answered():
    async def main():
        async with small() as one:
            reader, writer = await one.link(b"POST /v1/wait HTTP/1.1\r\n" + HOST + b"\r\n")
            await one.waiting.wait()
            writer.write_eof()
            # That the connection is there is looked at while the work goes on.
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            one.gate.set()
            assert (await reader.read()).endswith(b"waited")
            writer.close()
            reader, writer = await one.link((POST + b"Content-Length: 3\r\n\r\nabc") * 3)
            writer.write_eof()
            assert (await reader.read()).count(b"HTTP/1.1 200") == 3
            writer.close()
            for sent, status in (
                (POST.replace(b"/1.1", b"/1.0") + b"Content-Length: 3\r\n\r\nabc", 200),
                (POST + b"Content-Length: 9\r\n\r\nabc", 400),
                (POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", 400),
                (b"GET /x y HTTP/1.1\r\n\r\n", 400),
                (GET, 400),
            ):
                reader, writer = await one.link(sent)
                writer.write_eof()
                assert parts(await reader.read())[0] == status, sent
                writer.close()

    run(main())


def test_a_connection_whose_body_was_not_read_is_closed_or_goes_on():
    async def main():
        async with small(body=1000) as one:
            wait = POST + b"Content-Length: 99999\r\nExpect: 100-continue\r\n\r\n"
            assert "longer than" in problem(await one.talk(wait), 413)
            # What comes is thrown away, so that the connection is good for another.
            whole = POST + b"Content-Length: 99999\r\n\r\n" + bytes(99_999)
            first, second = (await one.talk(whole + GET + b"Connection: close\r\n\r\n")).split(b"HTTP/1.1 ")[1:]
            assert first.startswith(b"413")
            assert second.startswith(b"200")
            right = POST + b"Content-Length: 3\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
            reader, writer = await one.link(right)
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b"abc")
            assert (await reader.read()).endswith(b"3")
            writer.close()

    run(main())


def test_an_offer_of_another_protocol_costs_no_body():
    async def main():
        async with small() as one:
            for other in (b"h2c", b"websocket"):
                sent = POST + b"Content-Length: 3\r\nConnection: Upgrade, close\r\nUpgrade: " + other + b"\r\n\r\n"
                assert (await one.talk(sent, b"abc")).endswith(b"3")

    run(main())


def test_a_second_signal_ends_what_is_there_and_counts_it():
    async def main():
        async with small() as one:
            wait = b"POST /v1/wait HTTP/1.1\r\n" + HOST
            whole = await one.link(wait + b"\r\n")
            await one.waiting.wait()
            one.server.handle_exit(2, None)
            assert "stopping" in problem(await one.talk(POST + b"Connection: close\r\n\r\n"), 503)
            one.server.handle_exit(2, None)
            assert "before this was answered" in json.loads(parts(await whole[0].readuntil(b"}"))[2])["detail"]
            assert one.front.given_up == 1
            assert not any("Traceback" in line for line in one.lines)
            whole[1].close()

    run(main())


def test_the_time_to_finish_ends():
    async def main():
        async with small() as one:
            reader, writer = await one.link(b"POST /v1/wait HTTP/1.1\r\n" + HOST + b"\r\n")
            await one.waiting.wait()
            one.server.handle_exit(15, None)
            one.server._until = 0.0
            assert parts(await reader.readuntil(b"}"))[0] == 503
            assert one.front.given_up == 1
            writer.close()

    run(main())


def test_what_libraries_say_is_json():
    lines, err = [], io.StringIO()
    logging.getLogger("python_multipart").debug("not told")
    with json_lines(lines.append), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", err)
        logging.getLogger("python_multipart").warning("a stranger's byte")
        logging.getLogger("uvicorn").warning("two\n%s", "lines")
        logging.getLogger("asyncio").error("bad", exc_info=ValueError("why"))
        warnings.warn("old", stacklevel=1)
    first, second, third = map(json.loads, lines)
    assert (first["of"], first["said"]) == ("uvicorn", "two\nlines")
    assert "ValueError: why" in second["error"]
    assert "old" in third["said"]
    assert err.getvalue() == ""
