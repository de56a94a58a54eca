"""Which of the waiting texts join those being written: as many as there is room for, the oldest first."""

import collections
from collections.abc import Iterable

from megatron_7b.serving.jobs import WritingJob

MAX_READ_TOKENS = 16_384
"""Tokens, filled-up ones included, of the prompts that are read in one step: others wait for it meanwhile."""


class Admission:
    """The texts of one model that wait and that are being written.

    All rows of a cache are as long as the longest one may become, so a long text takes room from every other.

    Args:
        num_copies: Copies of the model, each with a cache of its own.
        max_rows: Texts that share a forward pass of a copy.
        max_cache_tokens: Tokens, all rows together, that a copy's cache has room for.
    """

    def __init__(self, *, num_copies: int, max_rows: int, max_cache_tokens: int) -> None:
        self.max_rows = max_rows
        self.max_cache_tokens = max_cache_tokens
        self.waiting: collections.deque[WritingJob] = collections.deque()
        self._running: list[dict[int, WritingJob]] = [{} for _ in range(num_copies)]

    @property
    def has_work(self) -> bool:
        """Whether texts wait or are being written."""
        return bool(self.waiting) or any(self._running)

    @property
    def num_waiting(self) -> int:
        """Texts that wait."""
        return sum(job.num_texts for job in self.waiting)

    @property
    def num_running(self) -> int:
        """Texts that are being written."""
        return sum(_num_rows(running.values()) for running in self._running)

    @property
    def cache_usage(self) -> float:
        """Share of the caches' room that running texts may come to need."""
        needed = sum(_tokens(running.values()) for running in self._running)
        return needed / (self.max_cache_tokens * len(self._running))

    def job(self, ticket: int) -> WritingJob | None:
        """Return a job whose texts are being written."""
        return next((running[ticket] for running in self._running if ticket in running), None)

    def running(self) -> list[WritingJob]:
        """Return all jobs whose texts are being written."""
        return [job for running in self._running for job in running.values()]

    def fits_alone(self, job: WritingJob) -> bool:
        """Whether there is ever room for a job."""
        return job.num_texts <= self.max_rows and job.num_texts * job.max_length <= self.max_cache_tokens

    def admit(self) -> list[WritingJob]:
        """Take jobs from the queue, each with the copy that writes it."""
        admitted: list[WritingJob] = []
        longest = [0] * len(self._running)
        rows = [0] * len(self._running)
        while self.waiting:
            job = self.waiting[0]
            copy = min(range(len(self._running)), key=lambda number: _num_rows(self._running[number].values()))
            running = self._running[copy]
            read = max(longest[copy], len(job.prompt.ids)) * (rows[copy] + 1)
            together = [*running.values(), job]
            if _num_rows(together) > self.max_rows or (running and _tokens(together) > self.max_cache_tokens):
                break
            if rows[copy] and read > MAX_READ_TOKENS:
                break
            longest[copy], rows[copy] = max(longest[copy], len(job.prompt.ids)), rows[copy] + 1
            job.copy = copy
            running[job.ticket] = self.waiting.popleft()
            admitted.append(job)
        return admitted

    def remove(self, job: WritingJob) -> bool:
        """Forget a job; returns whether it was being written."""
        if self._running[job.copy].pop(job.ticket, None) is not None:
            return True
        if job in self.waiting:
            self.waiting.remove(job)
        return False


def _num_rows(jobs: Iterable[WritingJob]) -> int:
    return sum(job.num_texts for job in jobs)


def _tokens(jobs: Iterable[WritingJob]) -> int:
    """Tokens that the cache has room for once it holds these jobs."""
    given = list(jobs)
    return _num_rows(given) * max((job.max_length for job in given), default=0)
