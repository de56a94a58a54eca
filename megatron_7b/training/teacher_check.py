"""Whether a teacher fits a run: the same tokens, and layers that the layout divides. Imports no torch."""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_7b.checkpoint import resolve_checkpoint, tokenizer_path
from megatron_7b.checkpoint.base import check_is_whole
from megatron_7b.checkpoint.manifest import read_config, read_manifest
from megatron_7b.config import check_config
from megatron_7b.config.adapters import AdapterConfig
from megatron_7b.config.distillation_config import DistillationConfig
from megatron_7b.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_7b.data.samples.teacher_logits import CachedLogits
from megatron_7b.errors import ConfigError
from megatron_7b.model.layer_pairs import find_layer_pairs
from megatron_7b.model.starting_head import has_same_head
from megatron_7b.tokenizer import Tokenizer, load_tokenizer

_NO_RECOMPUTE: dict[str, Any] = {
    field.name: field.default for field in dataclasses.fields(ParallelConfig) if field.name.startswith("recompute_")
}


def shape_of_teacher(config: RunConfig) -> RunConfig | None:
    """Return what a run's teacher is built with, whether or not it fits the run; None if it has none in memory.

    Raises:
        CheckpointError: It is no complete checkpoint.
    """
    teacher = config.distillation.teacher
    return None if teacher is None else _as_built(config, resolve_checkpoint(Path(teacher)))


def teacher_config(config: RunConfig, folder: Path) -> RunConfig:
    """Return the configuration that the teacher is built with: its own shape, and the layout of the run.

    Raises:
        CheckpointError: It is no complete checkpoint.
        ConfigError: The layout does not divide it.
    """
    result = _as_built(config, folder)
    if result.model.num_moe_experts and config.distillation.teacher_tensor_model_parallel_size is not None:
        raise ConfigError(
            f"distillation.teacher is {folder}, a mixture of experts, which runs at the layout of the student only",
            hint="leave out --distillation.teacher-tensor-model-parallel-size",
        )
    try:
        check_config(result)
    except ConfigError as error:
        own = config.distillation.teacher_tensor_model_parallel_size
        whose = "the student's" if own is None else "its own"
        raise ConfigError(
            f"the teacher {folder} cannot run at {whose} layout: {error}",
            hint="both models run on the same ranks: choose a layout that divides both, or give the teacher its own by "
            "--distillation.teacher-tensor-model-parallel-size",
        ) from error
    return result


