"""POST /v1/chat/completions: replies to a conversation, spelled out by the tokenizer's own template."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from megatron_7b.serving.endpoints.replies import (
    StreamReply,
    as_json,
    collected,
    finish_reason,
    make_ready,
    new_head,
    off_loop,
    submit_all,
    usage,
    whole_reply,
)
from megatron_7b.serving.jobs import WritingJob
from megatron_7b.serving.probabilities import TokenTexts
from megatron_7b.serving.protocol import ChatRequest
from megatron_7b.serving.served import find_model
from megatron_7b.serving.state import state_of

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat(request: Request, asked: ChatRequest) -> Response:
    """Reply to a conversation."""
    state = state_of(request)
    model = find_model(state.models, asked.model, "/v1/chat/completions")
    prompt = await off_loop(lambda: model.encode_chat(asked.messages))
    max_tokens = asked.max_completion_tokens or asked.max_tokens
    options = await off_loop(lambda: model.options(prompt, asked, max_tokens))
    await make_ready(state.engine, model, asked.grammar)
    job = model.job(prompt, options)
    submit_all(state.engine, [job])
    seconds = state.options.max_request_seconds
    if asked.stream:
        head = new_head("chat.completion.chunk", "chatcmpl", model.name)
        return StreamReply(state.engine, [job], _chunks(head, asked, job, model.token_texts), seconds=seconds)
    (texts,) = await whole_reply(request, state.engine, [job], collected([job]), seconds=seconds)
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text.text, "refusal": None},
            "logprobs": model.token_texts.chat(text.written),
            "finish_reason": text.finish_reason,
        }
        for index, text in enumerate(texts)
    ]
    numbers = usage([job], sum(text.num_tokens for text in texts))
    return as_json({**new_head("chat.completion", "chatcmpl", model.name), "choices": choices, "usage": numbers})


async def _chunks(
    head: dict[str, Any], asked: ChatRequest, job: WritingJob, token_texts: TokenTexts
) -> AsyncIterator[dict[str, Any]]:
    num_written = 0
    rest = {"usage": None} if asked.wants_usage else {}
    for index in range(job.num_texts):
        yield {**head, "choices": [_choice(index, {"role": "assistant", "content": ""}, None)], **rest}
    async for written in job.pieces():
        num_written += len(written.token_ids)
        reason = finish_reason(written)
        if written.text or written.logprobs:
            choice = _choice(written.index, {"content": written.text}, None)
            choice["logprobs"] = token_texts.chat([written])
            yield {**head, "choices": [choice], **rest}
        if reason is not None:
            yield {**head, "choices": [_choice(written.index, {}, reason)], **rest}
    if asked.wants_usage:
        yield {**head, "choices": [], "usage": usage([job], num_written)}


def _choice(index: int, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
