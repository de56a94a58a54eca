"""Refuses a model that cannot fit into the memory of this machine or of its GPU, before anything is allocated.

Only what is surely held counts, so what is refused could not have run; a run that passes may still be too large by its
activations. Without the refusal the kernel ends a process, after minutes and without a word. Imports torch only to
ask a GPU.
"""

import dataclasses
import logging
import os
from collections.abc import Iterable

from megatron_7b.config.schema import ModelConfig, RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.model.adapter import Adapter
from megatron_7b.model.memory import MemoryNeed, bytes_per_parameter, gigabytes, inference_need, training_need
from megatron_7b.model.sizes import count_parameters
from megatron_7b.parallel import build_layout
from megatron_7b.runtime.machine.device_facts import may_have_gpu, multiplies_bf16
from megatron_7b.runtime.machine.host_memory import available_memory

logger = logging.getLogger(__name__)

_OVERRIDE = "--runtime.check-memory False starts it anyway"
_PROCESS_BYTES = 500_000_000
"""What a rank's process takes before it builds anything, most of it libraries."""


def check_before_launch(
    config: RunConfig,
    *,
    ranks: Iterable[int],
    world_size: int,
    is_training: bool,
    adapter: Adapter | None = None,
    teacher: RunConfig | None = None,
) -> None:
    """Refuse a model whose ranks on this machine cannot fit into its memory, if they compute on its CPU.

    Args:
        config: The run; if its vocabulary size is not known yet, the vocabulary's matrices do not count.
        ranks: Those of this machine.
        world_size: Ranks of the whole run.
        is_training: Otherwise the model is only computed with.
        adapter: Added to the model.
        teacher: The configuration of the model that it learns from, held beside it.

    Raises:
        ConfigError: It cannot fit.
    """
    on_gpu = config.runtime.device == "cuda" or (config.runtime.device == "auto" and may_have_gpu())
    if config.runtime.check_memory and not on_gpu:
        needed, count = _need(
            config, ranks, world_size, is_training=is_training, has_native_bf16=multiplies_bf16(), adapter=adapter,
            teacher=teacher,
        )  # fmt: skip
        _check_host(config, needed, count, is_training=is_training)


def check_conversion(model: ModelConfig, vocab_size: int, *formats: str) -> None:
    """Refuse to convert a model of which this machine's memory cannot hold a copy in each format, one after the other.

    Args:
        model: Its shape.
        vocab_size: True vocabulary size.
        formats: "bf16", else four bytes per parameter.

    Raises:
        ConfigError: It cannot fit.
    """
    width = 2 if set(formats) == {"bf16"} else 4
    needed = MemoryNeed(parameters=count_parameters(model, vocab_size=vocab_size) * width)
    available = available_memory()
    if needed.total > available:
        raise ConfigError(
            f"the model cannot fit into memory: {needed} would be held, but {gigabytes(available)} are available",
            hint="convert it on a machine with more memory"
            + ("" if width == 2 else ", or store and compare it in BF16: --dtype bf16 --parity-dtype bf16"),
        )


def check_rank(
    config: RunConfig,
    *,
    on_gpu: bool,
    rank: int,
    world_size: int,
    is_training: bool,
    adapter: Adapter | None = None,
    teacher: RunConfig | None = None,
) -> None:
    """Refuse, on a rank that knows its device and vocabulary, a model that cannot fit; warn if it hardly does.

    To be called before any rank can have allocated much: what is free is shared by all ranks of this machine.

    Args:
        config: The run.
        on_gpu: Whether this rank computes on its current CUDA device.
        rank: This one.
        world_size: Ranks of the whole run.
        is_training: Otherwise the model is only computed with.
        adapter: Added to the model.
        teacher: The configuration of the model that it learns from, held beside it.

    Raises:
        ConfigError: It cannot fit.

    Collective: none.
    """
    if not config.runtime.check_memory:
        return
    if not on_gpu:
        ranks = ranks_of_launcher(rank)
        needed, count = _need(
            config, ranks, world_size, is_training=is_training, has_native_bf16=multiplies_bf16(), adapter=adapter,
            teacher=teacher,
        )  # fmt: skip
        left = _check_host(config, needed, count, is_training=is_training) - needed.total
        if left < count * _PROCESS_BYTES and rank == ranks[0]:
            logger.warning("memory is tight: beside %s, %s are left for everything else", needed, gigabytes(left))
        return
    import torch

    needed, _ = _need(
        config, [rank], world_size, is_training=is_training, has_native_bf16=True, adapter=adapter, teacher=teacher
    )
    needed = dataclasses.replace(needed, copies=0, host_moments=0)
    available = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if needed.total > available:
        hint = f"divide it over more GPUs (tensor or pipeline parallelism){_smaller(config, is_training, world_size)}"
        raise _refusal(f"rank {rank}", needed, f"the GPU has {gigabytes(available)}", hint)
    if is_training and (config.checkpoint.asynchronous or config.optimizer.cpu_offload):
        _check_beside_gpus(config, ranks_of_launcher(rank), world_size, adapter)


