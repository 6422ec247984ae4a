"""What every request passes before it reaches a route: who may ask, how much, how long; and what is noted of it.

This is plain ASGI, so that a body is measured while it comes in, and that nothing is read of one that is refused.
"""

import asyncio
import hashlib
import hmac
import json
import random
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tasks.serve_limits import Limits
from tasks.serve_metrics import Metrics
from tasks.serve_problem import MEDIA_TYPE, Problem, busy, stopping

WORK = "/v1/"
"""Where routes that cost something are."""
OWN = ("/v1/", "/metrics")
"""Routes that need the token where there is one; the others show nothing of what is served."""
GONE = 499
"""What is noted of a request whose sender did not wait for the answer; the number is nginx's."""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
DRAINED = 2.0
"""Seconds in which a refused body is read and thrown away: senders that still write might not see the answer."""
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


def to_stderr(line: str) -> None:
    """Write a line of the log."""
    print(line, file=sys.stderr, flush=True)


@dataclass
class _Exchange:
    """One request and what is known of its answer."""

    id: str
    received: int = 0
    sent: int = 0
    status: int = 0
    whole: bool = False
    """Whether the body has come in."""
    started: bool = False
    """Whether the answer has begun."""
    begun: float = field(default_factory=time.monotonic)


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
        self.app, self.limits, self.metrics, self._log = app, limits, metrics, log
        self._token = None if token is None else _digest(token)
        self._hosts = {host.lower() for host in hosts}
        self.in_flight = 0
        self.stopping = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; other kinds of ASGI messages go on as they are."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        one = _Exchange(str(uuid.UUID(int=random.getrandbits(128), version=4)))
        scope["request_id"] = one.id
        works = scope["path"].startswith(WORK)
        try:
            await self._answered(scope, receive, send, one, works)
        except ClientDisconnect:
            one.status = GONE
        finally:
            self._note(scope, one)

    async def _answered(self, scope: Scope, receive: Receive, send: Send, one: _Exchange, works: bool) -> None:
        answer, body = _sending(send, one), self._measured(receive, one)
        try:
            try:
                self._check(scope, works)
            except Problem:
                if Headers(scope=scope).get("expect", "").lower() != "100-continue":  # who asks first has not sent
                    await _drained(receive)
                raise
            self.in_flight += works
            self.metrics.in_flight.set(self.in_flight)
            try:
                async with asyncio.timeout(self.limits.request_seconds):
                    await self.app(scope, body, answer)
            finally:
                self.in_flight -= works
                self.metrics.in_flight.set(self.in_flight)
        except Problem as problem:
            await _send_problem(answer, problem, one)
        except TimeoutError:
            seconds = f"{self.limits.request_seconds:g} s"
            late = busy(f"no answer was found within {seconds}; the service is busy")
            slow = Problem(408, f"the request did not come in within {seconds}")
            await _send_problem(answer, late if one.whole else slow, one)
        except ClientDisconnect:
            raise
        except Exception:
            # Ours to mend: the log says where, the answer only that.
            self._log(json.dumps({"id": one.id, "error": traceback.format_exc()}))
            await _send_problem(answer, Problem(500, "the service has failed; its log says why"), one)

    def _check(self, scope: Scope, works: bool) -> None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        # A page from elsewhere may lead its own name to this address (DNS rebinding), and could then read answers.
        if self._token is None and _name(host) not in self._hosts:
            raise Problem(421, "this service answers to the name of its own machine alone, unless it has a token")
        # Browsers name the page that asks. Programs do not, and may; and who has the token may be anybody.
        if self._token is None and origin is not None and origin.lower().partition("://")[2] != host:
            raise Problem(403, "pages of other origins may not use this service")
        if self._token is not None and scope["path"].startswith(OWN):
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(_digest(given.strip()), self._token):
                words = "the token is not the right one" if given else "a token is needed: Authorization: Bearer TOKEN"
                raise Problem(401, words, {"WWW-Authenticate": "Bearer"})
        if self.stopping and works:
            raise stopping()
        if works and self.in_flight >= self.limits.queue:
            raise busy(f"{self.in_flight} requests are waiting already; send this one again later")
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:18]) > self.limits.body:
            raise self._too_long()

    def _too_long(self) -> Problem:
        return Problem(413, f"the request is longer than the {self.limits.body:,} bytes that are allowed")

    def _measured(self, receive: Receive, one: _Exchange) -> Receive:
        async def measured() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                one.received += len(message.get("body", b""))
                one.whole = not message.get("more_body", False)
                if one.received > self.limits.body:
                    if not one.whole:
                        await _drained(receive)
                    raise self._too_long()
            return message

        return measured

    def _note(self, scope: Scope, one: _Exchange) -> None:
        seconds = time.monotonic() - one.begun
        # The route, not the path: that is a stranger's, and may hold anything.
        route = str(getattr(scope.get("route"), "path", "none"))
        self.metrics.answered(route, one.status, seconds)
        method = scope["method"] if scope["method"] in METHODS else "other"
        entry: dict[str, Any] = {"time": _now(), "id": one.id, "method": method, "route": route, "status": one.status}
        self._log(json.dumps({**entry, "ms": round(1000 * seconds, 1), "bytes": one.received, "sent": one.sent}))


async def _drained(receive: Receive) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAINED):
            while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                pass


METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _digest(token: str) -> bytes:
    # Of one length, so that comparing takes the same time whatever was sent.
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _name(host: str) -> str:
    """Return a Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _sending(send: Send, one: _Exchange) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            one.started, one.status = True, message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in {**HEADERS, "X-Request-ID": one.id}.items():
                headers[name] = value
            headers.setdefault("Cache-Control", "no-store")
        elif message["type"] == "http.response.body":
            one.sent += len(message.get("body", b""))
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
