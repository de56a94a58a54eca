"""Tasks over worker processes, none of which is waited for after it has died or hangs.

A worker that is killed (most often for memory), or whose heart has not beaten for some time, costs its task one more
try in a fresh process. Where both ended at the same document, the task quarantines it and continues; else the run stops
and names the task. A mistake that the user can fix and our bugs stop the run at once. Workers end with their
parent, however that ends.
"""

import errno
import multiprocessing
import os
import signal
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, Self

from megatron_7b.errors import MegatronError
from megatron_7b.prepare.running.heartbeat import Heartbeat, make_cells
from megatron_7b.runtime.process.signals import end_with_parent

ATTEMPTS = 2
STALL_SECONDS = 600.0
_MAX_SKIPPED = 10
"""Documents of one task that may be quarantined for ending workers: with more, something else is wrong."""
_LONGEST_TICK_SECONDS = 1.0
"""Between two looks at the hearts. A longer time that has passed (a laptop that slept) is not held against a worker."""
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
"""Errors of the system, which are not our bugs."""
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


class Task(Protocol):
    """Work that a process of its own can do; picklable."""

    @property
    def label(self) -> str:
        """Names it in messages."""

    def run(self, heartbeat: Heartbeat) -> None:
        """Do it, so that its result is on disk, and tell on the way what is being looked at."""


@dataclass(slots=True)
class _Worker:
    process: Any
    connection: Connection
    heartbeat: Heartbeat
    task: int | None = None
    beats: int = 0
    """When it was last looked at."""
    still_seconds: float = 0.0
    """For how long there have been no more."""
    is_stalled: bool = False


@dataclass(frozen=True, slots=True)
class _Death:
    place: str
    how: str


