"""GET /v1/models, /health, /metrics and the page: what is said of the server itself."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

from megatron_7b import __version__
from megatron_7b.serving.endpoints.replies import as_json
from megatron_7b.serving.errors import ApiError
from megatron_7b.serving.metrics import CONTENT_TYPE
from megatron_7b.serving.served import ServedModel
from megatron_7b.serving.state import state_of

PAGE = Path(__file__).parents[1] / "page"

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """List the models."""
    return as_json({"object": "list", "data": [_described(model) for model in state_of(request).models]})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """Describe a model."""
    found = next((one for one in state_of(request).models if one.name == name), None)
    if found is None:
        raise ApiError(404, f"there is no model {name[:200]!r}", param="model", code="model_not_found")
    return as_json(_described(found))


@router.get("/health")
async def health(request: Request) -> Response:
    """Say whether requests are taken: 200, or 503 while the server stops."""
    engine = state_of(request).engine
    status = 503 if engine.is_stopping else 200
    text = "stopping" if engine.is_stopping else "ok"
    return Response(f'{{"status":"{text}","version":"{__version__}"}}', status, media_type="application/json")


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Return all figures."""
    return Response(state_of(request).metrics.text(), headers={"Content-Type": CONTENT_TYPE})


@router.get("/")
async def page() -> Response:
    """Return the page, if this installation has one."""
    index = PAGE / "index.html"
    if not index.is_file():
        raise ApiError(404, "this installation has no page; the API is at /v1/", code="not_found")
    return FileResponse(index, headers={"Cache-Control": "no-cache"})


def mount_page(app: FastAPI) -> None:
    """Serve the page's files under /static."""
    if PAGE.is_dir():
        app.mount("/static", StaticFiles(directory=PAGE))


def _described(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "megatron_7b",
        "root": model.parent or model.name,
        "parent": model.parent,
        "max_model_len": model.max_length,
        "endpoints": list(model.endpoints),
    }
