"""Process groups: the only reader of megatron-core's global parallel state."""

import contextlib
import datetime as dt
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_7b import upstream
from megatron_7b.config.schema import ParallelConfig, RuntimeConfig
from megatron_7b.parallel.layout import ParallelLayout, build_layout
from megatron_7b.runtime.process.distributed import leave_process_group


def initialize_model_parallel(
    parallel: ParallelConfig, *, seed: int, timeout_minutes: float = RuntimeConfig.distributed_timeout_minutes
) -> ParallelLayout:
    """Build all process groups of the layout and seed the random states that differ along them.

    Args:
        parallel: The layout.
        seed: Of the run.
        timeout_minutes: How long a collective of these groups may wait for a late rank.

    Collective: every rank of the default group.

    Raises:
        ConfigError: The world size does not fit the layout.
    """
    layout = build_layout(parallel, world_size=dist.get_world_size(), rank=dist.get_rank())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        distributed_timeout_minutes=timeout_minutes,
    )
    # Source: Megatron-LM's `_set_random_seed`: layers of different stages drop different activations.
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * layout.pp_rank)
    return layout


def destroy_model_parallel() -> None:
    """Destroy and forget the groups of `initialize_model_parallel`; the default group stays.

    megatron-core's own function forgets them without destroying them (except for some of gloo's), so each would keep
    its connections, and with NCCL device memory, until the process ends.

    Collective: all ranks of these groups.
    """
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
