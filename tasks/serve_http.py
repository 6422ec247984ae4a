"""HTTP on one connection: Uvicorn's h11 protocol, with an end to all that a stranger may leave unfinished.

What cannot be understood is answered by ``Front`` like every other request: told, noted and counted alike.
"""

import asyncio
import sys
from collections.abc import Iterator
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState

from tasks.serve_front import HEAD, PROBLEM, Front
from tasks.serve_problem import Problem

PROBE = 0.5
"""Seconds between two looks at whether somebody who sends no more is still there."""
WORDS = {
    431: f"the request's line and headers, or a line in its body, are longer than {HEAD:,} bytes",
    501: "of all transfer encodings only chunked is understood",
}


class Connection(H11Protocol):
    """A connection of somebody who may be slow, leave, never read or send nonsense."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = cast(Front, config.loaded_app).limits
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._refused = self._ended = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or say that there are too many."""
        super().connection_made(transport)
        # So writing is paused for exactly as long as something is there that has not been taken.
        transport.set_write_buffer_limits(0)
        self._end_after("head", self._limits.head_seconds)
        if len(self.connections) > _bounded(self._limits.connections) and not self._replaces_another():
            self._refuse(Problem(503, "too many connections are open; come again later", {"Retry-After": "1"}))

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        for timer in self._timers.values():
            timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Take bytes; a request that has begun must have all its headers soon."""
        if self._refused:
            self.cycle.message_event.set()
            return
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            data = data.lstrip(b"\r\n")  # an empty line before a request is none of it (RFC 9112, 2.2)
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._go_on("head")
        elif "head" not in self._timers:
            self._end_after("head", self._limits.head_seconds)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Answer what has come as a whole; whoever sends no more may still read."""
        self._ended = True
        if not self._refused and (self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]):
            self._refuse(Problem(400, "the request ends too early"))
        kept = self._answering() and (self._refused or not self.cycle.more_body)
        if kept and not self._refused and self.conn.their_http_version == b"1.1" and "probe" not in self._timers:
            self._probe()
        return kept

    def pause_writing(self) -> None:
        """Give whoever is to read so much time, and no more."""
        super().pause_writing()
        self._end_after("unread", self._limits.request_seconds)

    def resume_writing(self) -> None:
        """Go on: all that was there is taken."""
        super().resume_writing()
        self._go_on("unread")

    def on_response_complete(self) -> None:
        """Turn to the next request, if more can come."""
        super().on_response_complete()
        if self._ended and (not self._answering() or self.cycle.more_body):
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Have it said what is wrong with a request that is none."""
        status = getattr(sys.exception(), "error_status_hint", 400)
        self._refuse(Problem(status, WORDS.get(status, "this is not a request as HTTP/1.1 has it")))

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _end_after(self, why: str, seconds: float) -> None:
        self._timers[why] = self.loop.call_later(seconds, self.transport.abort)

    def _go_on(self, why: str) -> None:
        if why in self._timers:
            self._timers.pop(why).cancel()

    def _replaces_another(self) -> bool:
        # Of those that owe a request, or may send another, the one that has been silent for longest goes.
        silent = {one: since for one in self._others() if (since := one._silent_since()) is not None}
        if silent:
            min(silent, key=lambda one: silent[one]).transport.abort()
        return bool(silent)

    def _silent_since(self) -> float | None:
        if "head" in self._timers:
            return self._timers["head"].when() - self._limits.head_seconds
        idle = self.timeout_keep_alive_task
        return None if idle is None else idle.when() - self.timeout_keep_alive

    def _others(self) -> Iterator["Connection"]:
        others = (one for one in self.connections if isinstance(one, Connection))
        return (one for one in others if one is not self and not one.transport.is_closing())

    def _probe(self) -> None:
        # Who sends no more may have left: that shows only when what is written comes back. This may always be written.
        if self._answering() and not self.cycle.response_started and not self.transport.is_closing():
            interim = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
            self.transport.write(self.conn.send(interim))
            self._timers["probe"] = self.loop.call_later(PROBE, self._probe)

    def _refuse(self, problem: Problem) -> None:
        self._refused = True
        if self._answering():  # in the middle of a body, for which somebody waits
            cast(dict[str, Any], self.cycle.scope)[PROBLEM] = problem
            self.cycle.message_event.set()
            return
        scope = {
            "type": "http", "http_version": "1.1", "method": "", "path": "", "root_path": "", "headers": [],
            "query_string": b"", PROBLEM: problem,
        }  # fmt: skip
        self.cycle = RequestResponseCycle(
            scope=cast(Any, scope),
            conn=self.conn,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            on_response=self.on_response_complete,
        )
        task = self.loop.create_task(self.cycle.run_asgi(self.app))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)


def _bounded(connections: int) -> int:
    """Return how many connections there may be: no more than half of the files that this process may open."""
    import resource

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return connections if most == resource.RLIM_INFINITY else min(connections, most // 2)
