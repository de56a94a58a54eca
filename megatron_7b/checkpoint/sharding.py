"""What of a run goes into a checkpoint, as megatron-core's sharded tensors under canonical, layout-free names.

Tensors: the parameters; per parameter Adam's two moments, and the FP32 main parameter where the working one is
narrower. The optimizer's entries have the same form with and without the distributed optimizer, so either loads the
other's.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer

from megatron_7b.optim.optimizer import Optimizer

_PREFIX = "optimizer.state"
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
type Sharded = ShardedTensor | ShardedTensorFactory


def _parts(optimizer: Optimizer) -> list[MegatronOptimizer]:
    return list(getattr(optimizer.core, "chained_optimizers", [optimizer.core]))


def model_state(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Return the sharded parameters of this rank's chunks, by `chunk{i}.` + local name.

    Objects that layers keep beside their parameters (Transformer Engine's FP8 scales) are left out: with the recipes
    offered they are recomputed from the data.
    """
    state = {}
    for index, chunk in enumerate(chunks):
        module: Any = chunk.module if isinstance(chunk, DistributedDataParallel) else chunk
        for name, value in module.sharded_state_dict(metadata=dict(_METADATA)).items():
            if isinstance(value, ShardedTensor | ShardedTensorFactory):
                state[f"chunk{index}.{name}"] = value
    return state


def _by_parameter(model: dict[str, Any], parameters: Iterable[torch.nn.Parameter]) -> dict[int, Sharded]:
    """Map id(parameter) to its sharded entry; megatron-core hands out either the parameter itself or its data."""
    by_pointer = {entry.data.data_ptr(): entry for entry in nested_values(model)}
    return {id(p): by_pointer[p.data_ptr()] for p in parameters}


def _main_and_working(part: MegatronOptimizer) -> Iterator[tuple[torch.Tensor, torch.nn.Parameter]]:
    """Yield (tensor that Adam updates, parameter of the model) of an optimizer that is not distributed."""
    if isinstance(part, Float16OptimizerWithFloat16Params):
        for mains, workings in zip(part.fp32_from_float16_groups, part.float16_groups, strict=True):
            yield from zip(mains, workings, strict=True)
        for group in part.fp32_from_fp32_groups:
            yield from zip(group, group, strict=True)
    else:
        for group in part.optimizer.param_groups:
            yield from zip(group["params"], group["params"], strict=True)


def optimizer_state(optimizer: Optimizer, model: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """Return the sharded optimizer state.

    Args:
        optimizer: Its tensors are referred to, not copied.
        model: What `model_state` gave.
        is_loading: The entries are to be filled rather than written.

    Collective: the data-parallel group, with the distributed optimizer.
    """
    state: dict[str, Any] = {}
    for index, part in enumerate(_parts(optimizer)):
        if isinstance(part, DistributedOptimizer):
            state[f"part{index}"] = part.sharded_param_state_fully_reshardable(model, is_loading, dict(_METADATA))
            continue
        pairs = list(_main_and_working(part))
        entries = _by_parameter(model, (working for _, working in pairs))
        rows = []
        for main, working in pairs:
            entry, moments = entries[id(working)], part.optimizer.state[main]
            row = {
                name: make_sharded_optimizer_tensor(entry, moments[name], prefix=f"{_PREFIX}.{name}")
                for name in ("exp_avg", "exp_avg_sq")
            }
            if main is not working:
                row["param"] = make_sharded_optimizer_tensor(entry, main, prefix=f"{_PREFIX}.param")
            rows.append(row)
        state[f"part{index}"] = rows
    return state


def drop_main_copies(state: dict[str, Any], model: dict[str, Any]) -> None:
    """Leave FP32 main parameters out, in place, where the working parameters are FP32 already and say the same."""
    fp32 = {entry.key for entry in nested_values(model) if entry.data.dtype == torch.float32}
    for row in _rows(state):
        if "param" in row and row["param"].key.removeprefix(f"{_PREFIX}.param.") in fp32:
            del row["param"]


def redirect_main_copies(state: dict[str, Any], saved_keys: set[str]) -> None:
    """Read FP32 main parameters from the saved parameters, in place, where no main copies were saved."""
    for row in _rows(state):
        main = row.get("param")
        if main is not None and main.key not in saved_keys:
            row["param"] = replace(main, key=main.key.removeprefix(f"{_PREFIX}.param."))


def _rows(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for part in state.values():
        yield from part.values() if isinstance(part, dict) else part


@torch.no_grad()
def restore_optimizer(optimizer: Optimizer, loaded: dict[str, Any], *, num_updates: int) -> None:
    """Put loaded optimizer state in place.

    Args:
        optimizer: The optimizer.
        loaded: What `optimizer_state` described, with plain tensors.
        num_updates: Updates that Adam has done.
    """
    for index, part in enumerate(_parts(optimizer)):
        rows = loaded[f"part{index}"]
        if isinstance(part, DistributedOptimizer):
            # megatron-core 0.19 copies every entry of a parameter's state, and torch's `step` is not among the rows.
            for state in part.optimizer.state.values():
                state.pop("step", None)
            part.load_parameter_state_from_fully_reshardable(rows)
            if not part.config.use_precision_aware_optimizer:
                part._copy_main_params_to_model_params()
        else:
            for (main, working), row in zip(_main_and_working(part), rows, strict=True):
                moments = part.optimizer.state[main]
                for name in ("exp_avg", "exp_avg_sq"):
                    moments[name].copy_(row[name])
                if main is not working:
                    main.copy_(row["param"])
        _set_num_updates(part.optimizer, num_updates)


def _set_num_updates(adam: torch.optim.Optimizer, num_updates: int) -> None:
    """Set Adam's step: torch keeps it per parameter, Transformer Engine and apex per group."""
    if isinstance(adam, torch.optim.AdamW):
        for parameter, state in adam.state.items():
            state["step"] = torch.tensor(float(num_updates), device=parameter.device)
    else:
        for group in adam.param_groups:
            group["step"] = num_updates


def random_state(rank: int, world_size: int) -> ShardedObject:
    """Return this rank's random states, which matter where dropout is used."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    return ShardedObject("random_state", states, (world_size,), (rank,))


def restore_random_state(states: dict[str, Any]) -> None:
    """Put loaded random states in place."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.set_rng_state(states["cpu"])
    get_cuda_rng_tracker().set_states(states["tracker"])
