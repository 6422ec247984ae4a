"""The routes of a service: thin faces of ``Models`` and of a search, and the pages."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from fastapi import Path as PathField
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from mmssl.files import to_json
from tasks.serve_forms import ClassifyForm, EmbedForm, SearchForm, ZeroShotForm, described, read_form
from tasks.serve_front import LOOPBACK, Front
from tasks.serve_limits import Limits
from tasks.serve_log import to_stderr
from tasks.serve_metrics import Metrics
from tasks.serve_models import Models, Upload
from tasks.serve_openapi import complete
from tasks.serve_problem import MEDIA_TYPE, Problem, documented
from tasks.serve_search import KEPT, Search

ASSETS = Path(__file__).parent / "assets" / "serve"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
TOLD = ("body", "pixels", "seconds", "classes", "templates", "prompts", "letters", "characters", "top", "queue",
        "request_seconds")  # fmt: skip
"""The limits that a request can meet."""
FILES = {path.name: path.suffix for path in sorted(ASSETS.glob("*.*")) if path.suffix in (".js", ".css")}


class LabelScore(BaseModel):
    """A class and how likely it is."""

    label: str | None = Field(description="The class, as it was given; null where the file is of none.")
    score: float = Field(description="From 0 to 1; those of all classes add up to 1, or each stands for itself.")


class Vector(BaseModel):
    """What an encoder makes of a file or a text."""

    modality: str = Field(description="Of what it is the vector: image, video, audio or text.")
    dim: int = Field(description="How many numbers it has.")
    vector: list[float] = Field(description="The numbers; those of towers of one space compare by their cosine.")


class Hit(BaseModel):
    """A file that was found."""

    id: str = Field(description="What /v1/media/{id} shows it by.")
    name: str = Field(description="Its path in the folder that is searched.")
    score: float = Field(description="Cosine similarity, from -1 to 1.")


class Health(BaseModel):
    """Whether the service takes requests."""

    status: str = Field(description="ok")


class About(BaseModel):
    """What the service can do, and for how much at a time."""

    version: str = Field(description="Of mmssl.")
    modalities: list[str] = Field(description="What is read.")
    routes: dict[str, bool] = Field(description="Whether /v1/NAME is offered; what is not answers 404.")
    files: list[str] = Field(description="Suffixes of files that are read.")
    searched: int = Field(description="How many files can be found.")
    limits: dict[str, float] = Field(
        description="body is in bytes, pixels of a picture or frame, seconds of a sound or video; prompts are classes "
        "times templates, with letters in all and characters in one text; queue are requests at a time, each for at "
        "most request_seconds."
    )


def make_app(
    models: Models,
    limits: Limits,
    metrics: Metrics,
    search: Search | None = None,
    token: str | None = None,
    hosts: tuple[str, ...] = LOOPBACK,
    log: Callable[[str], None] = to_stderr,
) -> Front:
    """Return the service as an ASGI application; ``hosts`` as ``Front`` has it."""
    app = FastAPI(
        title="mmssl",
        version=_version(),
        description="Names, vectors and search for pictures, videos, sounds and texts.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=documented(),
        generate_unique_id_function=lambda route: route.name,
    )
    front = Front(app, limits, metrics, token, hosts, log)
    _add_errors(app)
    _add_pages(app)
    _add_state(app, front, models, search)
    _add_work(app, models, limits)
    _add_search(app, models, limits, search)
    offered = {**models.able, "search": search is not None, "media/{id}": search is not None}
    complete(app, token is not None, [f"/v1/{name}" for name, is_there in offered.items() if not is_there])
    for route in app.routes:
        if isinstance(route, APIRoute) and route.methods == {"GET"}:
            route.methods = {"GET", "HEAD"}  # not before, so that the document has each route once
    return front


def _version() -> str:
    try:
        return version("mmssl")
    except PackageNotFoundError:
        return "0+unknown"


def _json(data: Any) -> Response:
    return Response(to_json(data), media_type="application/json")


def _add_errors(app: FastAPI) -> None:
    def answer(request: Request, problem: Problem) -> Response:
        body = problem.body(request.scope["request_id"])
        return Response(body, problem.status, problem.headers, MEDIA_TYPE)

    async def known(request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        return answer(request, error)

    async def starlettes(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        allowed = " and ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        words = {404: "there is nothing here; /docs says what there is", 405: f"this address takes {allowed} alone"}
        return answer(request, Problem(error.status_code, words.get(error.status_code, error.detail), error.headers))

    async def unknown(request: Request, error: Exception) -> Response:
        return answer(request, Problem(500, "the service has failed; its log says why"))

    app.add_exception_handler(Problem, known)
    app.add_exception_handler(HTTPException, starlettes)
    app.add_exception_handler(Exception, unknown)


def _add_pages(app: FastAPI) -> None:
    def page(name: str) -> Response:
        return Response((ASSETS / name).read_bytes(), media_type=KINDS[Path(name).suffix])

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return page("index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return page("docs.html")

    @app.get("/assets/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        if name not in FILES:
            raise Problem(404, "there is nothing here; /docs says what there is")
        return page(name)


def _add_state(app: FastAPI, front: Front, models: Models, search: Search | None) -> None:
    @app.get("/healthz", tags=["state"], responses={200: {"model": Health}})
    async def healthz() -> Response:
        """Say whether requests are taken."""
        if front.stopping:
            raise Problem(503, "the service is stopping", {"Retry-After": "5"})
        return _json({"status": "ok"})

    @app.get(
        "/metrics",
        tags=["state"],
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """Return counters, for Prometheus."""
        return Response(front.metrics.text(), headers={"Content-Type": Metrics.content_type})

    @app.get("/v1/about", tags=["state"], responses={200: {"model": About}})
    async def about() -> Response:
        """Say what can be asked for."""
        return _json(
            {
                "version": app.version,
                "modalities": list(models.towers),
                "routes": {**models.able, "search": search is not None},
                "files": models.suffixes,
                "searched": 0 if search is None else len(search),
                "limits": {name: getattr(models.limits, name) for name in TOLD},
            }
        )


def _needed(upload: Upload | None) -> Upload:
    if upload is None:
        raise Problem(422, "the form has no file, which comes in the field 'file'")
    return upload


def _add_work(app: FastAPI, models: Models, limits: Limits) -> None:
    errors = documented(415, 422)

    @app.post(
        "/v1/zero-shot",
        tags=["ask"],
        responses={200: {"model": list[LabelScore]}, **errors},
        openapi_extra=described(ZeroShotForm, limits, needs_file=True),
    )
    async def zero_shot(request: Request) -> Response:
        """Name a file by class names alone, best first."""
        form, upload = await read_form(request, ZeroShotForm, limits)
        return _json(await models.zero_shot(_needed(upload), form.classes, form.templates, form.top, form.modality))

    @app.post(
        "/v1/classify",
        tags=["ask"],
        responses={200: {"model": list[LabelScore]}, **errors},
        openapi_extra=described(ClassifyForm, limits, needs_file=True),
    )
    async def classify(request: Request) -> Response:
        """Name a file by the classes that the encoder was fine-tuned on, best first."""
        form, upload = await read_form(request, ClassifyForm, limits)
        return _json(await models.classify(_needed(upload), form.top))

    @app.post(
        "/v1/embed",
        tags=["ask"],
        responses={200: {"model": Vector}, **errors},
        openapi_extra=described(EmbedForm, limits, needs_file=False),
    )
    async def embed(request: Request) -> Response:
        """Return the vector of a file or a text."""
        form, upload = await read_form(request, EmbedForm, limits)
        modality, vector = await models.embed(upload, form.text, form.modality)
        return _json({"modality": modality, "dim": len(vector), "vector": vector.tolist()})


def _add_search(app: FastAPI, models: Models, limits: Limits, search: Search | None) -> None:
    def there() -> Search:
        if search is None:
            raise Problem(404, "this service has nothing to search in; it was started without --data")
        return search

    @app.post(
        "/v1/search",
        tags=["ask"],
        responses={200: {"model": list[Hit]}, **documented(415, 422)},
        openapi_extra=described(SearchForm, limits, needs_file=False),
    )
    async def find(request: Request) -> Response:
        """Find files by words or by an example, best first."""
        form, upload = await read_form(request, SearchForm, limits)
        found = there()
        _, vector = await models.embed(upload, form.text, form.modality)
        return _json(await found.nearest(vector, form.top))

    @app.get(
        "/v1/media/{id}",
        tags=["ask"],
        response_class=Response,
        description="Show a file that a search has found, as a small picture.\n\nIts id is in the answer of that "
        f"search, and good until the service ends or {KEPT:,} other files have been found.",
        responses={
            200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}},
            **documented(422),
        },
    )
    async def media(id: Annotated[str, PathField(description="As /v1/search gives it.")]) -> Response:
        picture = await there().thumbnail(id, models.decoders)
        return Response(picture, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=600"})
