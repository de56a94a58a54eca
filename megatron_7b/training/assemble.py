"""The one place that builds everything a run consists of, in order: process, groups, tokenizer, data, model, optimizer."""

import dataclasses

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.model.builder import build_model
from megatron_7b.model.core_config import params_dtype
from megatron_7b.optim.optimizer import Optimizer, wrap_data_parallel
from megatron_7b.parallel import ParallelLayout
from megatron_7b.parallel.groups import initialize_model_parallel, process_groups
from megatron_7b.runtime.device import DeviceType, torch_device


@dataclasses.dataclass
class Trainer:
    """Everything that a step needs.

    Attributes:
        config: The effective configuration (vocab_size filled in).
        layout: Position of this rank.
        device: Where this rank computes.
        model: This rank's model chunks, with gradient buffers.
        optimizer: AdamW over them.
    """

    config: RunConfig
    layout: ParallelLayout
    device: torch.device
    model: list[DistributedDataParallel]
    optimizer: Optimizer


def build_trainer(config: RunConfig, device_type: DeviceType) -> Trainer:
    """Build model and optimizer on the ranks of the default process group.

    Args:
        config: The run; `model.vocab_size` is known.
        device_type: Where to compute.

    Collective: all ranks.

    Raises:
        ConfigError: the layout does not fit the number of ranks, or the vocabulary size is not known.
    """
    if config.model.vocab_size is None:
        raise ConfigError(
            "model.vocab_size is not set, and no tokenizer says it",
            hint="set data.tokenizer, or preprocess the corpus with this project so that its manifest names one",
        )
    layout = initialize_model_parallel(config.parallel, seed=config.training.seed)
    groups = process_groups()
    chunks = build_model(
        config, vocab_size=config.model.vocab_size, layout=layout, groups=groups, device_type=device_type
    )
    model = wrap_data_parallel(list(chunks), config, groups)
    optimizer = Optimizer(model, config, params_dtype(config.precision, device_type))
    return Trainer(config=config, layout=layout, device=torch_device(device_type), model=model, optimizer=optimizer)
