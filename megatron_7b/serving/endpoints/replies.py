"""Replies as they are written: whole or in pieces, to clients who may leave at any time."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from megatron_7b.generation.grammars import Grammar
from megatron_7b.serving.engine import ServingEngine
from megatron_7b.serving.errors import ApiError
from megatron_7b.serving.jobs import Job, Preparation, WritingJob
from megatron_7b.serving.rounds import Written
from megatron_7b.serving.served import ServedModel

_REASONS = {"eod": "stop", "stop": "stop", "length": "length"}
_EVENTS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Headers without which a proxy would collect a stream before it passes it on."""


@dataclass
class Text:
    """One text of a reply.

    Attributes:
        written: What has come.
    """

    written: list[Written] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(one.text for one in self.written)

    @property
    def num_tokens(self) -> int:
        """How many tokens have come."""
        return sum(len(one.token_ids) for one in self.written)

    @property
    def finish_reason(self) -> str | None:
        """Why it has ended, in OpenAI's words."""
        return finish_reason(self.written[-1]) if self.written else None


def finish_reason(written: Written) -> str | None:
    """Return why a text has ended, in OpenAI's words."""
    return None if written.finish_reason is None else _REASONS[written.finish_reason]


def new_head(kind: str, prefix: str, model: str) -> dict[str, Any]:
    """Return what all objects of a reply begin with."""
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def usage(jobs: Sequence[WritingJob], num_written: int) -> dict[str, Any]:
    """Return the numbers of tokens as OpenAI has them, once all jobs have ended."""
    num_prompt = sum(len(job.prompt.ids) for job in jobs)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_written,
        "total_tokens": num_prompt + num_written,
        "prompt_tokens_details": {"cached_tokens": sum(job.num_reused for job in jobs)},
    }


def as_json(content: Any) -> Response:
    """Return a reply of JSON."""
    return Response(orjson.dumps(content), media_type="application/json")


async def off_loop[T](function: Callable[[], T]) -> T:
    """Run a function that takes its time (encoding a long text) in a thread: other clients are served meanwhile."""
    return await asyncio.get_running_loop().run_in_executor(None, function)


async def make_ready(engine: ServingEngine, model: ServedModel, grammar: Grammar | None) -> None:
    """Make ready what texts have to fit, wherever their tokens are chosen, while other texts are being written.

    Raises:
        ApiError: It cannot be followed.
    """
    if grammar is not None:
        engine.announce(Preparation(model.number, grammar))
        await off_loop(lambda: model.prepare(grammar))


def submit_all(engine: ServingEngine, jobs: Sequence[Job]) -> None:
    """Submit all jobs, or none.

    Raises:
        ApiError: One is refused.
    """
    for number, job in enumerate(jobs):
        try:
            engine.submit(job)
        except ApiError:
            drop_all(engine, jobs[:number])
            raise


def drop_all(engine: ServingEngine, jobs: Sequence[Job]) -> None:
    """Drop what is still wanted of jobs."""
    for job in jobs:
        engine.drop(job)


async def whole_reply[T](
    request: Request, engine: ServingEngine, jobs: Sequence[Job], reply: Awaitable[T], *, seconds: float
) -> T:
    """Wait for a reply, as long as its client does and it does not take too long.

    Raises:
        ApiError: The client has left, the time is over, or a job has failed.
    """
    waiting = asyncio.ensure_future(reply)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({waiting, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        if gone.done():
            raise ApiError(499, "the client has left")
        raise out_of_time(seconds)
    finally:
        for task in (waiting, gone):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
        drop_all(engine, jobs)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def out_of_time(seconds: float) -> ApiError:
    """Return what a client is told whose request takes too long."""
    return ApiError(504, f"the request took more than {seconds:g} s, the limit; ask for fewer tokens", code="timeout")


async def merged(jobs: Sequence[WritingJob]) -> AsyncIterator[tuple[int, Written]]:
    """Yield what comes of several jobs, each with the position of its job.

    Raises:
        ApiError: A job has failed.
    """
    if len(jobs) == 1:
        async for written in jobs[0].pieces():
            yield 0, written
        return
    news: asyncio.Queue[tuple[int, Written | ApiError | None]] = asyncio.Queue()

    async def collect(position: int, job: WritingJob) -> None:
        try:
            async for written in job.pieces():
                news.put_nowait((position, written))
        except ApiError as error:
            news.put_nowait((position, error))
        news.put_nowait((position, None))

    tasks = [asyncio.ensure_future(collect(position, job)) for position, job in enumerate(jobs)]
    try:
        unfinished = len(jobs)
        while unfinished:
            position, one = await news.get()
            if isinstance(one, ApiError):
                raise one
            if one is None:
                unfinished -= 1
            else:
                yield position, one
    finally:
        for task in tasks:
            task.cancel()


async def collected(jobs: Sequence[WritingJob]) -> list[list[Text]]:
    """Wait for all texts of jobs.

    Raises:
        ApiError: A job has failed.
    """
    texts = [[Text() for _ in range(job.num_texts)] for job in jobs]
    async for position, written in merged(jobs):
        texts[position][written.index].written.append(written)
    return texts


class StreamReply(StreamingResponse):
    """A reply of server-sent events; however it ends, nobody works for it any more.

    Args:
        engine: Where the jobs are.
        jobs: What is being written.
        chunks: JSON objects.
        seconds: The reply ends with an error after this long.
    """

    def __init__(
        self, engine: ServingEngine, jobs: Sequence[WritingJob], chunks: AsyncIterator[Any], *, seconds: float
    ) -> None:
        super().__init__(_events(chunks, seconds), media_type="text/event-stream", headers=_EVENTS)
        self._engine = engine
        self._jobs = jobs

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events; a client that has left before the first one ends the jobs, too."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            drop_all(self._engine, self._jobs)


async def _events(chunks: AsyncIterator[Any], seconds: float) -> AsyncIterator[bytes]:
    try:
        async with asyncio.timeout(seconds):
            async for chunk in chunks:
                yield b"data: " + orjson.dumps(chunk) + b"\n\n"
    except TimeoutError:
        yield b"data: " + orjson.dumps(out_of_time(seconds).content) + b"\n\n"
    except ApiError as error:
        yield b"data: " + orjson.dumps(error.content) + b"\n\n"
    yield b"data: [DONE]\n\n"
