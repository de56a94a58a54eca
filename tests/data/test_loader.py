"""Batches by global sample number: resume anywhere, at any data-parallel size, with any number of threads."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_7b.config.schema import DataConfig
from megatron_7b.data import BatchLoader, Dataset, microbatch_indices, open_split
from megatron_7b.errors import ConfigError, DataFormatError
from tests.data.corpora import random_documents, write_corpus


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A blend of two corpora."""
    folder = tmp_path_factory.mktemp("corpora")
    prefixes = [write_corpus(folder / name, random_documents(n, 100)) for n, name in enumerate("ab")]
    return open_split(DataConfig(train=("0.6", prefixes[0], "0.4", prefixes[1]), seq_length=16), "train", seed=1)


@pytest.fixture(params=[0, 1, 3])
def num_workers(request: pytest.FixtureRequest) -> Iterator[int]:
    """Threads of the loader; none of them may be left over."""
    before = threading.active_count()
    yield request.param
    assert threading.active_count() == before


@given(
    consumed=st.integers(0, 2**40),
    micro_batch_size=st.integers(1, 4),
    data_parallel_size=st.integers(1, 4),
    num_microbatches=st.integers(1, 4),
)
def test_ranks_together_read_the_step(
    consumed: int, micro_batch_size: int, data_parallel_size: int, num_microbatches: int
) -> None:
    size = micro_batch_size * data_parallel_size * num_microbatches
    per_rank = [
        microbatch_indices(
            consumed,
            size,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=rank,
            data_parallel_size=data_parallel_size,
        )
        for rank in range(data_parallel_size)
    ]
    for rank, indices in enumerate(per_rank):
        m, i = np.indices(indices.shape)
        expected = consumed + m * (micro_batch_size * data_parallel_size) + rank * micro_batch_size + i
        np.testing.assert_array_equal(indices, expected)
    together = np.stack(per_rank, axis=1).ravel()
    assert together.tolist() == list(range(consumed, consumed + size))


def read(dataset: Dataset, steps: range, *, dp: int = 1, num_workers: int = 0, size: int = 12) -> list[np.ndarray]:
    """Tokens of whole steps, [size, s] each, put together from all ranks."""
    loaders = [
        BatchLoader(
            dataset, micro_batch_size=2, data_parallel_rank=rank, data_parallel_size=dp, num_workers=num_workers
        )
        for rank in range(dp)
    ]
    result = []
    for step in steps:
        ranks = [[batch.tokens for batch in loader.batches(step * size, size)] for loader in loaders]
        result.append(np.concatenate([microbatch for together in zip(*ranks, strict=True) for microbatch in together]))
    for loader in loaders:
        loader.close()
    return result


def test_resume_and_resharding_read_exactly_the_rest(dataset: Dataset, num_workers: int) -> None:
    whole = read(dataset, range(6))
    for dp in (1, 2, 3, 6):
        resumed = read(dataset, range(2, 6), dp=dp, num_workers=num_workers)
        np.testing.assert_array_equal(resumed, whole[2:])


@settings(max_examples=40)
@given(
    lives=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 4)), min_size=1, max_size=5
    ),
    begin=st.integers(0, 2**35),
)
def test_any_row_of_lives_reads_the_stream(
    dataset: Dataset, lives: list[tuple[int, int, int, int]], begin: int
) -> None:
    """Each life has its own data-parallel size, microbatch, number of microbatches and number of steps."""
    consumed, read_tokens = begin, []
    for data_parallel_size, micro_batch_size, num_microbatches, num_steps in lives:
        size = data_parallel_size * micro_batch_size * num_microbatches
        loaders = [
            BatchLoader(
                dataset,
                micro_batch_size=micro_batch_size,
                data_parallel_rank=rank,
                data_parallel_size=data_parallel_size,
                num_workers=0,
            )
            for rank in range(data_parallel_size)
        ]
        for _ in range(num_steps):
            ranks = [[batch.tokens for batch in loader.batches(consumed, size)] for loader in loaders]
            read_tokens += [rows for together in zip(*ranks, strict=True) for rows in together]
            consumed += size
    if read_tokens:
        expected = dataset.batch(range(begin, consumed)).tokens
        np.testing.assert_array_equal(np.concatenate(read_tokens), expected)


def test_steps_may_be_asked_for_in_any_order(dataset: Dataset, num_workers: int) -> None:
    expected = {step: dataset.batch(range(step * 4, step * 4 + 4)).tokens for step in range(6)}
    with BatchLoader(dataset, micro_batch_size=4, num_workers=num_workers) as loader:
        for step in (0, 1, 2, 0, 5, 4, 5, 1):
            (batch,) = loader.batches(step * 4, 4)
            np.testing.assert_array_equal(batch.tokens, expected[step])


def test_a_growing_batch_size(dataset: Dataset, num_workers: int) -> None:
    with BatchLoader(dataset, micro_batch_size=2, num_workers=num_workers) as loader:
        consumed = 0
        for size in (2, 2, 4, 6, 6):
            tokens = np.concatenate([batch.tokens for batch in loader.batches(consumed, size)])
            np.testing.assert_array_equal(tokens, dataset.batch(range(consumed, consumed + size)).tokens)
            consumed += size


def test_the_next_step_is_ready_when_it_is_asked_for(dataset: Dataset) -> None:
    with BatchLoader(dataset, micro_batch_size=4, num_workers=1) as loader:
        loader.batches(0, 8)
        assert loader._ahead is not None
        consumed, size, futures = loader._ahead
        assert (consumed, size, len(futures)) == (8, 8, 2)
        ready = [future.result() for future in futures]
        assert [batch is again for batch, again in zip(ready, loader.batches(8, 8), strict=True)] == [True, True]


def test_a_batch_that_does_not_divide_is_refused(dataset: Dataset) -> None:
    with (
        BatchLoader(dataset, micro_batch_size=4, data_parallel_size=2) as loader,
        pytest.raises(ConfigError, match="12 samples is not a multiple"),
    ):
        loader.batches(0, 12)


def test_a_bad_id_surfaces_at_its_step(tmp_path: Path, num_workers: int) -> None:
    prefix = write_corpus(tmp_path / "a", [[7] * 40, [900], [7] * 40])
    config = DataConfig(train=(prefix,), split="1", seq_length=8)
    bad = open_split(config, "train", seed=1, vocab_size=100)
    with BatchLoader(bad, micro_batch_size=1, num_workers=num_workers) as loader:
        failures = []
        for step in range(10):
            try:
                loader.batches(step, 1)
            except DataFormatError as error:
                failures.append(str(error))
    assert 1 <= len(failures) <= 2  # It is an input once, and a label at a sample's end at most once more.
    assert all("document 1" in failure for failure in failures)


def test_threads_share_a_dataset(dataset: Dataset) -> None:
    expected = dataset.batch(range(64)).tokens
    differences: list[int] = []

    def read_often() -> None:
        differences.extend(int((dataset.batch(range(64)).tokens != expected).sum()) for _ in range(50))

    threads = [threading.Thread(target=read_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert differences == [0] * 200
