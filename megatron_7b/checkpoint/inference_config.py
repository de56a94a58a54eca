"""The configuration for using a checkpoint rather than training on: at any layout, whichever layout wrote it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_7b.checkpoint.base import find_base
from megatron_7b.checkpoint.manifest import CONFIG, read_config
from megatron_7b.config import ParallelConfig, RunConfig, check_config, load_config
from megatron_7b.config.distillation_config import DistillationConfig
from megatron_7b.config.problems import Problem
from megatron_7b.errors import ConfigError


def inference_config(
    folder: Path,
    overrides: Mapping[str, object] | None = None,
    *,
    requirements: Mapping[str, object] | None = None,
    problems: Sequence[Problem] = (),
) -> RunConfig:
    """Return a checkpoint's configuration with a new layout and the true vocabulary size.

    The layout of the training run is forgotten: without `parallel.*` overrides it is one rank per replica. So are the
    number formats that need its distributed optimizer, and its CUDA graphs. With a checkpoint of an adapter,
    `checkpoint.initialize_from` is where the rest of the model was found.

    Args:
        folder: A complete checkpoint.
        overrides: Values by dotted path, as on the command line.
        requirements: Values that this use of the model needs; they override the checkpoint, but not `overrides`.
        problems: Mistakes on the command line, to be reported together with all others.

    Raises:
        CheckpointError: The folder is not a checkpoint, its configuration is damaged, or it holds an adapter and the
            model that it belongs to is not found.
        ConfigError: An override is unknown or impossible; all of them in one message.
    """
    vocab_size = read_config(folder).model.vocab_size
    one_rank = {f"parallel.{field.name}": field.default for field in dataclasses.fields(ParallelConfig)}
    untrained = {"precision.fp8_param_gather": False, "precision.optimizer_state_dtype": "fp32"}
    untrained |= {"runtime.cuda_graph_impl": "none", "runtime.cross_entropy_impl": "auto"}
    untrained |= {f"distillation.{field.name}": field.default for field in dataclasses.fields(DistillationConfig)}
    settings = {
        **one_rank,
        **untrained,
        "model.vocab_size": vocab_size,
        **(requirements or {}),
        **(overrides or {}),
    }
    config = load_config(folder / CONFIG, settings, problems=problems)
    named = config.checkpoint.initialize_from
    is_asked_for = named is not None and "checkpoint.initialize_from" in (overrides or {})
    base = find_base(folder, named, is_asked_for=is_asked_for)
    if base is not None:
        config = dataclasses.replace(
            config, checkpoint=dataclasses.replace(config.checkpoint, initialize_from=str(base))
        )
    if config.parallel.context_parallel_size > 1:
        raise ConfigError(
            f"parallel.context_parallel_size is {config.parallel.context_parallel_size}, but only training splits "
            "sequences over ranks",
            hint="use tensor or pipeline parallelism; a checkpoint of any layout can be loaded at any other",
        )
    if config.parallel.expert_model_parallel_size > 1:
        raise ConfigError(
            f"parallel.expert_model_parallel_size is {config.parallel.expert_model_parallel_size}, but only training "
            "shares experts among ranks",
            hint="use tensor or pipeline parallelism; a checkpoint of any layout can be loaded at any other",
        )
    if config.model.vocab_size != vocab_size:
        raise ConfigError(f"model.vocab_size is {config.model.vocab_size}, but {folder} has {vocab_size} tokens")
    # The run's global batch is irrelevant here and must not restrict the layout: one microbatch per stage.
    one_round = config.training.micro_batch_size * config.parallel.pipeline_model_parallel_size
    training = dataclasses.replace(config.training, global_batch_size=one_round, rampup_batch_size=None)
    config = dataclasses.replace(config, training=training)
    check_config(config)
    return config
