"""The engine's thread: takes jobs of clients, has the ranks do rounds, and hands out what comes.

It is the process's main thread, where models are opened and signals arrive; the web server has a thread of its own.
"""

import logging
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

from megatron_7b.generation.grammars import Grammar
from megatron_7b.serving.admission import Admission
from megatron_7b.serving.errors import ApiError, not_expected, stopping
from megatron_7b.serving.jobs import Job, Preparation, WholeJob, WritingJob
from megatron_7b.serving.leading import REST_SECONDS, RankLeader
from megatron_7b.serving.metrics import Metrics
from megatron_7b.serving.rounds import Begin, News, Refused, Round, Written

logger = logging.getLogger(__name__)


class ServingEngine:
    """Does what clients ask, until it is told to stop.

    Args:
        leader: Of the models on all ranks.
        admissions: Of each model that writes texts, by its number.
        max_waiting: Texts that may wait.
        stop_seconds: How long running jobs may take after a request to stop.
        metrics: What is counted.
    """

    def __init__(
        self,
        leader: RankLeader,
        admissions: dict[int, Admission],
        *,
        max_waiting: int,
        stop_seconds: float,
        metrics: Metrics,
    ) -> None:
        self.admissions = admissions
        self.max_waiting = max_waiting
        self.metrics = metrics
        self.is_stopping = False
        self._leader = leader
        self._stop_seconds = stop_seconds
        self._deadline: float | None = None
        # May be put to from a signal's handler, too: it runs in this thread, amid anything.
        self._inbox: queue.SimpleQueue[tuple[str, Job | Preparation | None]] = queue.SimpleQueue()
        self._whole: list[WholeJob] = []
        self._num_waiting = 0
        self._counting = threading.Lock()
        self._drops: dict[int, list[int]] = {}
        self._grammars: dict[int, list[Grammar]] = {}
        self._turn = 0
        self._outbox: list[tuple[Job, object]] = []

    # ------------------------------------------------------------------------------------ in the web server's thread

    def submit(self, job: Job) -> None:
        """Take a job.

        Raises:
            ApiError: The server stops, the queue is full, or there is never room for the texts.
        """
        if self.is_stopping:
            raise stopping()
        num_texts = job.num_texts if isinstance(job, WritingJob) else 1
        if isinstance(job, WritingJob):
            self._check_room(job)
        with self._counting:
            if self._num_waiting + num_texts > self.max_waiting:
                raise ApiError(
                    429,
                    f"{self._num_waiting} texts wait already, and the limit is {self.max_waiting}; try again later",
                    code="queue_full",
                    retry_after=5,
                )
            self._num_waiting += num_texts
        self._inbox.put(("submit", job))

    def announce(self, preparation: Preparation) -> None:
        """Tell the ranks of a grammar, so that they make it ready beside their steps."""
        if self._leader.world_size > 1:
            self._inbox.put(("prepare", preparation))

    def drop(self, job: Job) -> None:
        """Forget a job that nobody waits for any more; nothing happens if it has ended."""
        job.is_dropped = True
        self._inbox.put(("drop", job))

    def _check_room(self, job: WritingJob) -> None:
        admission = self.admissions[job.model]
        if job.num_texts > admission.max_rows:
            raise ApiError(
                400,
                f"n is {job.num_texts}, but a forward pass has room for {admission.max_rows} texts",
                param="n",
                code="invalid_request",
            )
        if not admission.fits_alone(job):
            raise ApiError(
                400,
                f"{job.num_texts} text(s) of up to {job.max_length} tokens do not fit into the cache, which has room "
                f"for {admission.max_cache_tokens} tokens; shorten the prompt, or ask for fewer tokens",
                code="context_length_exceeded",
            )

    # ---------------------------------------------------------------------------------------------- anywhere

    def stop(self) -> None:
        """Take no more jobs, finish those that run within the time for it, and return from `run`.

        A second call ends them at once.
        """
        now = time.monotonic()
        self._deadline = now if self.is_stopping else now + self._stop_seconds
        self.is_stopping = True
        self._inbox.put(("wake", None))

    # --------------------------------------------------------------------------------------- in the engine's thread

    def run(self) -> None:
        """Work until told to stop. On the main rank, while all others follow. Collective: all ranks."""
        try:
            while self._take_orders():
                self._work()
                self._deliver()
        except BaseException:
            self.is_stopping = True
            self._fail_all(not_expected())
            raise
        self._fail_all(stopping())
        self._leader.lead(Round("end"))

    def _take_orders(self) -> bool:
        """Take what has come, waiting for it if nothing is to be done; returns whether to continue."""
        has_work = self._has_work
        if self.is_stopping and (not has_work or time.monotonic() >= (self._deadline or 0.0)):
            return False
        try:
            if has_work:
                self._follow(*self._inbox.get_nowait())
            else:
                wait = REST_SECONDS if self._leader.world_size > 1 else None
                self._follow(*self._inbox.get(timeout=wait))
            while True:
                self._follow(*self._inbox.get_nowait())
        except queue.Empty:
            pass
        return True

    @property
    def _has_work(self) -> bool:
        return bool(self._whole or self._drops or self._grammars) or any(
            one.has_work for one in self.admissions.values()
        )

    def _follow(self, order: str, job: Job | Preparation | None) -> None:
        if order == "submit" and isinstance(job, WritingJob):
            if job.is_dropped:
                self._count_waiting(-job.num_texts)
            else:
                self.admissions[job.model].waiting.append(job)
        elif order == "submit" and isinstance(job, WholeJob):
            self._whole.append(job)
        elif order == "drop" and isinstance(job, WritingJob):
            self._forget(job)
        elif order == "drop" and isinstance(job, WholeJob) and job in self._whole:
            self._whole.remove(job)
            self._count_waiting(-1)
        elif isinstance(job, Preparation):
            self._grammars.setdefault(job.model, []).append(job.grammar)

    def _forget(self, job: WritingJob) -> None:
        admission = self.admissions[job.model]
        was_waiting = job in admission.waiting
        if admission.remove(job):
            self._drops.setdefault(job.model, []).append(job.ticket)
            self.metrics.dropped.inc()
        elif was_waiting:
            self._count_waiting(-job.num_texts)

    def _count_waiting(self, change: int) -> None:
        with self._counting:
            self._num_waiting += change

    def _work(self) -> None:
        """Do one round for every model that has work; a rest if none has."""
        if not self._has_work:
            if self._leader.world_size > 1 and self._inbox.empty():
                self._leader.lead(Round("rest"))
            return
        for number, admission in self.admissions.items():
            if admission.has_work or number in self._drops or number in self._grammars:
                self._write(number, admission)
        if self._whole:
            self._do_whole(self._whole.pop(0))

    def _write(self, number: int, admission: Admission) -> None:
        admitted = admission.admit()
        begins = tuple(Begin(job.ticket, job.copy, job.prompt, job.options) for job in admitted)
        for job in admitted:
            self._count_waiting(-job.num_texts)
            self.metrics.prompt_tokens.inc(len(job.prompt.ids))
        drops, grammars = tuple(self._drops.pop(number, ())), tuple(self._grammars.pop(number, ()))
        self._hand_out(admission, self._leader.lead(Round("write", number, begins, drops, grammars)))
        self.metrics.running.set(sum(one.num_running for one in self.admissions.values()))
        self.metrics.waiting.set(self._num_waiting)
        self.metrics.cache_usage.set(max(one.cache_usage for one in self.admissions.values()))

    def _hand_out(self, admission: Admission, news: Sequence[News]) -> None:
        now = time.monotonic()
        num_tokens = 0
        for one in news:
            job = admission.job(one.ticket)
            if job is None:  # dropped meanwhile
                continue
            if isinstance(one, Refused):
                message = one.message if one.hint is None else f"{one.message}; {one.hint}"
                admission.remove(job)
                self._outbox.append((job, ApiError(400, message, code="invalid_request")))
                continue
            num_tokens += len(one.token_ids)
            if job.first_token is None:
                job.first_token = now
                self.metrics.time_to_first_token.observe(now - job.begun)
                self.metrics.reused_tokens.inc(one.num_reused)
                job.num_reused = one.num_reused
            self._outbox.append((job, one))
            self._end(admission, job, one)
        self.metrics.generated_tokens.inc(num_tokens)

    def _end(self, admission: Admission, job: WritingJob, written: Written) -> None:
        if written.finish_reason is None:
            return
        job.num_unfinished -= 1
        if job.num_unfinished == 0:
            admission.remove(job)

    def _do_whole(self, job: WholeJob) -> None:
        self._count_waiting(-1)
        self._outbox.append((job, self._leader.lead(Round(job.task, job.model, inputs=job.inputs))))

    def _deliver(self) -> None:
        """Give the web server's thread what has come; it is woken once for all."""
        if not self._outbox:
            return
        news, self._outbox = self._outbox, []
        loop = news[0][0].loop
        if not loop.is_closed():
            loop.call_soon_threadsafe(_put_all, news)

    def _fail_all(self, error: ApiError) -> None:
        """Tell everybody who waits that nothing will come."""
        while True:
            try:
                self._follow(*self._inbox.get_nowait())
            except queue.Empty:
                break
        self._deliver()
        jobs: list[Any] = list(self._whole)
        for admission in self.admissions.values():
            jobs += [*admission.waiting, *admission.running()]
        self._outbox = [(job, error) for job in jobs]
        self._deliver()


def _put_all(news: Sequence[tuple[Job, object]]) -> None:
    for job, one in news:
        job.put(one)
