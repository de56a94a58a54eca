"""The sums and broadcasts of what is reported, on real ranks."""

from typing import Any

import torch
import torch.distributed as dist

from megatron_7b.config.schema import ParallelConfig
from megatron_7b.parallel.groups import (
    broadcast_from_last_stage,
    data_parallel_group,
    destroy_model_parallel,
    initialize_model_parallel,
    sum_over_replicas,
)
from tests.support.ranks import run_ranks


def report(parallel: dict[str, Any]) -> tuple[Any, ...]:
    """Entry point of a rank: its place, and what it gets of the others' numbers."""
    layout = initialize_model_parallel(ParallelConfig(**parallel), seed=3)
    own = torch.tensor([10.0**layout.rank])
    total = sum_over_replicas(own.clone()).item()
    last = broadcast_from_last_stage(own.clone()).item()
    replicas = sorted(dist.get_process_group_ranks(data_parallel_group()))
    destroy_model_parallel()
    return layout.pp_rank, replicas, total, last


def test_replicas_are_summed_and_the_last_stage_is_heard() -> None:
    assert run_ranks(4, report, {"pipeline_model_parallel_size": 2}) == [
        (0, [0, 1], 11.0, 100.0),
        (0, [0, 1], 11.0, 1000.0),
        (1, [2, 3], 1100.0, 100.0),
        (1, [2, 3], 1100.0, 1000.0),
    ]


def test_without_replicas_or_stages_numbers_are_ones_own() -> None:
    assert run_ranks(2, report, {"tensor_model_parallel_size": 2}) == [(0, [0], 1.0, 1.0), (0, [1], 10.0, 10.0)]


def dropout_streams(parallel: dict[str, Any]) -> tuple[float, float]:
    """Entry point of a rank: a random number of the ordinary stream and one of the tensor-parallel stream."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    initialize_model_parallel(ParallelConfig(**parallel), seed=3)
    with get_cuda_rng_tracker().fork():
        inner = torch.rand(()).item()
    return torch.rand(()).item(), inner


def test_stages_and_tensor_ranks_have_their_own_random_streams() -> None:
    (_, first), (_, second) = run_ranks(2, dropout_streams, {"tensor_model_parallel_size": 2})
    assert first != second
    (outer, _), (other, _) = run_ranks(2, dropout_streams, {"pipeline_model_parallel_size": 2})
    assert outer != other
    replicas = run_ranks(2, dropout_streams, {})
    assert replicas[0] == replicas[1]
