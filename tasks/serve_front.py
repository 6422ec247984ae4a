"""What every request passes before it reaches a route: who may ask, how much, how long; and what is noted of it.

This is plain ASGI, so that a body is measured while it comes in, and that nothing is read of one that is refused.
"""

import asyncio
import hashlib
import hmac
import json
import random
import time
import traceback
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tasks.serve_address import host_name, is_loopback
from tasks.serve_limits import Limits
from tasks.serve_log import now, to_stderr
from tasks.serve_metrics import Metrics
from tasks.serve_problem import MEDIA_TYPE, Problem, busy, stopping

WORK, FREE = "/v1/", "/v1/about"
"""Where routes that cost something are, and the one there that does not."""
OWN = ("/v1/", "/metrics")
"""Routes that need the token where there is one; the others show nothing of what is served."""
GONE = 499
"""What is noted of a request whose sender did not wait for the answer; the number is nginx's."""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
HEAD = 65_536
"""Bytes of a request's line and headers."""
BODIES = 8
"""How many of the longest bodies may be held together; beyond that each may still hold its share."""
PROBLEM = "mmssl.problem"
"""What a request's scope names a problem by that was seen before there was a request, or in its body."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})
DRAINED = 2.0
"""Seconds in which a refused body is read and thrown away: senders that still write might not see the answer."""
QUIET = 0.1
"""Seconds of silence after which somebody who sends nonsense is taken to read."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(eq=False)
class _Exchange:
    """One request and what is known of its answer."""

    id: str
    works: bool
    """Whether it costs something."""
    whole: bool
    """Whether the body has come in."""
    waited_for: bool
    """Whether the sender waits for a word (100 Continue) before the body."""
    received: int = 0
    held: int = 0
    sent: int = 0
    status: int = 0
    queued: bool = False
    """Whether it is among those that are worked on."""
    late: bool = False
    """Whether the body has stopped coming."""
    left: bool = False
    """Whether the sender has gone."""
    started: bool = False
    """Whether the answer has begun."""
    done: bool = False
    """Whether all of it is on its way."""
    deadline: asyncio.Timeout | None = None
    watch: "asyncio.Task[None] | None" = None
    begun: float = field(default_factory=time.monotonic)

    def end(self) -> None:
        """Let its time be up."""
        if self.deadline is not None and not self.deadline.expired():
            self.deadline.reschedule(0)


