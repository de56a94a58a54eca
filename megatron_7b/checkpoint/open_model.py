"""A checkpoint as a model to compute with, for generation and evaluation."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_7b.checkpoint.load import load_weights
from megatron_7b.config import RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.model.builder import build_model
from megatron_7b.model.fitting import check_rank
from megatron_7b.model.kinds.chunk import ModelChunk
from megatron_7b.parallel import ParallelLayout
from megatron_7b.parallel.groups import initialize_model_parallel, leaving_process_groups, process_groups
from megatron_7b.runtime.machine.device import DeviceType, torch_device
from megatron_7b.runtime.process.distributed import initialize_process

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """This rank's part of a loaded model.

    Attributes:
        config: The configuration that the model was built with.
        layout: Position of this rank.
        device_type: Where it computes.
        chunks: One per virtual pipeline stage, in evaluation mode.
    """

    config: RunConfig
    layout: ParallelLayout
    device_type: DeviceType
    chunks: list[ModelChunk]

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return torch_device(self.device_type)

    @property
    def only_chunk(self) -> ModelChunk:
        """The one chunk of a model without virtual pipeline stages."""
        (chunk,) = self.chunks
        return chunk


@contextlib.contextmanager
def opened_model(folder: Path, config: RunConfig, *, fp32_on_cpu: bool = True) -> Iterator[OpenModel]:
    """Join the ranks, build the model and load its weights, for the duration of a with block.

    Args:
        folder: A complete checkpoint of any layout.
        config: From `inference_config`.
        fp32_on_cpu: Compute in FP32 on a CPU, whatever the configuration says, so that results depend neither on
            whether the machine has BF16 hardware nor on BF16 rounding, and agree with those of transformers.

    Collective: all ranks.

    Raises:
        CheckpointError: files are damaged, or do not fit the model.
        ConfigError: the number of ranks does not fit the layout, the device is not there, or the model cannot fit into
            memory.
    """
    started = time.perf_counter()
    with leaving_process_groups():
        device_type = initialize_process(config.runtime)
        if device_type == "cpu" and fp32_on_cpu:
            config = dataclasses.replace(
                config, precision=dataclasses.replace(config.precision, params_dtype="fp32", fp8="none")
            )
        model = _build(folder, config, device_type)
        if model.layout.is_main:
            logger.info("loaded %s at %s in %.1f s", folder, model.layout, time.perf_counter() - started)
        yield model


def _build(folder: Path, config: RunConfig, device_type: DeviceType) -> OpenModel:
    if config.model.vocab_size is None:
        raise ConfigError("model.vocab_size is not set", hint="take the configuration from inference_config")
    check_rank(
        config, on_gpu=device_type == "cuda", rank=dist.get_rank(), world_size=dist.get_world_size(), is_training=False
    )
    layout = initialize_model_parallel(
        config.parallel, seed=config.training.seed, timeout_minutes=config.runtime.distributed_timeout_minutes
    )
    chunks = build_model(
        config,
        vocab_size=config.model.vocab_size,
        layout=layout,
        groups=process_groups(),
        device_type=device_type,
        initialize=False,
    )
    load_weights(folder, chunks, verify=config.checkpoint.verify_on_load)
    for chunk in chunks:
        chunk.eval()
    return OpenModel(config=config, layout=layout, device_type=device_type, chunks=chunks)
