"""How the ranks of a run keep one mind: maxima over all of them, and failures that all of them learn of."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_7b.errors import CollectiveError


class Ranks:
    """All ranks of the default process group, as seen from one of them."""

    def __init__(self, device: torch.device) -> None:
        """Keep the device on which the group communicates.

        Args:
            device: Of this rank.
        """
        self._device = device
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

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

    @contextmanager
    def together(self, action: str) -> Iterator[None]:
        """Let a with block fail on all ranks where it fails on one, so that none waits for a peer that has gone.

        For work that ranks do by themselves. A rank that fails inside a collective takes the others with it anyway:
        its process ends, and the launcher ends the rest.

        Args:
            action: What the block does, for the message of the ranks that did not fail: "reading the corpus".

        Collective: all ranks, at the end of the block.

        Raises:
            CollectiveError: The block succeeded here and failed on another rank. The rank that failed raises what it
                failed with.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 (raised again below)
            failure = error
        (failed_rank,) = self.maximum(-1 if failure is None else self.rank)
        if failure is not None:
            raise failure
        if failed_rank >= 0:
            raise CollectiveError(f"rank {failed_rank} failed in {action}; its own message says why")
