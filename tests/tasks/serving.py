"""What the tests of the service share: one in this process, asked without a network, and what goes into a request."""

import asyncio
import io
import json
from contextlib import contextmanager

import httpx
import numpy as np
import PIL.Image

from tasks.search_index import SearchIndex
from tasks.serve_app import make_app
from tasks.serve_front import LOOPBACK
from tasks.serve_limits import Limits
from tasks.serve_metrics import Metrics
from tasks.serve_models import Models, opened
from tasks.serve_search import Search

ORIGIN = "http://127.0.0.1"


class Service:
    """A service and a client to it."""

    def __init__(self, run, limits, data, token, index, hosts):
        self.metrics, self.lines = Metrics(), []
        found = opened(run)
        search = None
        if data is not None:
            of = SearchIndex(found.towers, data, index)
            of.refresh(workers=0)
            search = Search(of, limits)
        self.models = Models(found, limits, self.metrics.batched, self.metrics.looked_up)
        self.app = make_app(self.models, limits, self.metrics, search, token, hosts, self.lines.append)

    def together(self, *requests):
        """Send requests, each (method, path, options of httpx), at the same time; returns the answers."""

        async def send():
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url=ORIGIN) as client:
                return await asyncio.gather(*(client.request(how, path, **more) for how, path, more in requests))

        return asyncio.run(send())

    def ask(self, method, path, **options):
        return self.together((method, path, options))[0]

    def get(self, path, **options):
        return self.ask("GET", path, **options)

    def post(self, path, file=None, **fields):
        return self.together(posting(path, file, **fields))[0]

    @property
    def log(self):
        return [json.loads(line) for line in self.lines]


def posting(path, file=None, headers=None, **fields):
    """Return a request for ``together``; ``file`` is (name, bytes)."""
    parts = [(name, (None, text)) for name, one in fields.items() for text in ([one] if isinstance(one, str) else one)]
    files = parts + ([] if file is None else [("file", file)])
    return "POST", path, {"files": files or [("nothing", (None, ""))], "headers": headers}


@contextmanager
def serving(run, data=None, token=None, index=None, hosts=LOOPBACK, **limits):
    service = Service(run, Limits(**{"decoders": 1, **limits}), data, token, index, hosts)
    try:
        yield service
    finally:
        service.models.close()


def picture(seed=0, size=(24, 20), form="PNG"):
    """Return the bytes of a picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    out = io.BytesIO()
    PIL.Image.fromarray(pixels).save(out, form)
    return out.getvalue()


def is_problem(answer, status):
    """Whether an answer is a problem of this status as RFC 9457 has it, in one sentence."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert set(body) == {"type", "title", "status", "detail", "instance"}
    assert body["status"] == status
    assert body["instance"] == f"urn:uuid:{answer.headers['x-request-id']}"
    assert body["detail"]
    assert "\n" not in body["detail"]
    assert "Traceback" not in body["detail"]
    return body["detail"]
