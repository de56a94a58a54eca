"""POST /v1/completions: texts that continue a prompt."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from megatron_7b.serving.endpoints.replies import (
    StreamReply,
    Text,
    as_json,
    collected,
    finish_reason,
    make_ready,
    merged,
    new_head,
    off_loop,
    submit_all,
    usage,
    whole_reply,
)
from megatron_7b.serving.jobs import WritingJob
from megatron_7b.serving.probabilities import TokenTexts
from megatron_7b.serving.protocol import CompletionRequest
from megatron_7b.serving.served import find_model
from megatron_7b.serving.state import state_of

router = APIRouter()


@router.post("/v1/completions")
async def complete(request: Request, asked: CompletionRequest) -> Response:
    """Continue prompts."""
    state = state_of(request)
    model = find_model(state.models, asked.model, "/v1/completions")
    prompts = await off_loop(lambda: [model.encode(prompt) for prompt in asked.prompts])
    options = await off_loop(lambda: [model.options(prompt, asked, asked.max_tokens) for prompt in prompts])
    await make_ready(state.engine, model, asked.grammar)
    jobs = [model.job(prompt, how) for prompt, how in zip(prompts, options, strict=True)]
    submit_all(state.engine, jobs)
    head = new_head("text_completion", "cmpl", model.name)
    seconds = state.options.max_request_seconds
    if asked.stream:
        return StreamReply(state.engine, jobs, _chunks(head, asked, jobs, model.token_texts), seconds=seconds)
    texts = await whole_reply(request, state.engine, jobs, collected(jobs), seconds=seconds)
    return as_json(_whole(head, asked, jobs, texts, model.token_texts))


def _whole(
    head: dict[str, Any],
    asked: CompletionRequest,
    jobs: Sequence[WritingJob],
    texts: Sequence[Sequence[Text]],
    token_texts: TokenTexts,
) -> dict[str, Any]:
    choices: list[dict[str, Any]] = []
    for job, of_job in zip(jobs, texts, strict=True):
        begin = job.prompt.text if asked.echo else ""
        for text in of_job:
            choices.append(_choice(len(choices), begin + text.text, text.finish_reason))
            choices[-1]["logprobs"] = token_texts.completion(text.written)
    num_written = sum(text.num_tokens for of_job in texts for text in of_job)
    return {**head, "choices": choices, "usage": usage(jobs, num_written)}


async def _chunks(
    head: dict[str, Any], asked: CompletionRequest, jobs: Sequence[WritingJob], token_texts: TokenTexts
) -> AsyncIterator[dict[str, Any]]:
    num_texts, num_written = asked.n or 1, 0
    lengths = [0] * (num_texts * len(jobs))
    rest = {"usage": None} if asked.wants_usage else {}
    if asked.echo:
        for position, job in enumerate(jobs):
            for index in range(num_texts):
                choice = _choice(position * num_texts + index, job.prompt.text, None)
                yield {**head, "choices": [choice], **rest}
    async for position, written in merged(jobs):
        num_written += len(written.token_ids)
        if written.text or written.logprobs or written.finish_reason is not None:
            number = position * num_texts + written.index
            choice = _choice(number, written.text, finish_reason(written))
            choice["logprobs"] = token_texts.completion([written], lengths[number])
            lengths[number] += len(written.text)
            yield {**head, "choices": [choice], **rest}
    if asked.wants_usage:
        yield {**head, "choices": [], "usage": usage(jobs, num_written)}


def _choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
