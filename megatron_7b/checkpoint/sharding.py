"""Parameters and random states in a checkpoint: megatron-core's sharded tensors under layout-free names."""

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel

from megatron_7b.checkpoint.pieces import Block
from megatron_7b.errors import CheckpointError
from megatron_7b.model.parameters import expert_of
from megatron_7b.parallel.groups import data_parallel_group, expert_replicas_group

type Sharded = ShardedTensor | ShardedTensorFactory


@dataclass(frozen=True)
class Replica:
    """This rank's place among those that hold the same part of a parameter.

    Attributes:
        number: From 0.
        total: How many they are.
    """

    number: int
    total: int


def replica_of(name: str) -> Replica:
    """Return this rank's place among those that hold the same part of a parameter; experts are held by fewer."""
    group = data_parallel_group() if expert_of(name) is None else expert_replicas_group()
    return Replica(group.rank(), group.size())


def model_state(chunks: Sequence[torch.nn.Module], names: Set[str] | None = None) -> dict[str, Any]:
    """Return the sharded parameters of this rank's chunks, by `chunk{i}.` + local name, under the names of their table.

    Args:
        chunks: This rank's model chunks.
        names: The parameters that are wanted; None: all of them.

    Objects that layers keep beside their parameters (Transformer Engine's `_extra_state`) are left out: with the FP8
    recipes that the configuration offers, scales follow from the tensors at hand and have no history.
    """
    state = {}
    for index, chunk in enumerate(chunks):
        module: Any = chunk.module if isinstance(chunk, DistributedDataParallel) else chunk
        for name, value in module.sharded_state_dict().items():
            if isinstance(value, ShardedTensor | ShardedTensorFactory):
                own_name = module.table.by_core_name(value.key).name
                if names is None or own_name in names:
                    state[f"chunk{index}.{name}"] = replace(value, key=own_name)
    return state


def parts(entry: Sharded) -> list[ShardedTensor]:
    """Return what a parameter consists of, in the order of its memory: itself, or parts that are apart in the whole."""
    if isinstance(entry, ShardedTensor):
        return [entry]
    # Such as gate and up rows. The description alone is wanted, without a copy of the values.
    return list(nested_values(replace(entry, data=torch.empty(entry.data.shape, device="meta")).build()))


def blocks(entry: Sharded) -> list[Block]:
    """Return what of the whole tensor this rank's parameter holds, in the order of its memory."""
    found = [Block(part.global_shape, part.global_offset, part.local_shape) for part in parts(entry)]
    assert sum(math.prod(block.shape) for block in found) == entry.data.numel()
    return found


def random_state(rank: int, world_size: int) -> ShardedObject:
    """Return this rank's random states, which matter where dropout is used: in one form, whatever CUDA graphs need."""
    from megatron.core.tensor_parallel.random import convert_cuda_rng_state, get_cuda_rng_tracker

    tracked = get_cuda_rng_tracker().get_states()
    states = {
        "cpu": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": {name: convert_cuda_rng_state(state) for name, state in tracked.items()},
    }
    return ShardedObject("random_state", states, (world_size,), (rank,))


def random_state_name(rank: int, world_size: int) -> str:
    """Return the name of a rank's random states in a checkpoint."""
    name: str = ShardedObject("random_state", None, (world_size,), (rank,)).unique_key
    return name


def restore_random_state(stored: Any) -> None:
    """Put loaded random states in place.

    Args:
        stored: As megatron-core stores an object: a list that holds what `random_state` described.

    Raises:
        CheckpointError: They are none.
    """
    from megatron.core.tensor_parallel.random import (
        convert_cuda_rng_state,
        get_cuda_rng_tracker,
        is_graph_safe_cuda_rng_tracker,
    )

    try:
        (states,) = stored
        torch.set_rng_state(states["cpu"])
        torch.cuda.set_rng_state(states["device"])
        tracker = get_cuda_rng_tracker()
        is_safe = is_graph_safe_cuda_rng_tracker(tracker)
        tracker.set_states(
            {name: convert_cuda_rng_state(state, to_graphable=is_safe) for name, state in states["tracker"].items()}
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"random states cannot be restored: {error}") from error
