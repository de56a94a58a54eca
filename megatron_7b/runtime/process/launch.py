"""Start the ranks of one node and wait for them.

The processes are started directly, with the environment that torch.distributed's `env://` rendezvous reads, rather than
through torchrun: torchrun turns every child's exit code into 1, so "saved, resume me" (75) would be lost, and it buries
the first error under a page about itself. Under torchrun or another launcher (`RANK` is set) nothing here is used.

Rank 0 of the node keeps the terminal; the others write to log files. Signals are passed on. When a rank fails, the
others are ended, and the failure that theirs follow from is shown once (`runtime.blame`). Only the logs are files with
a name, so that nothing is left, even after kill -9.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import cast

from megatron_7b.runtime.machine.device_facts import threads_per_rank
from megatron_7b.runtime.process.blame import End, Kind, Verdict, first_cause, judge
from megatron_7b.runtime.process.deaths import MemoryWatch, describe_death, signal_name
from megatron_7b.runtime.process.launched import LAUNCHER, create_record_file, read_record
from megatron_7b.runtime.process.signals import EXIT_FINISHED, EXIT_SAVED, heeded_signals
from megatron_7b.runtime.process.terminal import restore_cursor, say

SECONDS_TO_FAIL = 3.0
"""After a failure, or after a rank has saved and left, how long the others have to follow before they are ended."""
SECONDS_TO_EXPLAIN = 20.0
"""The same as long as all that is known follows from a failure of which its own rank has not told yet."""
_LINES_OF_LOG = 20
_BYTES_OF_LOG = 64 * 1024


@dataclass(frozen=True)
class LaunchPlan:
    """Which ranks to start here."""

    num_local_ranks: int
    num_nodes: int = 1
    node_rank: int = 0
    master_address: str = "127.0.0.1"
    master_port: int | None = None
    """Port of the rendezvous on the first node; None finds a free one, which only works for a single node."""
    num_threads: int | None = None
    """Compute threads per rank; None shares the cores. OMP_NUM_THREADS, where set, decides."""
    log_folder: Path | None = None
    """Where ranks other than the first write what they print; None keeps it in memory, for the message of a failure."""
    resumable: bool = False
    """Whether the same command continues what was stopped: then a stop before the first step ends with 75 as well."""

    @property
    def world_size(self) -> int:
        """Ranks of the whole run."""
        return self.num_nodes * self.num_local_ranks


@dataclass
class _Rank:
    """One started process."""

    rank: int
    process: subprocess.Popen[bytes]
    record_file: int
    log: Path | None
    """Where its output goes, if that has a name."""
    output: int | None
    """Descriptor of its output; None for the rank that has the terminal."""
    log_start: int = 0
    """Size of the log before this life of the run, which is appended to it."""
    killed: bool = False
    """Whether we ended it, so that its exit code says nothing."""
    seen_ended: float = 0.0
    """Monotonic time at which it was first seen to have ended."""

    @property
    def code(self) -> int | None:
        """Exit code; negative after a signal, None while it runs."""
        return self.process.poll()

    @property
    def end(self) -> End:
        """What is known about its end so far."""
        code = self.code
        if code is not None and not self.seen_ended:
            self.seen_ended = time.monotonic()
        return End(self.rank, None if self.killed else code, self.seen_ended, read_record(self.record_file))


def is_rank() -> bool:
    """Return whether this process is already a rank, started by torchrun, by a Slurm script or by `launch`."""
    return "RANK" in os.environ


@contextlib.contextmanager
def without_launcher() -> Iterator[None]:
    """Let this process be a world of its own for the duration of a with block, whatever has launched it.

    For what the main rank does while the others wait for its files: a process group would wait for them.
    """
    rank = os.environ.pop("RANK", None)
    try:
        yield
    finally:
        if rank is not None:
            os.environ["RANK"] = rank


def megatron_command(arguments: Sequence[str]) -> list[str]:
    """Return the process that runs `megatron-7b ARGUMENTS` with this interpreter."""
    return [sys.executable, "-m", "megatron_7b", *arguments]


def launch(command: Sequence[str], plan: LaunchPlan) -> int:
    """Run `command` as every local rank, and wait for all of them.

    Returns:
        0 when all ranks finished, 75 when they saved and want to be resumed; otherwise the exit code of the rank that
        the others failed because of, or 128 + the signal that ended it. The failure is printed to stderr.
    """
    with contextlib.ExitStack() as stack:
        memory = MemoryWatch()
        port = plan.master_port or stack.enter_context(_reserved_port())
        launched = _Launched(plan)
        stack.callback(launched.close)
        with launched.passing_signals_on():
            launched.start(command, port)
            launched.wait()
            cause = launched.cause
        restore_cursor()
        saved = any(rank.code == EXIT_SAVED for rank in launched.ranks)
        if cause is None or (saved and cause.kind is Kind.FOLLOWED):
            return EXIT_SAVED if saved else EXIT_FINISHED
        launched.tell(cause, memory)
        return cause.exit_code


class _Launched:
    """The ranks that were started here, and the signals that came for them."""

    def __init__(self, plan: LaunchPlan) -> None:
        self.ranks: list[_Rank] = []
        self._plan = plan
        self._asked: list[signal.Signals] = []
        self._all_started = False

    def start(self, command: Sequence[str], port: int) -> None:
        """Start all ranks, then pass on what has come meanwhile."""
        for local_rank in range(self._plan.num_local_ranks):
            self.ranks.append(_start(command, self._plan, port, local_rank))
        self._all_started = True
        for number in tuple(self._asked):
            self._send(number)

    @contextlib.contextmanager
    def passing_signals_on(self) -> Iterator[None]:
        """Pass signals on to the ranks for the duration of a with block; Ctrl-Z holds them, too."""
        handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]]
        handlers = dict.fromkeys(heeded_signals(), self._ask)
        if signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
            handlers[signal.SIGTSTP] = self._hold
        former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def wait(self) -> None:
        """Return when all ranks have ended; those that are left a moment after the first failure are ended."""
        first_seen: dict[bool, float] = {}
        while not all([rank.code is not None for rank in self.ranks]):  # noqa: C419 - each is asked: see `_Rank.end`
            now = time.monotonic()
            for explained in self._evidence():
                first_seen.setdefault(explained, now)
            deadlines = {True: SECONDS_TO_FAIL, False: SECONDS_TO_EXPLAIN}
            if any(now > seen + deadlines[explained] for explained, seen in first_seen.items()):
                self._kill()
            time.sleep(0.05)

    @property
    def cause(self) -> Verdict | None:
        """The end that the others follow from; None where all finished or saved."""
        return first_cause(self._verdicts())

    def tell(self, cause: Verdict, memory: MemoryWatch) -> None:
        """Print why the run ended."""
        (rank,) = [rank for rank in self.ranks if rank.rank == cause.end.rank]
        say(_describe(cause, rank, memory, resumable=self._plan.resumable))
        logs = [rank.log for rank in self.ranks if rank.log is not None]
        if logs and cause.kind not in (Kind.STOPPED, Kind.INTERRUPTED):
            say(f"the other ranks' output is in {logs[0].parent}")

    def close(self) -> None:
        """End the ranks that still run."""
        self._kill()
        for rank in self.ranks:
            os.close(rank.record_file)
            if rank.output is not None:
                os.close(rank.output)

    def _verdicts(self) -> list[Verdict]:
        verdicts = [judge(rank.end, asked=self._asked, resumable=self._plan.resumable) for rank in self.ranks]
        return [verdict for verdict in verdicts if verdict is not None]

    def _evidence(self) -> list[bool]:
        """For each rank that shows that the others have to end: whether it also shows why."""
        evidence = [verdict.kind is not Kind.FOLLOWED for verdict in self._verdicts()]
        return evidence + [True for rank in self.ranks if rank.code == EXIT_SAVED]

    def _kill(self) -> None:
        """End the ranks that still run, with the processes that they started."""
        for rank in self.ranks:
            if rank.code is None:
                rank.killed = True
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.process.pid, signal.SIGKILL)
                rank.process.wait()

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self._asked.append(signal.Signals(number))
        if self._all_started:  # a rank that is being started is not in the list yet
            self._send(number)

    def _hold(self, _number: int, _frame: FrameType | None) -> None:
        """Stop with all ranks, which the terminal does not reach, until the shell continues us."""
        self._send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._send(signal.SIGCONT)

    def _send(self, number: int) -> None:
        for rank in self.ranks:
            if rank.code is None:
                rank.process.send_signal(number)


def _start(command: Sequence[str], plan: LaunchPlan, port: int, local_rank: int) -> _Rank:
    rank = plan.node_rank * plan.num_local_ranks + local_rank
    record_file = create_record_file()
    environment = {
        "OMP_NUM_THREADS": str(plan.num_threads or threads_per_rank(plan.num_local_ranks)),
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(plan.world_size),
        "LOCAL_WORLD_SIZE": str(plan.num_local_ranks),
        "GROUP_RANK": str(plan.node_rank),
        "MASTER_ADDR": plan.master_address,
        "MASTER_PORT": str(port),
        LAUNCHER: f"{os.getpid()}:{record_file}",
    }
    if local_rank == 0:
        process = subprocess.Popen(list(command), env=environment, process_group=0, pass_fds=[record_file])
        return _Rank(rank, process, record_file, None, None)
    log, output = _open_log(plan, rank)
    log_start = os.fstat(output).st_size
    process = subprocess.Popen(
        list(command), env=environment, process_group=0, pass_fds=[record_file],
        stdin=subprocess.DEVNULL, stdout=output, stderr=output,
    )  # fmt: skip
    return _Rank(rank, process, record_file, log, output, log_start)


def _open_log(plan: LaunchPlan, rank: int) -> tuple[Path | None, int]:
    """Return where a rank's output goes: the file, if it has a name, and a descriptor."""
    if plan.log_folder is None:
        return None, create_record_file()
    plan.log_folder.mkdir(parents=True, exist_ok=True)
    log = plan.log_folder / f"rank_{rank:05d}.log"
    return log, os.open(log, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """Yield a free TCP port that nobody else can get before rank 0 listens on it.

    The socket stays bound without listening. Linux lets rank 0, which sets SO_REUSEADDR as we do, bind the port beside
    it, while it is taken for everyone who asks for any free port.
    """
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        yield cast(int, holder.getsockname()[1])


def _describe(cause: Verdict, rank: _Rank, memory: MemoryWatch, *, resumable: bool) -> str:
    """Return what to print about the end that the others follow from."""
    code, record = cause.end.code, cause.end.record
    if record is not None:
        return record.message if cause.kind is Kind.STOPPED else f"error: {record.message}"
    if cause.kind is Kind.INTERRUPTED:
        return "interrupted"
    if code is None or code > 0:
        return f"error: rank {rank.rank} left with exit code {code}{_tail(rank)}"
    name = signal_name(-code)
    if cause.kind is Kind.STOPPED:
        return f"stopped by {name}" + (" before the first step: the same command continues" if resumable else "")
    meaning = describe_death(-code, memory)
    return f"error: rank {rank.rank} was ended by {name}" + (f"; {meaning}" if meaning else "") + _tail(rank)


def _tail(rank: _Rank) -> str:
    """Return the end of what a rank printed, if that did not go to the terminal."""
    if rank.output is None:
        return ""
    size = os.fstat(rank.output).st_size
    start = max(rank.log_start, size - _BYTES_OF_LOG)
    lines = os.pread(rank.output, size - start, start).decode("utf-8", errors="replace").splitlines()
    return "".join(f"\n  {line}" for line in lines[-_LINES_OF_LOG:])
