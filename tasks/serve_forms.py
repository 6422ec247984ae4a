"""What requests say: multipart forms into typed values, in memory, and how OpenAPI describes them."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from mmssl.config import Piece, validate
from mmssl.errors import UserError, nearest
from tasks.serve_limits import Limits
from tasks.serve_models import Upload
from tasks.serve_problem import Problem

F = TypeVar("F", bound=Piece)

MULTIPART = "multipart/form-data"
FILE = "file"
FILENAME_STAR = re.compile(rb";\s*filename\*", re.IGNORECASE)
"""Of other headers (RFC 8187), and forbidden in forms (RFC 7578, section 4.2)."""


def _number(value: object) -> object:
    if isinstance(value, str) and (re.fullmatch("[0-9]{1,9}", value) is None or int(value) == 0):
        raise ValueError(f"give a whole number from 1, but got {value!r}")
    return value


Count = Annotated[int, Field(ge=1), BeforeValidator(_number)]


class ZeroShotForm(Piece):
    """A file and the classes that it may be of."""

    classes: list[str] = Field(description="Class names: a field each, or one field with commas or lines between them.")
    templates: list[str] = Field(
        default=[], description="Sentences with {} where the name goes, or a set: photo, drawing, video, sound."
    )
    top: Count | None = Field(default=None, description="How many classes to name; all where it is left out.")
    modality: str | None = Field(default=None, description="That of the file, where its name does not say.")


class ClassifyForm(Piece):
    """A file to be told by the classes that the encoder was fine-tuned on."""

    top: Count | None = Field(default=None, description="How many classes to name; all where it is left out.")


class EmbedForm(Piece):
    """A file or a text."""

    text: str | None = Field(default=None, description="A text, in place of a file.")
    modality: str | None = Field(default=None, description="That of the file, where its name does not say.")


class SearchForm(Piece):
    """What is looked for: words, or a file like which others are to be."""

    text: str | None = Field(default=None, description="Words, in place of a file.")
    modality: str | None = Field(default=None, description="That of the file, where its name does not say.")
    top: Count = Field(default=20, description="How many files to name.")


class _InMemory(MultiPartParser):
    """Starlette's parser, which takes whatever is there; this one says what is wrong with it."""

    # Starlette's own moves files of more than a megabyte to the disk. How much there can be is limited already.
    spool_max_size = 2**62
    ended = False

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        part = self._current_part
        if part.file is None and FILENAME_STAR.search(part.content_disposition or b""):
            raise Problem(400, 'the name of a file comes as filename="..." in a form, and never as filename*')
        if part.file is None and part.field_name == FILE:
            raise Problem(422, f"the field '{FILE}' holds no file; a file has a name: filename=\"...\"")
        for name, value in part.item_headers if part.file is None else ():
            if name == b"content-type":
                _check_charset(value)

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        part = self._current_part
        if part.file is None and len(part.data) + end - start > self.max_part_size:
            raise Problem(413, f"{part.field_name}: longer than the {self.max_part_size:,} bytes that are allowed")
        super().on_part_data(data, start, end)

    def on_part_end(self) -> None:
        part = self._current_part
        if part.file is None:
            try:
                part.data.decode()
            except UnicodeDecodeError:
                raise Problem(400, f"{part.field_name}: what it holds is not UTF-8") from None
        super().on_part_end()

    def on_end(self) -> None:
        self.ended = True


def _check_charset(content_type: str | bytes) -> None:
    charset = parse_options_header(content_type)[1].get(b"charset", b"utf-8")
    if charset.lower() not in (b"utf-8", b"utf8"):
        raise Problem(415, f"forms are read as utf-8, and not as {charset.decode('latin-1')}")


