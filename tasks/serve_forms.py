"""What requests say: multipart forms into typed values, in memory, and how OpenAPI describes them."""

from collections.abc import Sequence
from typing import Any, TypeVar

import python_multipart as _needed  # noqa: F401 - Starlette asks for it only when a form comes in
from pydantic import Field
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from mmssl.config import Piece, validate
from mmssl.errors import UserError
from tasks.serve_limits import Limits
from tasks.serve_models import Upload
from tasks.serve_problem import Problem

F = TypeVar("F", bound=Piece)

MULTIPART = "multipart/form-data"
FILE = "file"


class ZeroShotForm(Piece):
    """A file and the classes that it may be of."""

    classes: list[str] = Field(description="Class names: a field each, or one field with commas or lines between them.")
    templates: list[str] = Field(
        default=[], description="Sentences with {} where the name goes, or a set: photo, drawing, video, sound."
    )
    top: int = Field(default=5, ge=1, description="How many classes to name.")
    modality: str | None = Field(default=None, description="That of the file, where its name does not say.")


class ClassifyForm(Piece):
    """A file to be told by the classes that the encoder was fine-tuned on."""

    top: int = Field(default=5, ge=1, description="How many classes to name.")


class EmbedForm(Piece):
    """A file or a text."""

    text: str | None = Field(default=None, description="A text, in place of a file.")
    modality: str | None = Field(default=None, description="That of the file, where its name does not say.")


class SearchForm(Piece):
    """What is looked for: words, or a file like which others are to be."""

    text: str | None = Field(default=None, description="Words, in place of a file.")
    modality: str | None = Field(default=None, description="That of the file, where its name does not say.")
    top: int = Field(default=20, ge=1, description="How many files to name.")


class _InMemory(MultiPartParser):
    # Starlette's own moves files of more than a megabyte to the disk. How much there can be is limited already.
    spool_max_size = 2**62


async def read_form(request: Request, form: type[F], limits: Limits) -> tuple[F, Upload | None]:
    """Return a request's fields and its file, if there is one; raises Problem, one sentence, for anything else."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != MULTIPART:
        raise Problem(415, f"the body must be a form: {MULTIPART}")
    parser = _InMemory(
        request.headers,
        request.stream(),
        max_files=1,
        max_fields=limits.classes + limits.templates + 8,
        max_part_size=_longest_part(limits),
    )
    try:
        data = await parser.parse()
    except (Problem, ClientDisconnect):
        raise
    except MultiPartException as error:
        raise Problem(400, f"the form cannot be read: {error.message}") from None
    except (ValueError, LookupError, AttributeError) as error:  # what the parser makes of nonsense
        raise Problem(400, f"the form cannot be read: {type(error).__name__}") from None
    fields: dict[str, list[str]] = {}
    upload: Upload | None = None
    for name, value in data.multi_items():
        if isinstance(value, UploadFile):
            if name != FILE:
                raise Problem(422, f"the file comes in the field '{FILE}', not in '{name}'")
            upload = Upload(await value.read(), value.filename or "", value.content_type or "")
        elif name == FILE:
            raise Problem(422, f"the field '{FILE}' holds no file; a file has a name: filename=\"...\"")
        else:
            fields.setdefault(name, []).append(value)
    return _validated(form, fields, limits), upload


def _longest_part(limits: Limits) -> int:
    # All class names may come in one field; a letter takes up to four bytes.
    return 4 * (limits.characters + 2) * limits.classes


def _validated(form: type[F], fields: dict[str, list[str]], limits: Limits) -> F:
    given: dict[str, Any] = {}
    for name, values in fields.items():
        if name in LISTS:
            given[name] = split(values[0]) if name == "classes" and len(values) == 1 else values
        elif len(values) > 1:
            raise Problem(422, f"the field '{name}' is there {len(values)} times")
        else:
            given[name] = values[0]
    try:
        found = validate(form, given, "the form")
    except UserError as error:
        raise Problem(422, str(error)) from None
    for name, most in (("classes", limits.classes), ("templates", limits.templates)):
        _check_texts(name, getattr(found, name, ()), most, limits.characters)
    _check_texts("text", [text] if (text := getattr(found, "text", None)) is not None else (), 1, limits.characters)
    top = getattr(found, "top", 1)
    if top > limits.top and "top" in given:
        raise Problem(422, f"top: {limits.top} answers are allowed")
    return found.model_copy(update={"top": min(top, limits.top)})


LISTS = ("classes", "templates")
"""Fields that may be there several times."""


def split(text: str) -> list[str]:
    """Return the names in "a, b" or in lines; blank ones are none."""
    return [name for line in text.splitlines() for part in line.split(",") if (name := part.strip())]


def _check_texts(name: str, texts: Sequence[str], most: int, characters: int) -> None:
    if len(texts) > most:
        raise Problem(422, f"{name}: {len(texts)} are given, and {most} are allowed")
    if any(len(text) > characters for text in texts):
        raise Problem(422, f"{name}: a text is longer than the {characters} characters that are allowed")


def described(form: type[Piece], needs_file: bool) -> dict[str, Any]:
    """Return OpenAPI's description of a request with such a form."""
    schema = form.model_json_schema()
    for one in schema["properties"].values():
        # A form has no null: a field is there or not.
        if "anyOf" in one:
            one.update(one.pop("anyOf")[0])
            one.pop("default", None)
    file = {"type": "string", "format": "binary", "description": "A picture, a video, a sound or a text."}
    schema["properties"] = {FILE: file, **schema["properties"]}
    schema["additionalProperties"] = False
    required = [*([FILE] if needs_file else []), *schema.get("required", [])]
    schema |= {"required": required} if required else {}
    return {"requestBody": {"required": True, "content": {MULTIPART: {"schema": schema}}}}
