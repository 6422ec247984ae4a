"""What goes wrong in a request, as the answer to it: problem details (RFC 9457) with one sentence."""

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

MEDIA_TYPE = "application/problem+json"
TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}
"""Titles by RFC 9110 where Python still has older ones."""
LONGEST = 500
"""Letters of a sentence: what a person sent may be quoted in it."""


class Problem(Exception):
    """A request that is answered with an error; ``detail`` is one sentence, of nothing that is the server's own."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.headers = status, dict(headers or {})
        words = " ".join(detail.split())
        self.detail = words if len(words) <= LONGEST else words[: LONGEST - 1] + "…"

    def body(self, request: str) -> bytes:
        """Return the problem as JSON; ``request`` is the request's id."""
        facts = {
            "type": "about:blank",
            "title": title(self.status),
            "status": self.status,
            "detail": self.detail,
            "instance": f"urn:uuid:{request}",
        }
        return json.dumps(facts).encode()


def title(status: int) -> str:
    """Return a status in words, as RFC 9110 has them."""
    return TITLES.get(status) or HTTPStatus(status).phrase


def busy(detail: str, seconds: int = 1) -> Problem:
    """Return the answer to a request that may be sent again after so many seconds."""
    return Problem(429, detail, {"Retry-After": str(seconds)})


def stopping() -> Problem:
    """Return the answer to a request that comes while the service finishes its last ones."""
    return Problem(503, "the service is stopping and takes no new requests", {"Retry-After": "5"})


SCHEMA: dict[str, Any] = {
    "type": "object",
    "title": "Problem",
    "description": "What is wrong with a request (RFC 9457).",
    "required": ["type", "title", "status", "detail", "instance"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string", "description": "The status in words."},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "What is wrong, in one sentence."},
        "instance": {"type": "string", "description": "The id of the request, as in the log."},
    },
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's description of the errors with these statuses, and of those that any request may meet."""
    content = {MEDIA_TYPE: {"schema": SCHEMA}}
    general = (400, 401, 403, 404, 405, 408, 413, 421, 429, 431, 501, 503)
    return {status: {"description": title(status), "content": content} for status in sorted({*statuses, *general})}
