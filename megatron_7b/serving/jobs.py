"""What clients have asked of the engine: made in the web server's thread, worked on in the engine's.

News come to a job through its event loop, so whoever waits for them is woken there. Imports no torch.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

from megatron_7b.generation.grammars import Grammar
from megatron_7b.generation.options import GenerationOptions
from megatron_7b.generation.prompts import Prompt
from megatron_7b.serving.errors import ApiError
from megatron_7b.serving.rounds import Written

_tickets = itertools.count()


@dataclass(frozen=True)
class Preparation:
    """A grammar that texts will have to fit which come soon.

    Attributes:
        model: Number of the model.
        grammar: What they have to fit.
    """

    model: int
    grammar: Grammar


class Job:
    """Something that was asked of a model.

    Must be made in the thread of the running event loop.

    Args:
        model: Number of the model.

    Attributes:
        ticket: Its number.
        begun: Monotonic time at which it was asked.
    """

    def __init__(self, model: int) -> None:
        self.model = model
        self.ticket = next(_tickets)
        self.begun = time.monotonic()
        self.is_dropped = False
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[Any] = asyncio.Queue()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Where whoever waits for it runs."""
        return self._loop

    def put(self, news: object) -> None:
        """Take news, in the thread of the loop."""
        self._news.put_nowait(news)

    async def next_news(self) -> Any:
        """Wait for news.

        Raises:
            ApiError: The job has failed.
        """
        news = await self._news.get()
        if isinstance(news, ApiError):
            raise news
        return news


class WritingJob(Job):
    """Texts of one prompt that are wanted.

    Args:
        model: Number of the model.
        prompt: What is continued.
        options: How.
        max_length: Tokens of the longest text, prompt included.

    Attributes:
        num_reused: Tokens of the prompt that were kept of an earlier text, known from the first token on.
    """

    def __init__(self, model: int, prompt: Prompt, options: GenerationOptions, max_length: int) -> None:
        super().__init__(model)
        self.prompt = prompt
        self.options = options
        self.max_length = max_length
        self.copy = 0
        self.num_unfinished = options.num_return_sequences
        self.first_token: float | None = None
        self.num_reused = 0

    @property
    def num_texts(self) -> int:
        """Rows that it takes."""
        return self.options.num_return_sequences

    async def pieces(self) -> AsyncIterator[Written]:
        """Yield what comes, until all texts have ended.

        Raises:
            ApiError: The job has failed.
        """
        unfinished = self.num_texts
        while unfinished:
            piece: Written = await self.next_news()
            unfinished -= piece.finish_reason is not None
            yield piece


class WholeJob(Job):
    """Inputs whose results come all at once: records to label, or texts to embed.

    Args:
        model: Number of the model.
        task: What is done.
        inputs: The records or texts.
    """

    def __init__(self, model: int, task: Literal["label", "embed"], inputs: tuple[Any, ...]) -> None:
        super().__init__(model)
        self.task: Literal["label", "embed"] = task
        self.inputs = inputs
