"""The routes: predictions with radii, attacks, facts about the model, health, metrics, and the page."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from python_multipart.exceptions import FormParserError
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from lipnext._version import __version__
from lipnext.core.errors import DataError, LipnextError, UnsoundError
from lipnext.serving.answers import Attacked, Predictions, Problem, predictions
from lipnext.serving.gate import Gate, State
from lipnext.serving.inputs import Given, from_json, from_pictures
from lipnext.serving.limits import Refusal
from lipnext.serving.logs import event
from lipnext.serving.service import Service

PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The request is malformed; the sentence says where."},
    401: {"model": Problem, "description": "The token is missing or wrong."},
    408: {"model": Problem, "description": "The request was not received in time."},
    413: {"model": Problem, "description": "The request is too long."},
    415: {"model": Problem, "description": "The body is neither JSON nor multipart/form-data."},
    429: {"model": Problem, "description": "Too much waits already; try again."},
    503: {"model": Problem, "description": "The request was not evaluated in time."},
    "default": {"model": Problem, "description": "Anything else that is no success."},
}
Eps = Annotated[
    str | None,
    Query(
        description="Perturbation sizes for certified_at, exact: 36/255,72/255 or 0.5. Default: the experiment's.",
        max_length=1000,
        examples=["36/255,1/2"],
    ),
]


class _InMemory(MultiPartParser):
    """Uploads are bounded, and pictures of others are not written to the disk."""

    spool_max_size = 2**31


def create_app(service: Service, token: str | None = None, state: State | None = None) -> FastAPI:
    """Return the ASGI application; it closes the service when it ends.

    Args:
        service: the loaded model.
        token: needed for /v1 and /metrics; None needs none.
        state: tells that the server is stopping.
    """
    state = state or State()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="lipnext",
        version=__version__,
        description="Labels with certified radii. Errors are answered as {'error': one line}.",
        docs_url=None,  # their scripts come from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.add_middleware(Gate, limits=service.limits, metrics=service.metrics, state=state, token=token)
    app.add_exception_handler(LipnextError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(HTTPException, _answer_http)
    _add_page(app)

    @app.post(
        "/v1/predict",
        responses={200: {"model": Predictions}, **REFUSALS},
        openapi_extra=_body(service, service.limits.images),
    )
    async def predict(request: Request, eps: Eps = None) -> Response:
        """Classify and certify 1 to 64 images."""
        asked, given = service.asked(eps), await _read(request, service)
        certificate = await service.certify(given)
        answers = predictions(certificate, given, service.model.classes, asked, service.offer.abstain_below)
        service.told(answers)
        return JSONResponse({"predictions": answers, **service.meaning})

    @app.post("/v1/attack", responses={200: {"model": Attacked}, **REFUSALS}, openapi_extra=_body(service, 1))
    async def attack(request: Request, eps: Eps = None) -> Response:
        """Try to change the label of one image, within growing budgets and as closely as possible; takes seconds."""
        asked, given = service.asked(eps), await _read(request, service)
        if len(given) != 1:
            raise DataError(f"an attack takes one image, got {len(given)}; send one")
        certificate = await service.certify(given)
        found = await service.attack(given[0].pixels, certificate)
        refuted = found.distance is not None and found.distance <= certificate.radius.item()
        if refuted:
            event("refuted", logging.ERROR, radius=certificate.radius.item(), distance=found.distance)
        [prediction] = predictions(
            certificate, given, service.model.classes, asked, service.offer.abstain_below
        )
        return JSONResponse(
            {
                "prediction": prediction,
                "budgets": [{"eps": size, "flipped": flipped} for size, flipped in found.budgets],
                "distance": found.distance,
                "becomes": found.label,
                "becomes_name": None if found.label is None else service.model.classes[found.label],
                "refuted": refuted,
                "finished": found.finished,
                "original": given[0].pixels.tolist(),
                "changed": None if found.image is None else found.image.tolist(),
                **service.meaning,
            }
        )

    @app.get("/v1/model", responses={401: REFUSALS[401]})
    async def model() -> dict[str, Any]:
        """What is served, what its radii mean, and the limits."""
        return service.facts()

    @app.get(
        "/healthz", responses={503: {"description": "The server is stopping or its model thread has ended."}}
    )
    async def health() -> Response:
        """Whether requests should be sent here."""
        well = service.batcher.alive and not state.stopping
        return JSONResponse({"status": "ok" if well else "stopping"}, 200 if well else 503)

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}, 401: REFUSALS[401]})
    async def metrics() -> Response:
        """Counters for Prometheus."""
        service.metrics.waiting.set(service.batcher.waiting)
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


async def _read(request: Request, service: Service) -> list[Given]:
    """Return the images of a request, decoded in a thread."""
    shape, limits = service.model.input_shape, service.limits
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    run = asyncio.get_running_loop().run_in_executor
    if kind == "application/json":
        return await run(service.decoders, from_json, await request.body(), shape, limits)
    if kind == "multipart/form-data":
        files = await _files(request, limits.images)
        return await run(service.decoders, from_pictures, files, shape, limits)
    raise Refusal(415, "send application/json or multipart/form-data")


async def _files(request: Request, most: int) -> list[tuple[str, bytes]]:
    try:
        form = await _InMemory(request.headers, request.stream(), max_files=most, max_fields=0).parse()
    except (MultiPartException, FormParserError, ValueError, LookupError) as error:
        reason = (str(getattr(error, "message", error)).splitlines() or [type(error).__name__])[0]
        raise DataError(f"the multipart body cannot be read ({reason[:100]})") from None
    parts = form.multi_items()
    try:
        if any(name != "images" or isinstance(part, str) for name, part in parts):
            raise DataError("a multipart body has files named 'images' and nothing else")
        return [
            (f"images[{k}]", await part.read())
            for k, (_, part) in enumerate(parts)
            if not isinstance(part, str)
        ]
    finally:
        await form.close()


def _body(service: Service, most: int) -> dict[str, Any]:
    """Describe the body, which is read by hand, for the OpenAPI document."""
    channels, height, width = service.model.input_shape

    def lists(length: int, items: dict[str, Any]) -> dict[str, Any]:
        return {"type": "array", "minItems": length, "maxItems": length, "items": items}

    plane = lists(height, lists(width, {"type": "number", "minimum": 0, "maximum": 1}))
    image = lists(channels, plane) if channels > 1 else {"anyOf": [plane, lists(1, plane)]}
    images = {"type": "array", "minItems": 1, "maxItems": most}
    pictures = {**images, "items": {"type": "string", "format": "binary"}}
    content = {
        "application/json": {**images, "items": image},
        "multipart/form-data": pictures,
    }
    return {
        "requestBody": {
            "required": True,
            "content": {
                kind: {
                    "schema": {
                        "type": "object",
                        "required": ["images"],
                        "additionalProperties": False,
                        "properties": {"images": schema},
                    }
                }
                for kind, schema in content.items()
            },
        }
    }


def _add_page(app: FastAPI) -> None:
    """Serve four files from memory: no path of a request ever reaches the file system."""
    folder = resources.files("lipnext.serving") / "static"

    def add(path: str, content: bytes, kind: str) -> None:
        async def page() -> Response:
            return Response(content, media_type=kind)

        app.get(path, include_in_schema=False)(page)

    for path, (name, kind) in PAGE.items():
        add(path, (folder / name).read_bytes(), kind)


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, UnsoundError):
        raise error  # not the client's to mend; the gate logs it
    return JSONResponse({"error": str(error)}, 400)


async def _answer_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return JSONResponse({"error": f"{first['loc'][-1]}: {first['msg']}"}, 400)


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {
        404: "there is no such page; /openapi.json lists what there is",
        405: "this method is not allowed here",
    }
    message = known.get(error.status_code, str(error.detail))
    return JSONResponse({"error": message}, error.status_code, headers=error.headers)
