"""The run that a plan is for: as its own command would read it, and with what weights and corpus say of it."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megatron_7b.checkpoint import config_file, read_config, resolve_checkpoint
from megatron_7b.cli.options import CommandLine
from megatron_7b.config import RunConfig, load_config
from megatron_7b.config.objectives import OF_HEADS
from megatron_7b.config.schema import ModelConfig
from megatron_7b.config.tasks import TASKS
from megatron_7b.data.samples.corpus_tokenizer import corpus_vocab_size
from megatron_7b.errors import ConfigError

# What a run chooses for itself if it starts from a Hugging Face folder.
_OWN = ("transformer_impl", "hidden_dropout", "attention_dropout", "moe_aux_loss_coeff", "make_vocab_size_divisible_by")


def planned_config(command_line: CommandLine) -> RunConfig:
    """Return the configuration of the run.

    With `--checkpoint.initialize-from`, the model is that of the weights: of a checkpoint, or of a Hugging Face folder,
    of which config.json is enough. A vocabulary that is not set is that of the corpus; objective and head of a
    fine-tuning are those of its task.

    Raises:
        MegatronError: The configuration or the weights' cannot be read.
    """
    flags, overrides = command_line.flags, command_line.overrides
    config = load_config(flags.config, overrides, problems=command_line.problems)
    start = config.checkpoint.initialize_from
    if start is not None and _hugging_face(Path(start)) is None:
        config = load_config(flags.config, overrides, model_from=config_file(resolve_checkpoint(Path(start))))
    elif start is not None:
        shape = model_of(Path(start))
        own = {field.name: getattr(config.model, field.name) for field in fields(ModelConfig) if field.name in _OWN}
        config = replace(config, model=replace(shape, **own))
    if config.finetune.task is not None:
        return _for_task(config)
    if config.model.vocab_size is None and config.data.train:
        config = replace(config, model=replace(config.model, vocab_size=corpus_vocab_size(config.data)))
    return config


def _for_task(config: RunConfig) -> RunConfig:
    """Return a fine-tuning with the objective of its task, and with its head, whose labels the data will say."""
    objective = TASKS[str(config.finetune.task)]
    model, heads = config.model, [head for head, trained in OF_HEADS.items() if trained == objective]
    if heads and not model.has_head:
        kind: dict[str, Any] = {"head": heads[0]}
        model = replace(model, **kind)
    return replace(config, model=model, objective=replace(config.objective, name=objective))


def model_of(path: Path) -> ModelConfig:
    """Return the shape of a model: of a checkpoint, or of a Hugging Face folder or its config.json.

    Raises:
        MegatronError: There is none, or it is of a kind that is not known here.
    """
    file = _hugging_face(path)
    if file is None:
        return read_config(resolve_checkpoint(path)).model
    from megatron_7b.conversion.hf_config import from_hugging_face_config

    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds a {type(values).__name__}, not the options of a model")
    return from_hugging_face_config(values)


def _hugging_face(path: Path) -> Path | None:
    """Return the config.json that a path means, if it does."""
    if path.suffix == ".json" and path.is_file():
        return path
    return path / "config.json" if (path / "config.json").is_file() else None
