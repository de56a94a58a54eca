"""The sums and broadcasts of what is reported, on real ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_7b.config.schema import ParallelConfig
from megatron_7b.parallel.groups import (
    broadcast_from_last_stage,
    connect_groups,
    data_parallel_group,
    destroy_model_parallel,
    initialize_model_parallel,
    leaving_process_groups,
    process_groups,
    sum_over_replicas,
)
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import build, run_steps, tiny_config


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


def groups_of_ranks(parallel: dict[str, Any]) -> tuple[list[list[int]], int, int]:
    """Entry point of a rank: the ranks of the groups that it made, and how many are left after them."""
    before = len(dist.distributed_c10d._world.pg_map)
    with leaving_process_groups():
        initialize_model_parallel(ParallelConfig(**parallel), seed=3)
        made = list(dist.distributed_c10d._world.pg_map)[before:]
        ranks = sorted(dist.get_process_group_ranks(group) for group in made)
        dist.barrier()  # a rank must not leave while another still connects to it
    return ranks, before, len(dist.distributed_c10d._world.pg_map)


@pytest.mark.parametrize(
    ("world_size", "parallel", "expected"),
    [
        (1, {}, []),
        (2, {"tensor_model_parallel_size": 2}, [[0]]),
        (4, {}, [[0]]),
        (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, [[0], [0, 1], [0, 2]]),
        (4, {"context_parallel_size": 2}, [[0], [0, 1], [0, 2]]),
        # The exchange of tokens among experts, and of keys and values, has a group beside that of the gradients.
        (2, {"context_parallel_size": 2}, [[0], [0, 1]]),
        (2, {"expert_model_parallel_size": 2}, [[0], [0, 1]]),
    ],
)
def test_there_is_one_group_for_each_set_of_ranks_and_none_afterwards(
    world_size: int, parallel: dict[str, Any], expected: list[list[int]]
) -> None:
    made, before, after = run_ranks(world_size, groups_of_ranks, parallel)[0]
    assert made == expected
    assert before == after == 1


def used_unconnected(parallel: dict[str, Any], model: dict[str, Any]) -> tuple[list[str], list[list[int]]]:
    """Entry point of a rank: what was connected, and the ranks of groups that a step then used and that were not."""
    learner = build(tiny_config(parallel=parallel, model=model))
    connected = connect_groups(
        torch.device("cpu"),
        one_by_one="virtual_pipeline_model_parallel_size" in parallel,
        shares_embedding=learner.config.model.share_embeddings_and_output_weights,
    )
    groups = process_groups()
    ready = [dist.group.WORLD, *(getattr(groups, name) for name in connected if name != "world")]
    others = [group for group in dist.distributed_c10d._world.pg_map if group.size() > 1 and group not in ready]
    before = [group._get_sequence_number_for_group() for group in others]
    of_all = dist.group.WORLD._get_sequence_number_for_group()
    run_steps(learner, range(1))
    learner.optimizer.core.get_grad_norm()
    after = [group._get_sequence_number_for_group() for group in others]
    assert dist.group.WORLD._get_sequence_number_for_group() > of_all or dist.get_world_size() == 1
    return connected, [
        dist.get_process_group_ranks(group)
        for group, first, last in zip(others, before, after, strict=True)
        if last > first
    ]


@pytest.mark.parametrize(
    ("world_size", "parallel", "model", "expected"),
    [
        (2, {"tensor_model_parallel_size": 2}, {}, ["world"]),
        (2, {"context_parallel_size": 2}, {}, ["world", "cp"]),
        (4, {"pipeline_model_parallel_size": 4}, {"share_embeddings_and_output_weights": True}, ["world", "embd"]),
        (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, {}, ["world", "tp", "pp"]),
        (
            4,
            {
                "tensor_model_parallel_size": 2,
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "sequence_parallel": True,
            },
            {},
            ["world", "tp", "pp"],
        ),
        (4, {"tensor_model_parallel_size": 2, "use_distributed_optimizer": True}, {}, ["world", "tp", "dp_cp"]),
    ],
)
def test_a_step_uses_no_group_that_was_not_connected_before(
    world_size: int, parallel: dict[str, Any], model: dict[str, Any], expected: list[str]
) -> None:
    for rank, (connected, unconnected) in enumerate(run_ranks(world_size, used_unconnected, parallel, model)):
        assert connected == [name for name in expected if name != "embd" or rank in (0, 3)]
        assert unconnected == []


def graphs_are_left() -> bool:
    """Entry point of a rank: whether megatron-core still takes graphs for captured when their model is gone."""
    from megatron.core.transformer.cuda_graphs import CudaGraphManager

    initialize_model_parallel(ParallelConfig(), seed=3)
    CudaGraphManager.global_mempool = "what a capture on a GPU allocates from"
    destroy_model_parallel()
    return CudaGraphManager.global_mempool is not None


def test_graphs_end_with_the_groups() -> None:
    assert run_ranks(1, graphs_are_left) == [False]


def greet(parallel: dict[str, Any]) -> list[str]:
    """Entry point of a rank of a longer pipeline."""
    initialize_model_parallel(ParallelConfig(**parallel), seed=3)
    return connect_groups(torch.device("cpu"), one_by_one=True)


def test_neighbours_of_rings_of_any_length_meet() -> None:
    for size in (2, 3, 4):
        assert run_ranks(size, greet, {"pipeline_model_parallel_size": size}) == [["world"]] * size
