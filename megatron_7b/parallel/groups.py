"""Process groups: the only reader of megatron-core's global parallel state."""

import contextlib
import dataclasses
import datetime as dt
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.cuda_graphs import CudaGraphManager, delete_cuda_graphs

from megatron_7b import upstream
from megatron_7b.config.schema import ParallelConfig, RuntimeConfig
from megatron_7b.parallel.layout import ParallelLayout, build_layout
from megatron_7b.runtime.process.distributed import leave_process_group

_OF_KEYS_AND_VALUES = frozenset({"CONTEXT_PARALLEL_GROUP"})
_OF_EXPERTS = frozenset({"EXPERT_MODEL_PARALLEL_GROUP", "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP"})
"""Groups whose exchanges happen while gradients are reduced over the same ranks: in one group, each would wait."""

_OF_A_STEP = ("world", "tp", "cp", "ep", "tp_ep", "pp", "embd", "mp", "dp_cp", "expt_dp")
"""Groups that a training step communicates in, by megatron-core's names, in the order in which all ranks connect."""


def initialize_model_parallel(
    parallel: ParallelConfig,
    *,
    seed: int,
    timeout_minutes: float = RuntimeConfig.distributed_timeout_minutes,
    graph_safe_random: bool = False,
) -> ParallelLayout:
    """Build the process groups of the layout and seed the random states that differ along them.

    There is one group for each set of ranks, even if it serves several purposes; for all ranks it is the default one.

    Args:
        parallel: The layout.
        seed: Of the run.
        timeout_minutes: How long a collective of these groups may wait for a late rank.
        graph_safe_random: Keep the random states in such a form that CUDA graphs can draw from them.

    Collective: every rank of the default group.

    Raises:
        ConfigError: The world size does not fit the layout.
    """
    layout = _create_groups(parallel, timeout_minutes)
    # Source: Megatron-LM's `_set_random_seed`: layers of different stages drop different activations.
    tensor_parallel.model_parallel_cuda_manual_seed(
        seed + 100 * layout.pp_rank,
        # Transformer Engine's own, where it is; the other is megatron-core's, for the rest.
        te_rng_tracker=graph_safe_random,
        use_cudagraphable_rng=graph_safe_random,
        force_reset_rng=True,  # an earlier model of this process may have had states of the other form
    )
    return layout


