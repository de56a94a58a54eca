"""The rank's side of `runtime.launch`: ending with the launcher, and telling it why this rank ends.

A rank writes one record into a file in memory that it has inherited from the launcher: no disk can be full, and nothing
is left over, however either of them ends.
"""

import contextlib
import json
import os
import re
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from typing import Literal

from megatron_7b.errors import CollectiveError, MegatronError
from megatron_7b.runtime.process.signals import EXIT_SAVED, end_with_parent

LAUNCHER = "MEGATRON_7B_LAUNCHER"
"""Environment variable of a rank: the launcher's process id and the number of the file for its record."""

Kind = Literal["own", "followed", "stopped"]
"""Why a rank ends: an error of its own, one that follows from the loss of another rank, or a request."""

_DISTRIBUTED_ERRORS = {"DistBackendError", "DistNetworkError", "DistStoreError"}
"""Of torch.distributed, which must not be imported here; they mean NCCL and the rendezvous."""
_LOST_PEER = re.compile(
    r"gloo|nccl|connection (reset|closed|refused|aborted)|broken pipe|socket closed|timed out waiting", re.IGNORECASE
)
"""How communication libraries word the loss of a peer in a RuntimeError."""

_record_file: int | None = None


@dataclass(frozen=True)
class Record:
    """What a rank tells its launcher about its end."""

    kind: Kind
    exit_code: int
    message: str
    time: float
    """Monotonic seconds, which all processes of a machine share."""


def create_record_file() -> int:
    """Create a file without a name; returns its descriptor."""
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or forbidden
        return os.memfd_create("megatron_7b_rank")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def read_record(descriptor: int) -> Record | None:
    """Return what the rank has written; None if there is nothing, or not all of it."""
    try:
        return Record(**json.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0)))
    except (ValueError, TypeError):
        return None


def join_launcher() -> None:
    """For a process started by `launch`: end with the launcher, even if that is killed with SIGKILL."""
    global _record_file  # noqa: PLW0603 - what this process has inherited
    word = os.environ.pop(LAUNCHER, None)  # Taken out: a child of ours has us as its parent.
    if word is not None:
        launcher, _, descriptor = word.partition(":")
        _record_file = int(descriptor)
        os.set_inheritable(_record_file, False)
        end_with_parent(int(launcher))


def has_launcher() -> bool:
    """Return whether this process was started by `launch`, which says why it has ended."""
    return _record_file is not None


def record_failure(error: BaseException, exit_code: int) -> bool:
    """For a process started by `launch`: pass the error to the launcher, which shows only the one that came first.

    Returns:
        Whether there is such a launcher; otherwise the caller reports the error itself.
    """
    message = str(error) if isinstance(error, MegatronError) else _traceback(error)
    return _write("followed" if follows_from_a_lost_peer(error) else "own", exit_code, message)


def record_stop(message: str) -> bool:
    """For a process started by `launch`: tell the launcher that this rank leaves because it was asked to.

    Returns:
        Whether there is such a launcher; otherwise the caller says so itself.
    """
    return _write("stopped", EXIT_SAVED, message)


def follows_from_a_lost_peer(error: BaseException) -> bool:
    """Return whether an error, or one that it was raised from, is what a rank makes of the failure of another."""
    reason: BaseException | None = error
    while reason is not None:
        if isinstance(reason, CollectiveError) or _names_a_lost_peer(reason):
            return True
        reason = reason.__cause__
    return False


def _names_a_lost_peer(error: BaseException) -> bool:
    if _DISTRIBUTED_ERRORS & {base.__name__ for base in type(error).__mro__}:
        return True
    return type(error) is RuntimeError and _LOST_PEER.search(str(error)) is not None


def _traceback(error: BaseException) -> str:
    rank = os.environ.get("RANK", "?")
    return f"rank {rank} failed\n" + "".join(traceback.format_exception(error)).rstrip()


def _write(kind: Kind, exit_code: int, message: str) -> bool:
    if _record_file is None:
        return False
    if os.fstat(_record_file).st_size == 0:  # The first word counts: what follows is of its own making.
        record = Record(kind, exit_code, message, time.monotonic())
        os.pwrite(_record_file, json.dumps(asdict(record)).encode(), 0)
    return True
