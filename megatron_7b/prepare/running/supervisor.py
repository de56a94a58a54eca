"""Tasks over worker processes, none of which is waited for after it has died.

A worker that is killed (most often for memory) costs its task one more try in a fresh process; killed again, the run
stops and names the task. A mistake that the user can mend and a defect of ours stop the run at once. Workers end with
their parent, however that ends.
"""

import errno
import multiprocessing
import os
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from megatron_7b.errors import MegatronError

ATTEMPTS = 2
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
"""Errors of the system that are not ours to mend."""
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


class Task(Protocol):
    """Work that a process of its own can do; picklable."""

    @property
    def label(self) -> str:
        """Names it in messages."""

    def run(self) -> None:
        """Do it, so that its result lies on the disk."""


@dataclass(slots=True)
class _Worker:
    process: Any
    connection: Connection
    task: int | None = None


def run_tasks(tasks: Sequence[Task], *, num_workers: int, on_done: Callable[[int], None]) -> None:
    """Run every task, `num_workers` at a time, in their order.

    Args:
        tasks: What to do.
        num_workers: Processes.
        on_done: Called here with the index of each task that is done.

    Raises:
        MegatronError: What a task raised, or a task whose worker was killed on every try.
        RuntimeError: A task failed in another way; with its traceback.
    """
    if tasks:
        _Supervisor(tasks, on_done).run(min(num_workers, len(tasks)))


class _Supervisor:
    def __init__(self, tasks: Sequence[Task], on_done: Callable[[int], None]) -> None:
        self._tasks, self._on_done = tasks, on_done
        self._waiting = deque(range(len(tasks)))
        self._deaths: Counter[int] = Counter()
        self._workers: list[_Worker] = []
        # Not forked: the parent may have threads.
        self._context = multiprocessing.get_context("spawn")

    def run(self, num_workers: int) -> None:
        try:
            for _ in range(num_workers):
                self._start_worker()
            while any(worker.task is not None for worker in self._workers):
                ready = wait([worker.connection for worker in self._workers])
                for worker in [worker for worker in self._workers if worker.connection in ready]:
                    self._hear(worker)
        finally:
            for worker in self._workers:
                worker.connection.close()
                worker.process.terminate()
            for worker in self._workers:
                worker.process.join()

    def _start_worker(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs,), name="prepare")
        process.start()
        theirs.close()  # so that its end shows as the end of the stream
        worker = _Worker(process, ours)
        self._workers.append(worker)
        self._hand_out(worker)

    def _hand_out(self, worker: _Worker) -> None:
        worker.task = self._waiting.popleft() if self._waiting else None
        if worker.task is not None:
            worker.connection.send(self._tasks[worker.task])

    def _hear(self, worker: _Worker) -> None:
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
        self._on_done(done)

    def _bury(self, worker: _Worker) -> None:
        worker.process.join()
        worker.connection.close()
        self._workers.remove(worker)
        if worker.task is None:
            return
        self._deaths[worker.task] += 1
        if self._deaths[worker.task] >= ATTEMPTS:
            code = worker.process.exitcode
            how = f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
            raise MegatronError(
                f"{self._tasks[worker.task].label}: its worker was {how}, {ATTEMPTS} times",
                hint="signal 9 is most often the kernel being out of memory: fewer --workers, or a smaller "
                "--reading.shard-megabytes; the same command goes on where it stopped",
            )
        self._waiting.appendleft(worker.task)
        self._start_worker()


def _work(connection: Connection) -> None:
    """A worker's life: tasks come, None or a failure goes back."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends us
    for variable in _ONE_THREAD:
        os.environ[variable] = "1"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        failure: object = None
        try:
            task.run()
        except MegatronError as error:
            failure = error
        except OSError as error:
            failure = MegatronError(f"{task.label}: {error}") if error.errno in _OF_THE_DISK else traceback.format_exc()
        except Exception:  # noqa: BLE001  # its traceback is raised by the parent
            failure = traceback.format_exc()
        connection.send(failure)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