class Front:
    """An ASGI application around another one."""

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        metrics: Metrics,
        token: str | None = None,
        hosts: tuple[str, ...] = LOOPBACK,
        log: Callable[[str], None] = to_stderr,
    ) -> None:
        """``hosts`` are the names that a service without a token answers to, whatever the port."""
        self.app, self.limits, self.metrics, self.log = app, limits, metrics, log
        self._token = None if token is None else _digest(token)
        self._hosts = {host_name(host) for host in hosts}
        self._there: set[_Exchange] = set()
        self._queued = self._held = 0
        self.stopping = False
        self.given_up = 0
        """How many requests were ended without their answer."""

    @property
    def in_flight(self) -> int:
        """How many requests that cost something are there."""
        return len(self._there)

    def give_up(self) -> None:
        """End what is worked on; whoever waits for it is told."""
        self.given_up += len(self._there)
        for one in self._there:
            one.end()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; other kinds of ASGI messages go on as they are."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        _to_own_form(scope)
        headers = Headers(scope=scope)
        one = _Exchange(
            str(uuid.UUID(int=random.getrandbits(128), version=4)),
            works=scope["path"].startswith(WORK) and scope["path"] != FREE,
            whole=not (PROBLEM in scope or "transfer-encoding" in headers)
            and headers.get("content-length", "0") == "0",
            waited_for=headers.get("expect", "").lower() == "100-continue",
        )
        scope["request_id"] = one.id
        try:
            await self._answered(scope, receive, send, one)
        except ClientDisconnect:
            one.status = GONE
        finally:
            self._note(scope, one)

    async def _answered(self, scope: Scope, receive: Receive, send: Send, one: _Exchange) -> None:
        body, answer = self._measured(scope, receive, one), _sending(scope, receive, send, one)
        try:
            try:
                self._check(scope, one)
                self._enter(one)
                async with asyncio.timeout(self.limits.request_seconds) as one.deadline:
                    await self.app(scope, body, answer)
            finally:
                self._leave(one)
        except Problem as problem:
            await _send_problem(answer, problem, one)
        except ClientDisconnect:
            raise
        except Exception:
            if one.deadline is not None and one.deadline.expired():
                await _send_problem(answer, self._ended(one), one)
                return
            # Ours to mend: the log says where, the answer only that.
            self.log(json.dumps({"time": now(), "id": one.id, "error": traceback.format_exc()}))
            await _send_problem(answer, Problem(500, "the service has failed; its log says why"), one)

    def _enter(self, one: _Exchange) -> None:
        if one.whole:
            self._enqueue(one)
        if one.works:
            self._there.add(one)
            self.metrics.in_flight.set(len(self._there))

    def _leave(self, one: _Exchange) -> None:
        if one.watch is not None:
            one.watch.cancel()
        self._there.discard(one)
        self._queued -= one.queued
        self._held -= one.held
        self.metrics.in_flight.set(len(self._there))

    def _enqueue(self, one: _Exchange) -> None:
        """Let a request be worked on. Until its body is there it takes nobody's place, however slowly that comes."""
        if one.works and not one.queued:
            self._check_queue()
            self._queued += 1
            one.queued = True

    def _check_queue(self) -> None:
        if self._queued >= self.limits.queue:
            raise busy(f"{self._queued} requests are waiting already; send this one again later")

    def _ended(self, one: _Exchange) -> Problem:
        """Return why a request had to end before its answer; raises ClientDisconnect where nobody waits for that."""
        if one.left or one.started:
            raise ClientDisconnect
        if self.given_up:
            return Problem(503, "the service was stopped before this was answered", {"Retry-After": "5"})
        one.late = not one.whole
        seconds = f"{self.limits.request_seconds:g} s"
        if one.whole:
            return Problem(503, f"no answer was found within {seconds}; the service is busy", {"Retry-After": "1"})
        return Problem(408, f"the request did not come in within {seconds}")

    def _check(self, scope: Scope, one: _Exchange) -> None:
        if PROBLEM in scope:
            raise scope[PROBLEM]
        headers = Headers(scope=scope)
        hosts, origin = headers.getlist("host"), headers.get("origin")
        if scope["http_version"] not in ("1.0", "1.1"):
            raise Problem(505, "this service speaks HTTP/1.1")
        if len(hosts) != 1 and scope["http_version"] == "1.1":
            raise Problem(400, f"a request names one host, and this one {len(hosts)}")
        if len(headers.getlist("authorization")) > 1:
            raise Problem(400, "a request has one Authorization header at most")
        host = "".join(hosts[:1]).lower()
        # A page from elsewhere may lead its own name to this address (DNS rebinding), and could then read answers.
        if self._token is None and not self._is_own(host_name(host)):
            raise Problem(421, "this service answers to the name of its own machine alone, unless it has a token")
        # Browsers name the page that asks. Programs do not, and may; and who has the token may be anybody.
        if self._token is None and origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
            raise Problem(403, "pages of other origins may not use this service")
        if self._token is not None and scope["path"].startswith(OWN):
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(_digest(given.strip()), self._token):
                words = "the token is not the right one" if given else "a token is needed: Authorization: Bearer TOKEN"
                raise Problem(401, words, {"WWW-Authenticate": "Bearer"})
        if scope["method"] not in METHODS:
            raise Problem(501, "this method is none of HTTP's own")
        line = len(scope["path"]) + len(scope["query_string"])
        if sum(len(name) + len(value) for name, value in scope["headers"]) + line > HEAD:
            raise Problem(431, f"the request's line and headers are longer than {HEAD:,} bytes")
        if self.stopping and one.works:
            raise stopping()
        if one.works:
            self._check_queue()
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:18]) > self.limits.body:
            raise self._too_long()

    def _is_own(self, name: str | None) -> bool:
        return name is not None and (name in self._hosts or is_loopback(name))

    def _too_long(self) -> Problem:
        return Problem(413, f"the request is longer than the {self.limits.body:,} bytes that are allowed")

    def _measured(self, scope: Scope, receive: Receive, one: _Exchange) -> Receive:
        async def measured() -> Message:
            one.waited_for = False
            try:
                async with asyncio.timeout(self.limits.body_seconds):
                    message = await receive()
            except TimeoutError:
                one.late = True
                raise Problem(408, f"nothing of the body came in {self.limits.body_seconds:g} s") from None
            if PROBLEM in scope:
                raise scope[PROBLEM]
            if message["type"] == "http.request":
                self._hold(one, len(message.get("body", b"")))
                if not message.get("more_body", False):
                    one.whole = True
                    self._enqueue(one)
                    one.watch = asyncio.create_task(_watch(receive, one))
            return message

        return measured

    def _hold(self, one: _Exchange, size: int) -> None:
        one.received += size
        if one.received > self.limits.body:
            raise self._too_long()
        one.held += size
        self._held += size
        # Whoever holds no more than a share is let in, so that a few who fill the room do not keep everybody out.
        room = BODIES * self.limits.body
        if self._held > room and one.held > room // self.limits.queue:
            # Given back at once, and not when the refusal has been read: else those who come meanwhile go too.
            self._held -= one.held
            one.held = 0
            raise busy("the service holds as much of other requests as it can; send this one again later")

    def _note(self, scope: Scope, one: _Exchange) -> None:
        seconds = time.monotonic() - one.begun
        route = self._route(scope)
        self.metrics.answered(route, one.status, seconds)
        method = scope["method"] if scope["method"] in METHODS else "other"
        entry: dict[str, Any] = {"time": now(), "id": one.id, "method": method, "route": route, "status": one.status}
        self.log(json.dumps({**entry, "ms": round(1000 * seconds, 1), "bytes": one.received, "sent": one.sent}))

    def _route(self, scope: Scope) -> str:
        """Return the route, not the path: that is a stranger's, and may hold anything."""
        found = scope.get("route")
        if found is None:  # refused before it got there
            there = (route for route in getattr(self.app, "routes", ()) if route.matches(scope)[0] is not Match.NONE)
            found = next(there, None)
        return str(getattr(found, "path", "none"))


