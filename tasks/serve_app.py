"""The routes of a service: thin faces of ``Models`` and of a search, and the pages."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from mmssl.files import to_json
from tasks.serve_forms import ClassifyForm, EmbedForm, SearchForm, ZeroShotForm, described, read_form
from tasks.serve_front import LOOPBACK, OWN, Front, to_stderr
from tasks.serve_limits import Limits
from tasks.serve_metrics import Metrics
from tasks.serve_models import Models, Upload
from tasks.serve_problem import MEDIA_TYPE, Problem, documented
from tasks.serve_search import Search

ASSETS = Path(__file__).parent / "assets" / "serve"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
FILES = {path.name: path.suffix for path in sorted(ASSETS.glob("*.*")) if path.suffix in (".js", ".css")}


class LabelScore(BaseModel):
    """A class and how likely it is."""

    label: str | None
    score: float = Field(description="From 0 to 1.")


class Vector(BaseModel):
    """What an encoder makes of a file or a text."""

    modality: str
    dim: int
    vector: list[float]


class Hit(BaseModel):
    """A file that was found."""

    id: str = Field(description="What /v1/media shows it by.")
    name: str = Field(description="Its path in the folder that is searched.")
    score: float = Field(description="Cosine similarity.")


class Health(BaseModel):
    """Whether the service takes requests."""

    status: str


class About(BaseModel):
    """What the service can do, and for how much at a time."""

    version: str
    modalities: list[str]
    routes: dict[str, bool]
    files: list[str] = Field(description="Suffixes of files that are read.")
    searched: int = Field(description="How many files can be found.")
    limits: dict[str, float]


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
    if token is not None:
        _say_token(app)
    front = Front(app, limits, metrics, token, hosts, log)
    _add_errors(app)
    _add_pages(app)
    _add_state(app, front, models, search)
    _add_work(app, models, limits)
    _add_search(app, models, limits, search)
    return front


def _say_token(app: FastAPI) -> None:
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, methods in document["paths"].items():
            for what in methods.values() if path.startswith(OWN) else ():
                what["security"] = [{"token": []}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]


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
        words = {404: "there is nothing here; /docs says what there is", 405: "this method is not for this address"}
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
        names = ("body", "classes", "templates", "characters", "top")
        return _json(
            {
                "version": app.version,
                "modalities": list(models.towers),
                "routes": {**models.able, "search": search is not None},
                "files": models.suffixes,
                "searched": 0 if search is None else len(search),
                "limits": {name: getattr(models.limits, name) for name in names},
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
        openapi_extra=described(ZeroShotForm, needs_file=True),
    )
    async def zero_shot(request: Request) -> Response:
        """Name a file by class names alone, best first."""
        form, upload = await read_form(request, ZeroShotForm, limits)
        return _json(await models.zero_shot(_needed(upload), form.classes, form.templates, form.top, form.modality))

    @app.post(
        "/v1/classify",
        tags=["ask"],
        responses={200: {"model": list[LabelScore]}, **errors},
        openapi_extra=described(ClassifyForm, needs_file=True),
    )
    async def classify(request: Request) -> Response:
        """Name a file by the classes that the encoder was fine-tuned on, best first."""
        form, upload = await read_form(request, ClassifyForm, limits)
        return _json(await models.classify(_needed(upload), form.top))

    @app.post(
        "/v1/embed",
        tags=["ask"],
        responses={200: {"model": Vector}, **errors},
        openapi_extra=described(EmbedForm, needs_file=False),
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
        openapi_extra=described(SearchForm, needs_file=False),
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
        responses={
            200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}},
            **documented(422),
        },
    )
    async def media(id: str) -> Response:
        """Show a file that a search has found, as a small picture."""
        picture = await there().thumbnail(id, models.decoders)
        return Response(picture, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=600"})