@dataclasses.dataclass(frozen=True)
class SecondLayout:
    """Another layout of the same ranks, for a model beside the one that the run trains.

    Attributes:
        layout: Position of this rank.
    """

    layout: ParallelLayout
    _known: dict[str, Any]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Have megatron-core and this module know these groups, and no others, within a with block."""
        first = upstream.known_layout(parallel_state)
        upstream.know_layout(parallel_state, self._known)
        try:
            yield
        finally:
            upstream.know_layout(parallel_state, first)


def second_layout(
    parallel: ParallelConfig, *, timeout_minutes: float = RuntimeConfig.distributed_timeout_minutes
) -> SecondLayout:
    """Build the groups of another layout beside those of `initialize_model_parallel`, which stay in place.

    Random states are those of the first. `destroy_model_parallel` destroys both.

    Args:
        parallel: The other layout.
        timeout_minutes: How long a collective of its groups may wait for a late rank.

    Collective: every rank of the default group.

    Raises:
        ConfigError: The world size does not fit the layout.
    """
    first, created = upstream.known_layout(parallel_state), upstream.created_groups(parallel_state)
    parallel_state.destroy_model_parallel()  # which only forgets them
    try:
        layout = _create_groups(parallel, timeout_minutes)
        return SecondLayout(layout, upstream.known_layout(parallel_state))
    finally:
        upstream.add_created_groups(parallel_state, created)
        upstream.know_layout(parallel_state, first)


def _create_groups(parallel: ParallelConfig, timeout_minutes: float) -> ParallelLayout:
    layout = build_layout(parallel, world_size=dist.get_world_size(), rank=dist.get_rank())
    overlapping: frozenset[str] = _OF_KEYS_AND_VALUES if layout.dp_size == 1 else frozenset()
    if parallel.expert_model_parallel_size > 1:
        overlapping |= _OF_EXPERTS
    with upstream.one_group_for_equal_ranks(parallel_state, overlapping):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            distributed_timeout_minutes=timeout_minutes,
            create_gloo_process_groups=False,  # for checkpoints in a form that is not written here
        )
    return layout


def connect_groups(device: torch.device, *, one_by_one: bool = False, shares_embedding: bool = False) -> list[str]:
    """Communicate once in each group that a training step will use.

    NCCL connects a group at its first use, which takes device memory. Without this, that would be in the middle of the
    first step, where there may be none left, or at a rank's first checkpoint.

    Args:
        device: Of this rank.
        one_by_one: Pipeline neighbours send to each other alone, in connections of their own, as the interleaved
            schedule does; otherwise in that of the group.
        shares_embedding: The first and the last stage add up the gradients of an embedding that both have.

    Returns:
        What was connected: the names of megatron-core's groups with more than one rank.

    Collective: all ranks.
    """
    groups = process_groups()
    connected: dict[str, dist.ProcessGroup] = {}
    for name in _OF_A_STEP:
        group = dist.group.WORLD if name == "world" else getattr(groups, name)
        if name == "embd" and not shares_embedding:
            continue
        if group is not None and group.size() > 1 and group not in connected.values():
            dist.all_reduce(torch.zeros(1, device=device), group=group)
            connected[name] = group
    if one_by_one and groups.pp.size() > 1:
        _greet_neighbours(groups.pp, device)
    return list(connected)


def _greet_neighbours(group: dist.ProcessGroup, device: torch.device) -> None:
    """Exchange a number with the next and the previous rank of a ring; every second rank begins with the next."""
    rank, size = group.rank(), group.size()
    neighbours = [(rank + 1) % size, (rank - 1) % size]
    for neighbour in neighbours if rank % 2 == 0 else reversed(neighbours):
        own, other = torch.zeros(1, device=device), torch.zeros(1, device=device)
        if rank < neighbour:
            dist.send(own, group=group, group_dst=neighbour)
            dist.recv(other, group=group, group_src=neighbour)
        else:
            dist.recv(other, group=group, group_src=neighbour)
            dist.send(own, group=group, group_dst=neighbour)


def destroy_model_parallel() -> None:
    """Destroy and forget the groups of `initialize_model_parallel`, and CUDA graphs; the default group stays.

    megatron-core's own function forgets them without destroying them (except for some of gloo's), so each would keep
    its connections, and with NCCL device memory, until the process ends.

    Collective: all ranks of these groups.
    """
    if CudaGraphManager.global_mempool is not None:  # another model of this process could not be captured
        delete_cuda_graphs()
    created = upstream.created_groups(parallel_state)
    if dist.is_initialized():  # otherwise they were destroyed with the default group
        for group in reversed(created):  # the same order on all ranks: with NCCL, a group's ranks leave it together
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def leaving_process_groups() -> Iterator[None]:
    """Destroy all groups when a with block ends, and the default one if it did not exist before.

    After a failure this happens only in a world of one rank. With several, the others may never get here, and would
    take the lost connection for what failed first; the process of a rank that failed ends anyway.

    Collective: all ranks, at the end of the block.
    """
    joined_before = dist.is_initialized()

    def leave() -> None:
        destroy_model_parallel()
        if not joined_before:
            leave_process_group()

    try:
        yield
    except BaseException:
        if dist.is_initialized() and dist.get_world_size() == 1:
            leave()
        raise
    leave()


def new_background_group(timeout_minutes: float = RuntimeConfig.distributed_timeout_minutes) -> dist.ProcessGroup:
    """Return a group of all ranks for a thread that communicates while the main one does, over the CPU.

    Args:
        timeout_minutes: How long a collective of the group may wait for a late rank.

    Collective: all ranks.
    """
    group = dist.new_group(backend="gloo", timeout=dt.timedelta(minutes=timeout_minutes))
    assert isinstance(group, dist.ProcessGroup)
    return group


def process_groups() -> ProcessGroupCollection:
    """Return megatron-core's collection of this rank's groups."""
    return ProcessGroupCollection.use_mpu_process_groups()


def data_parallel_group() -> dist.ProcessGroup:
    """Return the replicas of this rank's part of the model, context-parallel ranks included."""
    group: dist.ProcessGroup = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return group


def expert_replicas_group() -> dist.ProcessGroup:
    """Return the replicas of this rank's experts; without expert parallelism those of everything else."""
    group: dist.ProcessGroup = parallel_state.get_expert_data_parallel_group()
    return group


def broadcast_from_last_stage(value: torch.Tensor) -> torch.Tensor:
    """Give every pipeline stage what only the last one computed; returns `value`, overwritten in place.

    Collective: the pipeline group.
    """
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            value,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return value


def sum_over_stages(value: torch.Tensor) -> torch.Tensor:
    """Sum over pipeline stages; returns `value`, overwritten in place.

    For what only one stage has computed, and the others hold zeros of: unlike after a broadcast, all stages have waited
    for all others.

    Collective: the pipeline group.
    """
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.all_reduce(value, group=parallel_state.get_pipeline_model_parallel_group())
    return value


def sum_over_replicas(value: torch.Tensor) -> torch.Tensor:
    """Sum over data- and context-parallel ranks; returns `value`, overwritten in place.

    Collective: the data-parallel group.
    """
    dist.all_reduce(value, group=data_parallel_group())
    return value
