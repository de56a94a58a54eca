"""The web application: endpoints, and errors in OpenAI's shape."""

import json
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from megatron_7b import __version__
from megatron_7b.config.problems import nearest
from megatron_7b.serving.access import App, Guard
from megatron_7b.serving.endpoints import chat, completions, inputs, service
from megatron_7b.serving.errors import ApiError, not_expected
from megatron_7b.serving.protocol import ChatRequest, ClassifyRequest, CompletionRequest, EmbeddingRequest
from megatron_7b.serving.state import ServerState

_SHOWN = 120
"""Characters of a wrong value that a message repeats."""


def build_app(state: ServerState) -> App:
    """Return the application of a server, guarded."""
    app = FastAPI(title="megatron_7b", version=__version__, docs_url=None, redoc_url=None)
    app.state.server = state
    for module in (completions, chat, inputs, service):
        app.include_router(module.router)
    service.mount_page(app)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_wrong_request)
    app.add_exception_handler(Exception, _on_failure)
    return Guard(app, state.options, state.engine, state.metrics)


async def _on_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.content, error.status, headers=error.headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Say what the framework refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    path, allowed = request.url.path[:_SHOWN], (error.headers or {}).get("Allow", "another method")
    messages = {
        404: f"there is nothing at {path}; the API is at /v1/chat/completions, /v1/completions, /v1/models, …",
        405: f"{request.method} does not go with {path}; allowed: {allowed}",
        400: "the body is no JSON that can be read",
    }
    codes = {404: "not_found", 405: "method_not_allowed", 400: "invalid_json"}
    message = messages.get(error.status_code, str(error.detail))
    said = ApiError(error.status_code, message, code=codes.get(error.status_code))
    return JSONResponse(said.content, said.status, headers=error.headers)


async def _on_failure(_request: Request, _error: Exception) -> Response:
    """Answer what has failed by our fault; the guard logs it."""
    said = not_expected()
    return JSONResponse(said.content, said.status)


async def _on_wrong_request(_request: Request, error: Exception) -> Response:
    """Say which field is wrong, what it is and what was expected."""
    assert isinstance(error, RequestValidationError)
    said = _describe(error.errors())
    return JSONResponse(said.content, said.status)


def _describe(problems: Sequence[Any]) -> ApiError:
    first = problems[0]
    where = [str(part) for part in first["loc"][1:] if not _is_variant(part)]
    if not where:
        value = first.get("input")
        if first["type"] in ("missing", "model_attributes_type", "dict_type"):
            return ApiError(400, f"the body is {_shown(value)}, expected a JSON object", code="invalid_request")
        return ApiError(400, _sentence(first), code="invalid_request")
    param = ".".join(where)
    match first["type"]:
        case "missing":
            message = f"{param} is missing"
        case "extra_forbidden":
            message = f"there is no field {param[:_SHOWN]!r}"
            guess = nearest(where[-1], _FIELDS) if len(where) == 1 else None
            message += f"; did you mean {guess!r}?" if guess else ""
        case "value_error":
            message = f"{param}: {_sentence(first)}"
        case _:
            message = f"{param} is {_shown(first.get('input'))}, {_sentence(first)}"
    others = len({tuple(map(str, one["loc"][1:2])) for one in problems}) - 1
    message += f" (and {others} more field(s) are wrong)" if others > 0 else ""
    return ApiError(400, message, param=param[:_SHOWN], code="invalid_request")


_FIELDS = sorted(
    {
        name
        for model in (
            CompletionRequest,
            ChatRequest,
            EmbeddingRequest,
            ClassifyRequest,
        )
        for name in model.model_fields
    }
)


def _is_variant(part: object) -> bool:
    """Whether a part of a place names one of several types that a field may have, rather than a field."""
    return isinstance(part, str) and (part in ("str", "dict") or "[" in part or part in ("TextPart", "int"))


_EXPECTED = {
    "greater_than_equal": "expected at least {ge:g}",
    "greater_than": "expected more than {gt:g}",
    "less_than_equal": "expected at most {le:g}",
    "less_than": "expected less than {lt:g}",
    "too_short": "expected at least {min_length}",
    "too_long": "expected at most {max_length}",
    "string_too_short": "expected a text that is not empty",
    "string_type": "expected a text",
    "float_type": "expected a number",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "bool_type": "expected true or false",
    "list_type": "expected a list",
    "dict_type": "expected an object",
    "model_type": "expected an object",
    "model_attributes_type": "expected an object",
    "literal_error": "expected {expected}",
}
"""What pydantic's kinds of problems are called here."""


def _sentence(problem: Any) -> str:
    if problem["type"] in _EXPECTED:
        return _EXPECTED[problem["type"]].format(**(problem.get("ctx") or {}))
    message = str(problem["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _shown(value: object) -> str:
    """Return the beginning of a value as the client has written it."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