def _as_built(config: RunConfig, folder: Path) -> RunConfig:
    model = read_config(folder).model
    own = config.model
    model = dataclasses.replace(
        model,
        transformer_impl=own.transformer_impl,
        make_vocab_size_divisible_by=own.make_vocab_size_divisible_by,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    dtype = config.distillation.teacher_dtype
    precision = dataclasses.replace(
        config.precision,
        params_dtype=config.precision.params_dtype if dtype == "auto" else dtype,
        fp8="none",
        fp8_param_gather=False,
    )
    return dataclasses.replace(
        config,
        model=model,
        precision=precision,
        adapter=AdapterConfig(),
        objective=dataclasses.replace(config.objective, sentence_pairs="none"),
        distillation=DistillationConfig(),
        parallel=_parallel_of_teacher(config),
    )


def _parallel_of_teacher(config: RunConfig) -> ParallelConfig:
    parallel = dataclasses.replace(config.parallel, **_NO_RECOMPUTE, overlap_param_gather=False)
    tensor = config.distillation.teacher_tensor_model_parallel_size
    if tensor is None:
        return parallel
    return dataclasses.replace(
        parallel,
        tensor_model_parallel_size=tensor,
        sequence_parallel=False,  # it saves activations of a backward pass, and the student's ranks want whole texts
        virtual_pipeline_model_parallel_size=None,
        pipeline_model_parallel_layout=(),
    )


def check_teacher(config: RunConfig, tokenizer: Tokenizer | None) -> None:
    """Refuse a teacher that a run cannot learn from.

    Args:
        config: The run; `model.vocab_size` is set if it is known.
        tokenizer: Of the run's data; None if it is not known.

    Raises:
        CheckpointError: It is not a complete checkpoint of a whole model.
        ConfigError: It is a model of another kind or of other tokens, or the layout does not divide it.
    """
    if config.distillation.cached_logits is not None:
        _check_cache(config, config.distillation.cached_logits, tokenizer)
        return
    folder = resolve_checkpoint(Path(str(config.distillation.teacher)))
    check_is_whole(folder)
    model, vocab_size = read_config(folder).model, read_manifest(folder).vocab_size
    if model.traits.kind != config.model.traits.kind or not has_same_head(model, config.model):
        raise ConfigError(
            f"distillation.teacher is {folder}, {_kind(model)}; this run trains {_kind(config.model)}",
            hint="choose a teacher that predicts what the student does; --finetune.labels puts classes into its order"
            if model.has_head
            else "choose a teacher that predicts what the student does",
        )
    check_tokens(config, folder, vocab_size, tokenizer_path(folder), tokenizer)
    teacher_config(config, folder)
    if config.distillation.compares_layers:
        find_layer_pairs(config.distillation, config.model, model, config.parallel)


def check_tokens(
    config: RunConfig, teacher: Path, vocab_size: int | None, of_teacher: Path | None, tokenizer: Tokenizer | None
) -> None:
    """Refuse a teacher of other tokens.

    Args:
        config: The run; `model.vocab_size` is set if it is known.
        teacher: The checkpoint, or the Hugging Face folder that it will be imported from.
        vocab_size: Its vocabulary.
        of_teacher: Its tokenizer, if it has one.
        tokenizer: Of the run's data; None if it is not known.

    Raises:
        ConfigError: It has another vocabulary, or another tokenizer.
    """
    if config.model.vocab_size not in (None, vocab_size):
        raise ConfigError(
            f"distillation.teacher is {teacher}, which has {vocab_size:,} tokens, but the student has "
            f"{config.model.vocab_size:,}: their probabilities cannot be compared",
            hint="choose a teacher with the student's tokenizer, or let the teacher write texts to train on",
        )
    if of_teacher is not None and tokenizer is not None:
        known = load_tokenizer(of_teacher)
        if known.identity != tokenizer.identity:
            raise ConfigError(
                f"distillation.teacher is {teacher}, whose tokenizer is {known.identity}, but this run's data were "
                f"written with {tokenizer.identity}",
                hint="choose a teacher with the student's tokenizer, or let the teacher write texts to train on",
            )


def _kind(model: ModelConfig) -> str:
    """Say what a model predicts."""
    if not model.has_head:
        return f"a model of kind {model.traits.kind}"
    names = f" ({', '.join(model.labels[:6])}{', …' if len(model.labels) > 6 else ''})" if model.labels else ""
    task = f", {model.problem_type}" if model.head == "sequence_classification" else ""
    return f"a model of kind {model.traits.kind} with a head for {model.head}{task}, {model.num_labels} outputs{names}"


def _check_cache(config: RunConfig, prefix: str, tokenizer: Tokenizer | None) -> None:
    """Refuse cached logits of other tokens or at another temperature; samples are compared with the run's later."""
    cache, wanted = CachedLogits.read(prefix), config.distillation.temperature
    if config.model.vocab_size not in (None, cache.vocab_size):
        raise ConfigError(
            f"the cached logits {prefix} are over {cache.vocab_size:,} tokens, but the student has "
            f"{config.model.vocab_size:,}"
        )
    if tokenizer is not None and cache.tokenizer not in (None, tokenizer.identity):
        raise ConfigError(
            f"the cached logits {prefix} were written with the tokenizer {cache.tokenizer}, but the data of this run "
            f"with {tokenizer.identity}"
        )
    if cache.temperature != wanted:
        raise ConfigError(
            f"distillation.temperature is {wanted:g}, but the cached logits {prefix} were written at "
            f"{cache.temperature:g}",
            hint="what is left for all other tokens depends on it: set the temperature of the cache, or write another",
        )