async def read_form(request: Request, form: type[F], limits: Limits) -> tuple[F, Upload | None]:
    """Return a request's fields and its file, if there is one; raises Problem, one sentence, for anything else."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != MULTIPART:
        raise Problem(415, f"the body must be a form: {MULTIPART}, as curl -F sends it")
    _check_charset(kind)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Problem(415, "forms are read as they are, without a Content-Encoding")
    if request.url.query:
        raise Problem(422, "fields go into the form, not into the address")
    most = limits.classes + limits.templates + 8
    parser = _InMemory(
        request.headers, request.stream(), max_files=1, max_fields=most, max_part_size=_longest_part(limits)
    )
    try:
        data = await parser.parse()
    except (Problem, ClientDisconnect):
        raise
    except MultiPartException as error:
        raise Problem(400, _why_not(error.message, most)) from None
    except (ValueError, LookupError, AttributeError):  # what the parser makes of nonsense
        raise Problem(400, _why_not("", most)) from None
    if not parser.ended:
        raise Problem(400, "the form ends too early: its last boundary is missing")
    fields: dict[str, list[str]] = {}
    upload: Upload | None = None
    for name, value in data.multi_items():
        if isinstance(value, UploadFile):
            if name != FILE:
                raise Problem(422, f"the file comes in the field '{FILE}', not in '{name}'")
            upload = Upload(await value.read(), value.filename or "", value.content_type or "")
        else:
            fields.setdefault(name, []).append(value)
    return _validated(form, fields, limits), upload


def _why_not(words: str, most: int) -> str:
    """Return what Starlette has to say of a form, in a sentence."""
    known = {
        "Too many files": "the form holds more than one file",
        "Too many fields": f"the form has more than the {most} fields that are allowed",
        "Missing boundary": "the form cannot be read: its Content-Type names no boundary",
        "The Content-Disposition": "the form cannot be read: a part of it has no name",
    }
    plain = f"the form cannot be read: it is not what {MULTIPART} looks like"
    return next((told for begins, told in known.items() if words.startswith(begins)), plain)


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
    for name in given:
        if name not in form.model_fields:
            raise Problem(422, f"the form: '{name}' is not a field{nearest(name, (FILE, *form.model_fields))}")
    try:
        found = validate(form, given, "the form")
    except UserError as error:
        raise Problem(422, str(error)) from None
    for name, most in (("classes", limits.classes), ("templates", limits.templates)):
        _check_texts(name, getattr(found, name, ()), most, limits.characters)
    _check_texts("text", [text] if (text := getattr(found, "text", None)) is not None else (), 1, limits.characters)
    top = getattr(found, "top", None)
    if top is not None and top > limits.top and "top" in given:
        raise Problem(422, f"top: at most {limits.top}, but got {top}")
    return found.model_copy(update={"top": limits.top if top is None else min(top, limits.top)})


LISTS = ("classes", "templates")
"""Fields that may be there several times."""


def split(text: str) -> list[str]:
    """Return the names in "a, b" or in lines; blank ones are none."""
    # Not at every letter that Unicode calls the end of a line: those are in names.
    return [name for part in re.split(r"[,\r\n]", text) if (name := part.strip())]


def _check_texts(name: str, texts: Sequence[str], most: int, characters: int) -> None:
    if len(texts) > most:
        raise Problem(422, f"{name}: {len(texts)} are given, and {most} are allowed")
    if any(len(text) > characters for text in texts):
        raise Problem(422, f"{name}: a text is longer than the {characters} characters that are allowed")


def described(form: type[Piece], limits: Limits, needs_file: bool) -> dict[str, Any]:
    """Return OpenAPI's description of a request with such a form, within the limits."""
    schema = form.model_json_schema()
    for one in schema["properties"].values():
        # A form has no null: a field is there or not.
        if "anyOf" in one:
            one.update(one.pop("anyOf")[0])
        if one.get("default", "") is None:
            del one["default"]
    most = {
        "top": {"maximum": limits.top},
        "classes": {"maxItems": limits.classes},
        "templates": {"maxItems": limits.templates},
        "text": {"maxLength": limits.characters},
    }
    for name in schema["properties"].keys() & most.keys():
        schema["properties"][name] |= most[name]
    for name in schema["properties"].keys() & set(LISTS):
        schema["properties"][name]["items"]["maxLength"] = limits.characters
    file = {"type": "string", "format": "binary", "description": "A picture, a video, a sound or a text."}
    schema["properties"] = {FILE: file, **schema["properties"]}
    schema["additionalProperties"] = False
    required = [*([FILE] if needs_file else []), *schema.get("required", [])]
    schema |= {"required": required} if required else {}
    return {"requestBody": {"required": True, "content": {MULTIPART: {"schema": schema}}}}