def ranks_of_launcher(rank: int) -> range:
    """Return the ranks of this rank's machine, as far as the launcher's environment tells: else itself only."""
    local_rank, size = os.environ.get("LOCAL_RANK"), os.environ.get("LOCAL_WORLD_SIZE")
    if local_rank is None or size is None:
        return range(rank, rank + 1)
    return range(rank - int(local_rank), rank - int(local_rank) + int(size))


def _need(
    config: RunConfig,
    ranks: Iterable[int],
    world_size: int,
    *,
    is_training: bool,
    has_native_bf16: bool,
    adapter: Adapter | None,
    teacher: RunConfig | None = None,
) -> tuple[MemoryNeed, int]:
    """Return what these ranks hold together, and how many they are."""
    width = bytes_per_parameter(config.precision, has_native_bf16=has_native_bf16)
    need, of_parts, total, count = training_need if is_training else inference_need, {}, MemoryNeed(), 0
    for rank in ranks:
        layout = build_layout(config.parallel, world_size=world_size, rank=rank)
        place = layout.pp_rank, layout.tp_rank
        if place not in of_parts:
            of_parts[place] = need(config, layout, bytes_per_parameter=width, adapter=adapter)
            if teacher is not None:
                own_width = bytes_per_parameter(teacher.precision, has_native_bf16=has_native_bf16)
                own_layout = build_layout(teacher.parallel, world_size=world_size, rank=rank)
                held = inference_need(teacher, own_layout, bytes_per_parameter=own_width).parameters
                of_parts[place] += MemoryNeed(teacher=held)
        total, count = total + of_parts[place], count + 1
    return total, count


def _check_host(config: RunConfig, needed: MemoryNeed, count: int, *, is_training: bool) -> int:
    """Return the available bytes.

    Raises:
        ConfigError: They are not enough.
    """
    available = available_memory()
    if needed.total > available:
        who = "the one rank" if count == 1 else f"the {count} ranks"
        hint = f"take a smaller model, or divide it over more machines{_smaller(config, is_training, count)}"
        raise _refusal(f"{who} of this machine", needed, f"{gigabytes(available)} are available", hint)
    return available


def _check_beside_gpus(config: RunConfig, ranks: range, world_size: int, adapter: Adapter | None) -> None:
    """Refuse what ranks with GPUs keep in their machine's memory, if that cannot hold it.

    Raises:
        ConfigError: They are too large.
    """
    needed, count = _need(config, ranks, world_size, is_training=True, has_native_bf16=True, adapter=adapter)
    available = available_memory()
    ranks_here, there = f"the {count} ranks of this machine", f"but {gigabytes(available)} are available"
    if needed.host_moments > available:
        raise ConfigError(
            f"optimizer.cpu_offload is True: {ranks_here} would keep {gigabytes(needed.host_moments)} of moments in "
            f"its memory, {there}",
            hint=f"divide the model over more machines, or set --optimizer.cpu-offload False; {_OVERRIDE}",
        )
    if needed.copies + needed.host_moments > available:
        raise ConfigError(
            f"checkpoint.asynchronous is True: {ranks_here} would copy {gigabytes(needed.copies)} into its memory to "
            f"save them while training continues, {there}",
            hint=f"set --checkpoint.asynchronous False; {_OVERRIDE}",
        )


def _smaller(config: RunConfig, is_training: bool, world_size: int) -> str:
    """Return settings that lower the need, as part of a hint."""
    if not is_training:
        return "" if config.precision.params_dtype == "bf16" else ", or compute with --precision.params-dtype bf16"
    parallel = config.parallel
    model_size = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    smaller = ""
    if world_size > model_size and not parallel.use_distributed_optimizer:
        smaller = ", or set --parallel.use-distributed-optimizer True"
    if config.checkpoint.initialize_from is not None and not config.adapter.is_used:
        smaller += ", or train an adapter beside the weights: --adapter.method lora"
    return smaller


def _refusal(who: str, needed: MemoryNeed, there: str, hint: str) -> ConfigError:
    return ConfigError(
        f"the model cannot fit into memory: {who} would hold at least {needed}, but {there}",
        hint=f"{hint}; {_OVERRIDE}",
    )
