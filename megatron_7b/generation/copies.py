"""All copies of a model on the ranks of a world, led by the main rank: it hands out work, the others follow.

    with open_session(checkpoint, several_copies=True) as session:
        copies = Copies(session)
        if session.is_main:
            with copies.led():
                scores = copies.score(requests)
        else:
            copies.follow()

So a program that is not collective itself (an evaluation harness, a server) can use a model at any layout.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_7b.generation.options import GenerationOptions
from megatron_7b.generation.prompts import Prompt
from megatron_7b.generation.score import Score, ScoreRequest
from megatron_7b.generation.session import Session

type Work = tuple[str, Sequence[Any]]
"""What is to be done, and on what."""


@dataclass(frozen=True)
class GeneratedText:
    """A text that was written.

    Attributes:
        text: Without what ended it.
        token_ids: Its new tokens.
        finish_reason: `eod`, `stop` or `length`.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str


class Copies:
    """The copies of a model that the ranks of this world hold, each on as many ranks as its layout has.

    Args:
        session: Of this rank, opened with `several_copies`.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._has_failed = False
        self._does: dict[str, Callable[[Sequence[Any]], list[Any]]] = {
            "score": session.score,
            "generate": self._generate,
        }

    @contextlib.contextmanager
    def led(self) -> Iterator[None]:
        """Lead, for the duration of a with block, on the main rank; the others are let go at its end."""
        try:
            yield
        finally:
            if not self._has_failed:  # others are then in the midst of the work, or gone
                self._announce(None)

    @property
    def has_failed(self) -> bool:
        """Whether this rank failed in the midst of what all copies do."""
        return self._has_failed

    def follow(self) -> None:
        """Do what the main rank hands out, on all other ranks, until it has no more. Collective: all ranks."""
        while (work := self._announce(None)) is not None:
            self._do(work)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """Return how likely continuations are; called on the main rank, while the others follow.

        Raises:
            ConfigError: As `Session.score`.
        """
        # Texts that begin alike belong together: a copy reads their beginning once.
        order = sorted(range(len(requests)), key=lambda number: requests[number].context_ids)
        return self._lead("score", requests, order)

    def generate(
        self, prompts: Sequence[Prompt], options: Sequence[GenerationOptions] | GenerationOptions
    ) -> list[GeneratedText]:
        """Return a text for each prompt; called on the main rank, while the others follow.

        Args:
            prompts: What is continued.
            options: How, for all or for each; one text per prompt.

        Raises:
            ConfigError: As `Session.generate`.
        """
        of_each = [options] * len(prompts) if isinstance(options, GenerationOptions) else options
        # Long prompts first, one to each copy in turn: the copies end at about the same time.
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number].ids))
        num_copies = self._num_copies
        dealt = [number for copy in range(num_copies) for number in order[copy::num_copies]]
        return self._lead("generate", list(zip(prompts, of_each, strict=True)), dealt)

    @property
    def _num_copies(self) -> int:
        return self.session.layout.dp_size

    def _lead(self, name: str, items: Sequence[Any], order: Sequence[int]) -> list[Any]:
        """Have the copies do something with items, each with a stretch of their order."""
        work: Work = (name, [items[number] for number in order])
        self._announce(work)
        self._has_failed = True
        found = self._do(work)
        self._has_failed = False
        results: list[Any] = [None] * len(items)
        for number, result in zip(order, found, strict=True):
            results[number] = result
        return results

    def _do(self, work: Work) -> list[Any]:
        """Do this copy's share; returns all results on the main rank, in the order of the items."""
        name, items = work
        layout = self.session.layout
        begin, end = (len(items) * copy // layout.dp_size for copy in (layout.dp_rank, layout.dp_rank + 1))
        share = self._does[name](items[begin:end])
        if layout.dp_size == 1:
            return share
        shares: list[Any] | None = [None] * layout.world_size if layout.is_main else None
        is_first_of_copy = layout.tp_rank == 0 and layout.pp_rank == 0
        dist.gather_object((layout.dp_rank, share) if is_first_of_copy else None, shares, dst=0)
        by_copy = dict(entry for entry in shares or () if entry is not None)
        return [result for copy in sorted(by_copy) for result in by_copy[copy]]

    def _generate(self, items: Sequence[tuple[Prompt, GenerationOptions]]) -> list[GeneratedText]:
        samples = [self.session.submit(prompt, options)[0] for prompt, options in items]
        for _ in self.session.run():
            pass
        return [GeneratedText(sample.text, tuple(sample.token_ids), str(sample.finish_reason)) for sample in samples]

    def _announce(self, work: Work | None) -> Work | None:
        """Tell all ranks what the main one has to do. Collective: all ranks."""
        if self.session.layout.world_size == 1:
            return work
        told: list[Work | None] = [work]
        dist.broadcast_object_list(told, src=0)
        return told[0]
