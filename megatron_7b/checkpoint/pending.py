"""A checkpoint that is being written: each rank writes by itself, one publishes, and all learn the outcome.

Either happens in `wait`, or in a thread while training continues. The thread communicates over a process group of its
own, so its collectives never meet those of the training loop, in whatever order the two proceed; and it comes to an
outcome as long as the processes live, even if the loop of one of them has failed.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch.distributed as dist

from megatron_7b.checkpoint.publishing import reason_in_words
from megatron_7b.checkpoint.shards import Shard
from megatron_7b.errors import CheckpointError

logger = logging.getLogger(__name__)

type OwnShards = Mapping[str, Shard]
"""What one rank has written, by folder within the checkpoint; empty for the checkpoint itself."""


class UnwrittenError(Exception):
    """A rank could not write; the message says which, and why."""


class PendingSave:
    """A checkpoint on its way to the disk.

    Args:
        write: Writes what this rank contributes, without communication.
        publish: On the main rank, makes a checkpoint of what all ranks have written and returns its folder. It is
            called with an `UnwrittenError` instead if one of them could not, and raises a CheckpointError.
        group: Of all ranks, used by nobody else until the outcome is known; None is the default group.
    """

    def __init__(
        self,
        write: Callable[[], OwnShards],
        publish: Callable[[Sequence[OwnShards] | UnwrittenError], Path],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._write: Callable[[], OwnShards] | None = write
        self._publish = publish
        self._group = group
        self._outcome: Future[Path] = Future()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Have a thread do it while the caller does something else."""
        self._thread = threading.Thread(target=self._complete, name="checkpoint", daemon=True)
        self._thread.start()

    def is_done(self) -> bool:
        """Return whether this rank knows the outcome, so that `wait` returns at once; others may not know it yet."""
        return self._outcome.done()

    def wait(self) -> Path:
        """Return the published folder once it is there.

        Collective: all ranks, unless a thread does it.

        Raises:
            CheckpointError: It could not be written: nothing was published, and nothing is left on the disk. All ranks
                raise the same.
        """
        if self._thread is None and not self._outcome.done():
            self._complete()
        return self._outcome.result()

    def _complete(self) -> None:
        try:
            self._outcome.set_result(self._write_and_publish())
        except BaseException as error:  # noqa: BLE001 (raised by `wait`)
            self._outcome.set_exception(error)

    def _write_and_publish(self) -> Path:
        rank, size = dist.get_rank(), dist.get_world_size()
        gathered: list[OwnShards | str] | None = [{}] * size if rank == 0 else None
        dist.gather_object(self._own_shards(), gathered, dst=0, group=self._group)
        box: list[Path | CheckpointError | None] = [None]
        if gathered is not None:
            problems = [f"rank {number}: {found}" for number, found in enumerate(gathered) if isinstance(found, str)]
            shards = [found for found in gathered if not isinstance(found, str)]
            try:
                box = [self._publish(UnwrittenError(problems[0]) if problems else shards)]
            except CheckpointError as error:
                box = [error]
        dist.broadcast_object_list(box, src=0, group=self._group)
        if isinstance(box[0], CheckpointError):
            raise box[0]
        assert box[0] is not None
        return box[0]

    def _own_shards(self) -> OwnShards | str:
        """Write; return why it was impossible otherwise, so that nobody waits for this rank."""
        assert self._write is not None
        try:
            return self._write()
        except Exception as error:  # whatever it is, all ranks have to know
            logger.debug("this rank could not write", exc_info=True)
            return reason_in_words(error)
        finally:
            self._write = None  # and with it the copies of tensors
