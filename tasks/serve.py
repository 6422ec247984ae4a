"""The service: an encoder behind HTTP, for programs and for one page in a browser."""

import asyncio
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

import torch
import uvicorn

from mmssl.errors import Stopped, UserError
from modalities.joint import Tower
from tasks.features import ReportProgress
from tasks.parallel import cores
from tasks.search_index import SearchIndex
from tasks.serve_address import is_loopback
from tasks.serve_app import make_app
from tasks.serve_front import HEAD, LOOPBACK, Front
from tasks.serve_http import Connection
from tasks.serve_limits import Limits
from tasks.serve_log import json_lines, to_stderr
from tasks.serve_metrics import Metrics
from tasks.serve_models import Models, opened
from tasks.serve_search import Search

TOKEN = "MMSSL_TOKEN"
"""The environment variable of the token: a command line can be read by everybody on the machine."""
SWITCH = 0.0005
"""Seconds after which a thread that runs Python lets another one run; Python's own 0.005 are a request's whole time."""
KEPT = 75
"""Seconds for which a connection is kept without a request: longer than the 60 for which proxies keep theirs."""
GRACE = 60
"""Seconds in which requests that are there when the service is stopped must be done."""
FLUSH = 2.0
"""Seconds in which the last answers must be taken."""
BEARER = re.compile(r"[A-Za-z0-9._~+/-]+=*", re.ASCII)
"""What a token may look like in a header (RFC 6750, 2.1)."""


def serve(
    encoder: str | Path,
    *,
    data: str | Path | None = None,
    index: str | Path | None = None,
    modality: str | None = None,
    refresh: bool = True,
    progress: ReportProgress | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    limits: Limits | None = None,
    log: Callable[[str], None] = to_stderr,
) -> None:
    """Answer requests until a signal comes, then finish what is there and raise ``Stopped``.

    ``encoder`` is a run folder or an encoder folder. ``data`` are files that can be searched, with their
    ``index`` and ``modality``, both as ``SearchIndex`` has them; ``refresh`` brings the index up to date first.
    ``token`` is what requests must bring along, by default that of the environment. Raises UserError, one sentence,
    for a mistake, before anything is read where that can be.
    """
    token = check_address(host, port, os.environ.get(TOKEN) or None if token is None else token)
    if index is not None and data is None:
        raise UserError("--index is of files that --data names; give both")
    limits, metrics = limits or Limits(), Metrics()
    with _listening(host, port) as listening:
        # The event loop and the decoders need a core too; torch's threads, which wait in circles, would take it.
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores() - 1)))
        found = opened(encoder)
        searched = None if data is None else _search(found.towers, data, index, modality, refresh, limits, progress)
        models = Models(found, limits, metrics.batched, metrics.looked_up)
        try:
            names = (*LOOPBACK, host)
            app = make_app(models, limits, metrics, searched, token, names, log)
            _run(app, listening, host, f"{' and '.join(found.towers)}")
        finally:
            models.close()


def check_address(host: str, port: int, token: str | None) -> str | None:
    """Return the token, if there is one; raises UserError for a port that is none and for a token that cannot be sent.

    Also raises it where others than this machine could ask without a token.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: give a number from 0 (any free one) to 65535")
    if token is not None and BEARER.fullmatch(token) is None:
        raise UserError("the token must be of ASCII letters, digits and -._~+/ (RFC 6750), to fit into a header")
    if token is None and not is_loopback(host):
        raise UserError(
            f"--host {host} can be reached from other machines, so a token is needed: set {TOKEN} (or --token), "
            "or serve this machine alone with --host 127.0.0.1"
        )
    return token


def _search(
    towers: Mapping[str, Tower], data: str | Path, index: str | Path | None, modality: str | None, refresh: bool,
    limits: Limits, progress: ReportProgress | None,
) -> Search:  # fmt: skip
    found = SearchIndex(towers, data, index, modality=modality)
    if refresh:
        done = found.refresh(progress=progress)
        told = f"{done.embedded:,} new, {done.kept:,} as before, {done.dropped:,} gone, {len(done.broken):,} broken"
        print(f"mmssl: {len(found):,} files can be found ({told})", file=sys.stderr, flush=True)
    return Search(found, limits)


def _listening(host: str, port: int) -> socket.socket:
    try:
        ((family, kind, protocol, _, address), *_) = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError):
        raise UserError(f"--host {host} is not an address of this machine") from None
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.set_inheritable(False)
    except OSError as error:
        listening.close()
        raise UserError(
            f"{host}:{port} cannot be listened at ({error.strerror}); choose another --port, 0 for any free one"
        ) from None
    return listening


class Server(uvicorn.Server):
    """Uvicorn, which at a signal first answers everybody and only then stops listening."""

    def __init__(self, front: Front, ready: Callable[[], None] = lambda: None) -> None:
        """``ready`` is called when requests are taken."""
        config = uvicorn.Config(
            front,
            http=Connection,
            h11_max_incomplete_event_size=HEAD,
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            loop="asyncio",
            timeout_graceful_shutdown=GRACE,
            timeout_keep_alive=KEPT,
            ws="none",
        )
        super().__init__(config)
        self.front, self.ready = front, ready
        self.signal: int | None = None
        self._hurry = self._gave_up = False
        self._until = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take no more work; at the second signal, do no more either."""
        if self.front.stopping:
            self._hurry = True
            return
        self.signal, self._until = sig, time.monotonic() + GRACE
        self.front.stopping = True

    async def on_tick(self, counter: int) -> bool:
        """Return whether it is time to go."""
        # New requests are told so while there are others to finish.
        if self.front.stopping:
            if self.front.in_flight == 0 or self._gave_up:
                self.should_exit = True
            elif self._hurry or time.monotonic() > self._until:
                self._gave_up = True
                self.front.give_up()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close all connections, those last of which the answer is not taken."""
        ending = asyncio.get_running_loop().call_later(FLUSH, self._abort)
        await super().shutdown(sockets)
        ending.cancel()

    def _abort(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def _run(front: Front, listening: socket.socket, host: str, what: str) -> None:
    port = listening.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host

    def ready() -> None:
        print(f"mmssl: {what} at http://{shown}:{port}/ (stop with Ctrl-C)", file=sys.stderr, flush=True)

    server = Server(front, ready)
    # The threads hand over to each other many times in a request, and each time may wait so long for the interpreter.
    sys.setswitchinterval(SWITCH)
    with json_lines(front.log):
        server.run(sockets=[listening])
    number = server.signal or signal.SIGTERM
    lost = front.given_up
    told = "every request that was there is answered" if not lost else f"{lost} request{'s' * (lost > 1)} got no answer"
    raise Stopped(f"stopped by {signal.Signals(number).name}; {told}", number)
