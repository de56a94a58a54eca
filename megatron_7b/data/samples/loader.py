"""The microbatches of one data-parallel rank, assembled ahead of the step that needs them."""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from megatron_7b.data.samples.dataset import Batch
from megatron_7b.errors import ConfigError


def microbatch_indices(
    consumed_samples: int,
    global_batch_size: int,
    *,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> NDArray[np.int64]:
    """Global sample numbers of one rank's microbatches of one step, [num_microbatches, micro_batch_size].

    Microbatch m of rank r holds `consumed_samples + (m * data_parallel_size + r) * micro_batch_size + i`, so all ranks
    together read `[consumed_samples, consumed_samples + global_batch_size)`, at every layout.

    Raises:
        ConfigError: The global batch is not a whole number of microbatches on every rank.
    """
    samples_per_microbatch = micro_batch_size * data_parallel_size
    if global_batch_size <= 0 or global_batch_size % samples_per_microbatch:
        raise ConfigError(
            f"a global batch of {global_batch_size} samples is not a multiple of micro_batch_size * data-parallel size "
            f"= {micro_batch_size} * {data_parallel_size}",
            hint=f"the nearest ones are {samples_per_microbatch * max(1, global_batch_size // samples_per_microbatch)} "
            f"and {samples_per_microbatch * (global_batch_size // samples_per_microbatch + 1)}",
        )
    step = np.arange(consumed_samples, consumed_samples + global_batch_size, dtype=np.int64)
    return step.reshape(-1, data_parallel_size, micro_batch_size)[:, data_parallel_rank]


class ReadsBatches(Protocol):
    """What a loader reads: samples by their global number."""

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """Return the samples of these numbers, from any thread."""


class BatchLoader:
    """Reads steps by global sample number, and already assembles the step that follows.

    There is no state to save: `batches(consumed_samples, …)` is a function of its arguments, at any data-parallel size.
    """

    def __init__(
        self,
        dataset: ReadsBatches,
        *,
        micro_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        num_workers: int = 1,
    ) -> None:
        """Prepare to read; nothing is read yet.

        Args:
            dataset: What to read.
            micro_batch_size: Samples per microbatch.
            data_parallel_rank: Index of this rank among those that read different samples.
            data_parallel_size: Their number.
            num_workers: Threads; 0 assembles within `batches`, and nothing ahead.
        """
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        # The threads only call native code that runs without the GIL.
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="batch-loader") if num_workers > 0 else None
        self._ahead: tuple[int, int, list[Future[Batch]]] | None = None

    def batches(self, consumed_samples: int, global_batch_size: int) -> list[Batch]:
        """This rank's microbatches of the step that begins at a global sample number, in order.

        Args:
            consumed_samples: Samples that all ranks together have read before this step.
            global_batch_size: Samples of this step over all ranks.

        Raises:
            ConfigError: The global batch is not a whole number of microbatches on every rank.
            DataFormatError: A token id is outside the vocabulary.

        Collective: none.
        """
        if self._pool is None:
            return [self.dataset.batch(indices) for indices in self._indices(consumed_samples, global_batch_size)]
        if self._ahead is not None and self._ahead[:2] == (consumed_samples, global_batch_size):
            current = self._ahead[2]
        else:
            self._cancel_ahead()
            current = self._submit(self._pool, consumed_samples, global_batch_size)
        following = consumed_samples + global_batch_size
        self._ahead = (following, global_batch_size, self._submit(self._pool, following, global_batch_size))
        return [future.result() for future in current]

    def _indices(self, consumed_samples: int, global_batch_size: int) -> NDArray[np.int64]:
        return microbatch_indices(
            consumed_samples,
            global_batch_size,
            micro_batch_size=self.micro_batch_size,
            data_parallel_rank=self.data_parallel_rank,
            data_parallel_size=self.data_parallel_size,
        )

    def _submit(self, pool: ThreadPoolExecutor, consumed_samples: int, global_batch_size: int) -> list[Future[Batch]]:
        indices = self._indices(consumed_samples, global_batch_size)
        return [pool.submit(self.dataset.batch, of_microbatch) for of_microbatch in indices]

    def _cancel_ahead(self) -> None:
        if self._ahead is not None:
            for future in self._ahead[2]:
                future.cancel()
            self._ahead = None

    def close(self) -> None:
        """End the threads, dropping what was assembled ahead; `batches` must not be called again."""
        self._cancel_ahead()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
