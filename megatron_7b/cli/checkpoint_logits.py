"""Logits of a checkpoint, computed by this process alone with the model that training uses."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron_7b.checkpoint import read_config, read_manifest
from megatron_7b.checkpoint.load import load_weights
from megatron_7b.config import DataConfig, ModelConfig, PrecisionConfig, RunConfig, RuntimeConfig
from megatron_7b.conversion.parity import round_parameters
from megatron_7b.model.builder import build_model
from megatron_7b.parallel import ParallelLayout
from megatron_7b.parallel.groups import destroy_model_parallel, initialize_model_parallel, process_groups
from megatron_7b.runtime import cpu_backend
from megatron_7b.runtime.device import DeviceType
from megatron_7b.runtime.distributed import initialize_process, leave_process_group


def checkpoint_logits(
    folder: Path, tokens: Tensor, *, stored_dtype: torch.dtype, arithmetic: torch.dtype = torch.float32
) -> Tensor:
    """Load a checkpoint of any layout into a model on one rank, and compute the logits of whole sequences.

    Args:
        folder: A complete checkpoint; it is read as training reads it, not as an export does.
        tokens: int64 `[b, s]`.
        stored_dtype: Number format that weights are rounded to beforehand.
        arithmetic: Number format to compute in.

    Returns:
        FP32 `[b, s, v]` on the CPU, vocabulary padding included.

    Raises:
        CheckpointError: The checkpoint is damaged, or does not fit its own configuration.
    """
    manifest = read_manifest(folder)
    config = _single_rank_config(read_config(folder).model, tokens.shape[1], arithmetic)
    with process_of_one_rank() as device_type, _groups_of_one_rank(config) as layout:
        (model,) = build_model(
            config, vocab_size=manifest.vocab_size, layout=layout, groups=process_groups(), device_type=device_type
        )
        load_weights(folder, [model], verify=False)
        round_parameters(model, stored_dtype)
        model.eval()
        positions = torch.arange(tokens.shape[1], device=device_type)[None]
        with torch.inference_mode():
            # One sample at a time: [s, v] in FP32 is what a large vocabulary makes expensive.
            logits = [model(sample[None].to(device_type), positions, None)[0].float().cpu() for sample in tokens]
    return torch.stack(logits)


def _single_rank_config(model: ModelConfig, seq_length: int, arithmetic: torch.dtype) -> RunConfig:
    """The same model without parallelism, on the torch-native layers, which compute in any number format."""
    return RunConfig(
        model=dataclasses.replace(model, transformer_impl="local"),
        precision=PrecisionConfig(params_dtype="fp32" if arithmetic == torch.float32 else "bf16"),
        data=DataConfig(seq_length=seq_length),
    )


@contextmanager
def process_of_one_rank() -> Iterator[DeviceType]:
    """Make this process a world of its own, with no trace of it afterwards."""
    was_installed = cpu_backend.is_installed()
    try:
        yield initialize_process(RuntimeConfig())
    finally:
        leave_process_group()
        if not was_installed:
            cpu_backend.uninstall()


@contextmanager
def _groups_of_one_rank(config: RunConfig) -> Iterator[ParallelLayout]:
    try:
        yield initialize_model_parallel(config.parallel, seed=config.training.seed)
    finally:
        destroy_model_parallel()