def _to_own_form(scope: Scope) -> None:
    """Make a request for ``http://host/path``, as proxies get it, one for the path at that host (RFC 9112, 3.2.2)."""
    scheme, found, rest = scope["path"].partition("://")
    if found and scheme.lower() in ("http", "https"):
        host, _, path = rest.partition("/")
        others = [(name, value) for name, value in scope["headers"] if name != b"host"]
        scope.update(path=f"/{path}", headers=[(b"host", host.encode("latin-1", "replace")), *others])


async def _watch(receive: Receive, one: _Exchange) -> None:
    """End a request, of which the body is there, when its sender leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    if not one.done:
        one.left = True
        one.end()


async def _drain(scope: Scope, receive: Receive, one: _Exchange) -> None:
    """Throw away what is still coming, for a while; of what cannot be understood the end shows as silence alone."""
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAINED):
            while not one.whole:
                async with asyncio.timeout(QUIET if PROBLEM in scope else DRAINED):
                    message = await receive()
                if message["type"] != "http.request":
                    return
                one.received += len(message.get("body", b""))
                one.whole = PROBLEM not in scope and not message.get("more_body", False)


def _digest(token: str) -> bytes:
    # Of one length, so that comparing takes the same time whatever was sent.
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _sending(scope: Scope, receive: Receive, send: Send, one: _Exchange) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            one.started, one.status = True, message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in {**HEADERS, "X-Request-ID": one.id}.items():
                headers[name] = value
            headers.setdefault("Cache-Control", "no-store")
            if not (one.whole or one.late or one.waited_for):  # who still writes might not see the answer
                await _drain(scope, receive, one)
            # What follows on this connection would be taken for the rest of the body, or is of another protocol.
            if not one.whole or message["status"] == 505:
                headers["Connection"] = "close"
        elif message["type"] == "http.response.body":
            one.sent += len(message.get("body", b"")) if scope["method"] != "HEAD" else 0
            one.done = not message.get("more_body", False)
        await send(message)

    return sending


async def _send_problem(send: Send, problem: Problem, one: _Exchange) -> None:
    if one.started:
        return  # half an answer cannot be taken back; the connection ends
    body = problem.body(one.id)
    headers = {"Content-Type": MEDIA_TYPE, "Content-Length": str(len(body)), **problem.headers}
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
