"""What the service's OpenAPI document says beyond what FastAPI makes of the routes."""

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI

from tasks.serve_front import OWN

MEANINGS = {
    400: "The form cannot be read, or ends too early.",
    401: "The token is missing, or not the right one.",
    403: "The request comes from a page of another origin.",
    404: "There is nothing here, or this service does not offer it.",
    405: "The address takes other methods, which Allow names.",
    408: "The request did not come in in time.",
    413: "More than the limits allow, of bytes, pixels, seconds or letters of a field.",
    415: "The body is no form in UTF-8, or the file is of a kind that is not read here.",
    421: "The request is for a name that this service does not answer to.",
    422: "A field, the file or a combination of them is wrong; detail says which, and how.",
    429: "Too many requests are there already; Retry-After says when to come again.",
    431: "The headers are too long.",
    501: "The method, or the transfer's encoding, is unknown here.",
    503: "The service is stopping, or found no answer in time; Retry-After says when to come again.",
}
"""What an error's status means here."""


def complete(app: FastAPI, secured: bool, missing: Collection[str]) -> None:
    """Make the document, once all routes are there: with a token where ``secured``, and told what is ``missing``."""
    document = app.openapi()  # which FastAPI keeps
    if secured:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, methods in document["paths"].items():
        for what in methods.values():
            _say_meanings(what["responses"])
            if secured and path.startswith(OWN):
                what["security"] = [{"token": []}]
            if path in missing:
                what["description"] += "\n\nThis service does not offer it, and answers 404."


def _say_meanings(responses: dict[str, dict[str, Any]]) -> None:
    for status, response in responses.items():
        response["description"] = MEANINGS.get(int(status), response["description"])