class Supervisor:
    """Worker processes, started when there is work for them and ended at the end of the `with`.

    Args:
        num_workers: At once.
        warn: Is told of documents that were given up.
        stall_seconds: A worker without a heartbeat for this long is ended.
    """

    def __init__(
        self, num_workers: int, warn: Callable[[str], None] = lambda _: None, stall_seconds: float = STALL_SECONDS
    ) -> None:
        self._num_workers = num_workers
        self._warn = warn
        self._stall_seconds = stall_seconds
        self._workers: list[_Worker] = []
        self._tasks: Sequence[Task] = ()
        self._waiting: deque[int] = deque()
        self._deaths: dict[int, list[_Death]] = {}
        self._skipped: dict[int, dict[str, str]] = {}
        # Not forked: the parent may have threads.
        self._context = multiprocessing.get_context("spawn")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()

    def run(self, tasks: Sequence[Task], on_done: Callable[[int], None]) -> None:
        """Run every task, as many at a time as there are workers, in their order.

        Args:
            tasks: What to do.
            on_done: Called here with the index of each task that is done.

        Raises:
            MegatronError: What a task raised, or a task whose workers ended at no document that could be left out.
            RuntimeError: A task failed in another way; with its traceback.
        """
        self._tasks, self._waiting = tasks, deque(range(len(tasks)))
        self._deaths, self._skipped = defaultdict(list), defaultdict(dict)
        for worker in list(self._workers):
            self._hand_out(worker)
        while self._waiting and len(self._workers) < self._num_workers:
            self._start_worker()
        tick = min(_LONGEST_TICK_SECONDS, self._stall_seconds / 4)
        while any(worker.task is not None for worker in self._workers):
            started = time.monotonic()
            ready = wait([worker.connection for worker in self._workers], timeout=tick)
            for worker in [worker for worker in self._workers if worker.connection in ready]:
                self._hear(worker, on_done)
            self._end_stalled(min(time.monotonic() - started, 2 * tick))

    def _start_worker(self) -> None:
        ours, theirs = self._context.Pipe()
        cells = make_cells(self._context)
        process = self._context.Process(target=_work, args=(theirs, cells), name="prepare")
        process.start()
        theirs.close()  # so that its end shows as the end of the stream
        worker = _Worker(process, ours, Heartbeat(cells))
        self._workers.append(worker)
        self._hand_out(worker)

    def _hand_out(self, worker: _Worker) -> None:
        worker.task = self._waiting.popleft() if self._waiting else None
        if worker.task is not None:
            worker.heartbeat.reset()
            worker.beats, worker.still_seconds = 0, 0.0
            try:
                worker.connection.send((self._tasks[worker.task], dict(self._skipped[worker.task])))
            except OSError:  # it has died with nothing to do; its end will be heard
                self._waiting.appendleft(worker.task)
                worker.task = None

    def _end_stalled(self, seconds: float) -> None:
        """Kill workers that have told nothing for too long, `seconds` after the last look; their end will be heard."""
        for worker in self._workers:
            beats = worker.heartbeat.beats
            is_still = worker.task is not None and beats == worker.beats > 0
            worker.beats, worker.still_seconds = beats, worker.still_seconds + seconds if is_still else 0.0
            if worker.still_seconds >= self._stall_seconds and not worker.is_stalled:
                worker.is_stalled = True
                worker.process.kill()

    def _hear(self, worker: _Worker, on_done: Callable[[int], None]) -> None:
        try:
            failure = worker.connection.recv()
        except (EOFError, OSError):
            self._bury(worker)
            return
        if isinstance(failure, MegatronError):
            raise failure
        assert worker.task is not None
        if failure is not None:
            raise RuntimeError(f"{self._tasks[worker.task].label} failed:\n{failure}")
        done = worker.task
        self._hand_out(worker)
        on_done(done)

    def _bury(self, worker: _Worker) -> None:
        worker.process.join()
        worker.connection.close()
        self._workers.remove(worker)
        if worker.task is not None:
            self._blame(worker.task, _Death(worker.heartbeat.place, self._explain(worker)))
            self._waiting.appendleft(worker.task)
        if self._waiting:
            self._start_worker()

    def _blame(self, task: int, death: _Death) -> None:
        """Give up a document that has ended two workers, or the run if there is no such document."""
        deaths = self._deaths[task]
        deaths.append(death)
        if len(deaths) < ATTEMPTS:
            return
        places = {one.place for one in deaths}
        skipped = self._skipped[task]
        if len(places) > 1 or not death.place or len(skipped) == _MAX_SKIPPED:
            raise MegatronError(
                f"{self._tasks[task].label}: its worker {death.how}, {ATTEMPTS} times",
                hint="signal 9 is most often the kernel being out of memory: fewer --workers, or a smaller "
                "--reading.shard-megabytes; the same command continues where it stopped",
            )
        skipped[death.place] = f"its worker {death.how}, {ATTEMPTS} times"
        deaths.clear()
        self._warn(f"{death.place} is quarantined: {skipped[death.place]}")

    def _explain(self, worker: _Worker) -> str:
        """Return how a worker ended, and at what."""
        code = worker.process.exitcode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        if worker.is_stalled:
            how = f"made no progress for {self._stall_seconds:g} seconds"
        stage = f" in stage {worker.heartbeat.stage}" if worker.heartbeat.stage else ""
        return f"{how}{stage}"


def _work(connection: Connection, cells: Any) -> None:
    """Be a worker: tasks come, None or a failure goes back."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends us
    for variable in ONE_THREAD:
        os.environ[variable] = "1"
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    end_with_parent(parent.pid)  # a thread could not see to it while C code holds the interpreter
    while True:
        try:
            task, skipped = connection.recv()
        except EOFError:
            return
        failure: object = None
        try:
            task.run(Heartbeat(cells, skipped))
        except MegatronError as error:
            failure = error
        except OSError as error:
            failure = MegatronError(f"{task.label}: {error}") if _is_of_the_disk(error) else traceback.format_exc()
        except Exception:  # noqa: BLE001  # its traceback is raised by the parent
            failure = traceback.format_exc()
        connection.send(failure)


def _is_of_the_disk(error: OSError) -> bool:
    # NumPy says of a full disk how many elements it has written, and no number.
    return error.errno in _OF_THE_DISK or (error.errno is None and str(error).endswith(" written"))
