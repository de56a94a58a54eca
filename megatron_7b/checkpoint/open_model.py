"""A checkpoint as a model to compute with, for generation and evaluation."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_7b.adapter import build_adapter
from megatron_7b.checkpoint.base import find_base
from megatron_7b.checkpoint.load import load_base, load_weights
from megatron_7b.config import RunConfig
from megatron_7b.model.adapter import Adapter
from megatron_7b.model.on_ranks import ModelOnRanks, build_beside, build_on_ranks
from megatron_7b.parallel.groups import leaving_process_groups
from megatron_7b.runtime.process.distributed import initialize_process

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def opened_model(
    folder: Path, config: RunConfig, *, fp32_on_cpu: bool = True, adapter: Adapter | None = None
) -> Iterator[ModelOnRanks]:
    """Join the ranks, build the model and load its weights, for the duration of a with block.

    Args:
        folder: A complete checkpoint of any layout. One of an adapter is read after the one that has the rest, or left
            out if the configuration has none.
        config: From `inference_config`.
        fp32_on_cpu: Compute in FP32 on a CPU, whatever the configuration says, so that results depend neither on
            whether the machine has BF16 hardware nor on BF16 rounding, and agree with those of transformers.
        adapter: What the checkpoint was trained with; None: what its configuration says.

    Yields:
        The model, in evaluation mode.

    Collective: all ranks.

    Raises:
        CheckpointError: Files are damaged, or do not fit the model.
        ConfigError: The number of ranks does not fit the layout, the device is not there, or the model cannot fit into
            memory.
    """
    started, base = time.perf_counter(), find_base(folder, config.checkpoint.initialize_from)
    adapter = adapter or build_adapter(config)
    if base is not None and adapter is None:  # `adapter.method none`: the model without its adapter
        folder, base = base, None
    with leaving_process_groups():
        device_type = initialize_process(config.runtime)
        if device_type == "cpu" and fp32_on_cpu:
            config = _in_fp32(config)
        model = build_on_ranks(config, device_type, is_training=False, initialize=False, adapter=adapter)
        _load(model, folder, base)
        if model.layout.is_main:
            logger.info("loaded %s at %s in %.1f s", folder, model.layout, time.perf_counter() - started)
        yield model


def open_beside(first: ModelOnRanks, folder: Path, config: RunConfig, *, fp32_on_cpu: bool = True) -> ModelOnRanks:
    """Build and load another model on the ranks of one that is open; parameters that are equal are held once.

    So an adapter's model takes the memory of the adapter. Both are for inference: neither may be trained.

    Args:
        first: The model that is open, and stays so for as long as the other one is used.
        folder: A complete checkpoint; one of an adapter is read after the one that has the rest.
        config: From `inference_config`, with the same layout.
        fp32_on_cpu: As for `opened_model`.

    Collective: all ranks.

    Raises:
        CheckpointError: Files are damaged, or do not fit the model.
    """
    if first.device_type == "cpu" and fp32_on_cpu:
        config = _in_fp32(config)
    model = build_beside(first, config, adapter=build_adapter(config))
    _load(model, folder, find_base(folder, config.checkpoint.initialize_from))
    for chunk, of_first in zip(model.chunks, first.chunks, strict=True):
        there = dict(of_first.named_parameters())
        for name, parameter in chunk.named_parameters():
            same = there.get(name)
            if same is None or same.shape != parameter.shape or same.dtype != parameter.dtype:
                continue
            if same.equal(parameter):
                parameter.data = same.data
    return model


def _in_fp32(config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, precision=dataclasses.replace(config.precision, params_dtype="fp32", fp8="none"))


def _load(model: ModelOnRanks, folder: Path, base: Path | None) -> None:
    """Load a checkpoint, after the one that has what it lacks; Collective: all ranks."""
    verify = model.config.checkpoint.verify_on_load
    if base is None:
        load_weights(folder, model.chunks, verify=verify)
    else:
        load_base(base, model, model.chunks, verify=verify)
        load_weights(folder, model.chunks, verify=verify, names=model.names_apart)
    for chunk in model.chunks:
        chunk.eval()
