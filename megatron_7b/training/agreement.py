"""Agreement among the ranks of a run: maxima over all of them, and failures that all of them learn about."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist

from megatron_7b.errors import CollectiveError, MegatronError


class Ranks:
    """All ranks of the default process group, as seen from one of them."""

    def __init__(self, device: torch.device) -> None:
        """Look up rank and world size.

        Args:
            device: Where this rank keeps the tensors that it communicates.
        """
        self._device = device
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.failed_together = False
        """Whether a `together` block has failed: all ranks know it, wait for nobody, and can still communicate."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what exists once."""
        return self.rank == 0

    def maximum(self, *values: int) -> list[int]:
        """Return the largest of each value over all ranks; every rank gets the same.

        Collective: all ranks, with equally many values.
        """
        if self.world_size == 1:
            return list(values)
        largest = torch.tensor(values, dtype=torch.int64, device=self._device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return [int(value) for value in largest.tolist()]

    def gather[T](self, value: T) -> list[T]:
        """Return the value of each rank, in their order; every rank gets all of them.

        Collective: all ranks.
        """
        if self.world_size == 1:
            return [value]
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return cast(list[T], values)

    def gather_numbers(self, values: list[float]) -> list[list[float]]:
        """Return the numbers of each rank, in their order; every rank gets all of them.

        Collective: all ranks, with equally many values; one, of so many FP64 numbers per rank.
        """
        if self.world_size == 1:
            return [values]
        own = torch.tensor(values, dtype=torch.float64, device=self._device)
        rows = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(rows, own)
        return [row.tolist() for row in rows]

    def from_main[T](self, value: T) -> T:
        """Return the main rank's value, which can be pickled, on all ranks. Collective: all ranks."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self._device)
        return box[0]

    @contextmanager
    def together(self, action: str) -> Iterator[None]:
        """Make a with block fail on all ranks if it fails on any, so that none waits for a peer that has left.

        For work without communication. A rank that fails inside a collective ends the others anyway: its process
        exits, and the launcher ends the rest.

        Args:
            action: What the block does, for the message of the ranks that did not fail: "reading the corpus".

        Collective: all ranks, at the end of the block.

        Raises:
            CollectiveError: The block succeeded here and failed on another rank, which raises its own error. Its
                message is repeated here, because the other rank may be ended before it has shown it.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 (raised again below)
            failure = error
        try:
            failed_rank, reason = self._last_failure(failure)
            self.failed_together = failed_rank >= 0
        except Exception:
            if failure is None:
                raise
            # A peer was lost meanwhile; that must not hide what failed here.
        if failure is not None:
            raise failure
        if failed_rank >= 0:
            raise CollectiveError(f"rank {failed_rank} failed in {action}: {reason}")

    def _last_failure(self, own: Exception | None) -> tuple[int, str]:
        """Return the last rank that failed, or -1, and what it says. Collective: all ranks."""
        (rank,) = self.maximum(-1 if own is None else self.rank)
        if rank < 0 or self.world_size == 1:
            return rank, ""
        reason = [_in_words(own) if own is not None and rank == self.rank else None]
        dist.broadcast_object_list(reason, src=rank, device=self._device)
        return rank, str(reason[0])


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, MegatronError) else f"{type(error).__name__}: {error}"
