"""POST /v1/embeddings and /v1/classify: what models say of whole texts."""

import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray

from megatron_7b.data.embeddings.encoding import TextEncoder
from megatron_7b.data.records.reading import RecordError
from megatron_7b.serving.endpoints.replies import as_json, off_loop, submit_all, whole_reply
from megatron_7b.serving.errors import ApiError
from megatron_7b.serving.jobs import WholeJob
from megatron_7b.serving.protocol import MAX_INPUTS, ClassifyRequest, EmbeddingRequest
from megatron_7b.serving.served import ServedModel, find_model
from megatron_7b.serving.state import state_of

router = APIRouter()


@router.post("/v1/embeddings")
async def embed(request: Request, asked: EmbeddingRequest) -> Response:
    """Return a vector for each text."""
    state = state_of(request)
    model = find_model(state.models, asked.model, "/v1/embeddings")
    _check_number(len(asked.texts))
    width = model.config.model.hidden_size
    if asked.dimensions is not None and asked.dimensions > width:
        raise ApiError(400, f"dimensions is {asked.dimensions}, but vectors have {width} numbers", param="dimensions")
    num_tokens = await off_loop(lambda: _num_tokens(model, asked.texts))
    job = WholeJob(model.number, "embed", tuple(asked.texts))
    submit_all(state.engine, [job])
    seconds = state.options.max_request_seconds
    vectors = await whole_reply(request, state.engine, [job], job.next_news(), seconds=seconds)
    if asked.dimensions is not None:
        vectors = vectors[:, : asked.dimensions]
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    data = [
        {"object": "embedding", "index": index, "embedding": _written(vector, asked.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    numbers = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return as_json({"object": "list", "model": model.name, "data": data, "usage": numbers})


@router.post("/v1/classify")
async def classify(request: Request, asked: ClassifyRequest) -> Response:
    """Return a prediction for each record, as `megatron-7b predict` does."""
    state = state_of(request)
    model = find_model(state.models, asked.model, "/v1/classify")
    _check_number(len(asked.records))
    await off_loop(lambda: _check_records(model, asked.records))
    job = WholeJob(model.number, "label", tuple(asked.records))
    submit_all(state.engine, [job])
    seconds = state.options.max_request_seconds
    predictions = await whole_reply(request, state.engine, [job], job.next_news(), seconds=seconds)
    data = [{"index": index, **prediction} for index, prediction in enumerate(predictions)]
    return as_json({"object": "list", "model": model.name, "data": data})


def _check_number(number: int) -> None:
    if not 1 <= number <= MAX_INPUTS:
        raise ApiError(400, f"input has {number} texts, expected 1 to {MAX_INPUTS}", param="input")


def _num_tokens(model: ServedModel, texts: list[str]) -> int:
    """Return how many tokens texts have.

    Raises:
        ApiError: One is longer than the model's rows.
    """
    assert model.tokenizer is not None
    encoder, limit = TextEncoder(model.tokenizer), model.max_length
    total = 0
    for number, text in enumerate(texts):
        length = len(encoder.encode(text, limit + 1))
        if length > limit:
            raise ApiError(
                400,
                f"text {number} of input has more than {limit} tokens, the limit of {model.name!r}; shorten it",
                param="input",
                code="context_length_exceeded",
            )
        total += length
    return total


def _check_records(model: ServedModel, records: list[dict[str, Any]]) -> None:
    assert model.task is not None
    for number, record in enumerate(records):
        try:
            model.task.sequences(record)
        except RecordError as error:
            raise ApiError(400, f"input {number}: {error}", param="input") from None


def _written(vector: NDArray[np.float32], form: str) -> Any:
    if form == "base64":
        return base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode("ascii")
    return [float(number) for number in vector]
