"""From a checkpoint to a smaller model's: measure, choose, cut, and measure again."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_7b.adapter import build_adapter
from megatron_7b.checkpoint import Companions, read_config, read_manifest, resolve_checkpoint, tokenizer_path
from megatron_7b.checkpoint.base import check_is_whole
from megatron_7b.checkpoint.inference_config import inference_config
from megatron_7b.compression.calibration import read_calibration
from megatron_7b.compression.pruning.plan import PruneOptions, PruningPlan, plan_pruning
from megatron_7b.compression.pruning.result import Measured, PrunedCheckpoint, describe_pruning
from megatron_7b.compression.pruning.scores import Scores, choose, layer_candidates
from megatron_7b.config import RunConfig
from megatron_7b.config.schema import ModelConfig
from megatron_7b.conversion.hf_config import check_exportable
from megatron_7b.conversion.progress import Report, describe_model, tell_nobody
from megatron_7b.conversion.replacing import check_replaces_import
from megatron_7b.conversion.resized import config_of_resized
from megatron_7b.conversion.staging import staged_folder, take_checkpoint
from megatron_7b.errors import CheckpointError, ConfigError, ConversionError
from megatron_7b.runtime.output_paths import check_new_folder
from megatron_7b.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from megatron_7b.compression.pruning.samples import TextSamples
    from megatron_7b.model.on_ranks import ModelOnRanks

RECORD = "pruning.json"
"""In the checkpoint: what it was made from, and what was removed."""


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """Text that activations are measured on, and text that the result is measured on.

    Attributes:
        file: Text, records, or the prefix of a corpus.
        held_out: The same for measuring the result; None: further samples of `file`, between those that are used.
        num_samples: Samples that activations are measured on.
        num_held_out: Samples that perplexity is measured on.
        seq_length: Tokens of each.
        key: Of a record that is no conversation: where its text is.
    """

    file: Path
    held_out: Path | None = None
    num_samples: int = 128
    num_held_out: int = 32
    seq_length: int = 512
    key: str = "text"


@dataclass(frozen=True)
class _Job:
    """What is known before torch is needed."""

    source: Path
    output: Path
    config: RunConfig
    plan: PruningPlan
    pruned: RunConfig
    calibration: CalibrationText


def check_pruning(
    checkpoint: Path, output: Path, config: RunConfig, options: PruneOptions, calibration: CalibrationText
) -> None:
    """Refuse what shows without torch to be impossible; the arguments are those of `prune_checkpoint`.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, or has no tokenizer.
        ConfigError: The model cannot be pruned to that, or the layout has virtual stages.
        PathError: The output is there already, or there is no calibration text.
    """
    _prepare(checkpoint, output, config, options, calibration, tell_nobody)


def prune_checkpoint(
    checkpoint: Path,
    output: Path,
    calibration: CalibrationText,
    options: PruneOptions,
    *,
    overrides: Mapping[str, object] | None = None,
    report: Report = tell_nobody,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> PrunedCheckpoint:
    """Write the checkpoint of a smaller model that keeps what matters most of a larger one.

    Tokenizer and other companions go along; optimizer state and counters do not: a run that starts from the result
    begins at step 0.

    Args:
        checkpoint: A checkpoint of any layout, or a folder that has one.
        output: Checkpoint to write.
        calibration: Text that activations are measured on.
        options: What the model is to become.
        overrides: Options by dotted path, such as `{"parallel.tensor_model_parallel_size": 2}`. On a CPU the model
            computes in FP32 unless `precision.params_dtype` is among them.
        report: Takes what is being done, and warnings, on the main rank.
        on_progress: Takes what is measured, how much is done, and of how much, on the main rank.

    Returns:
        The same on all ranks.

    Collective: all ranks of the launcher's world; a process without a launcher is a world of its own.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, or has no tokenizer.
        ConfigError: The model cannot be pruned to that, or the text is too short.
        PathError: The output is there already, or there is no calibration text.
    """
    source = resolve_checkpoint(checkpoint)
    config = inference_config(source, {"data.seq_length": calibration.seq_length, **(overrides or {})})
    job = _prepare(source, output, config, options, calibration, report)
    samples, held_out = read_text(source, calibration)

    from megatron_7b.checkpoint.open_model import opened_model
    from megatron_7b.compression.pruning.measuring import measure_loss_of
    from megatron_7b.compression.pruning.samples import TextSamples

    fp32_on_cpu = "precision.params_dtype" not in (overrides or {})
    report("reading", f"{source}: {describe_model(config.model, config.model.vocab_size or 0)}")
    text, unseen = TextSamples(samples), TextSamples(held_out)
    with opened_model(source, config, fp32_on_cpu=fp32_on_cpu) as model:
        is_main = model.layout.is_main
        watch = on_progress if is_main and on_progress is not None else watch_nothing
        scores, losses = _measure(model, text, job.plan, watch)
        before = measure_loss_of(model, unseen, lambda done, total: watch("held-out text", done, total))
        kept = choose(job.plan, scores, losses)
        measured = Measured(scores, kept, loss_before=before)
        if is_main:
            _write(job, measured, report)
        wait_for_all()
    small = inference_config(output, {"data.seq_length": calibration.seq_length, **without_model(overrides)})
    with opened_model(output, small, fp32_on_cpu=fp32_on_cpu) as model:
        after = measure_loss_of(model, unseen, lambda done, total: watch("smaller model", done, total))
    measured = replace(measured, loss_after=after)
    stored = 2 if read_manifest(output).params_dtype == "bfloat16" else 4
    return PrunedCheckpoint(output, job.pruned, job.plan, measured, unseen.num_samples * unseen.seq_length, stored)


def _prepare(
    checkpoint: Path,
    output: Path,
    config: RunConfig,
    options: PruneOptions,
    calibration: CalibrationText,
    report: Report,
) -> _Job:
    source = check_source(checkpoint, output, config, overwrite=options.overwrite)
    trained = read_config(source)
    plan = plan_pruning(config.model, options)
    try:
        check_exportable(plan.target)
    except ConversionError as error:
        said = str(error.args[0]).replace("\n ", "")
        report("warning", f"what is left works here, but is no model that `convert to-hf` writes: {said}")
    pruned = config_of_resized(trained, _trained_shape(trained.model, plan.target), report, size="smaller")
    return _Job(source, output, config, plan, pruned, calibration)


def check_source(checkpoint: Path, output: Path, config: RunConfig, *, overwrite: bool) -> Path:
    """Return the checkpoint itself, once it and the output are found to be usable.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, or has no tokenizer.
        ConfigError: It has an adapter, or the layout has virtual stages.
        PathError: The output is there already.
    """
    source = resolve_checkpoint(checkpoint)
    check_new_folder(output, overwrite=overwrite, inputs=(source,))
    check_replaces_import(output)
    check_is_whole(source)
    trained = read_config(source)
    if build_adapter(trained) is not None:
        raise ConfigError(
            f"{source} has an adapter ({trained.adapter.method}) beside its weights",
            hint="`megatron-7b convert to-hf --merge` writes one model of both, and `convert from-hf` a checkpoint",
        )
    if config.parallel.virtual_pipeline_model_parallel_size is not None:
        raise ConfigError("parallel.virtual_pipeline_model_parallel_size is for training: leave it out")
    if tokenizer_path(source) is None:
        raise CheckpointError(f"{source} carries no tokenizer, which calibration text needs")
    return source


def _trained_shape(model: ModelConfig, target: ModelConfig) -> ModelConfig:
    """Put the sizes of the smaller model into the configuration that the larger one was trained with."""
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    names = (*sizes, "window_size", "window_attn_skip_freq")
    return replace(model, **{name: getattr(target, name) for name in (*names, "norm_epsilon")})


def read_text(source: Path, text: CalibrationText) -> tuple[list[list[int]], list[list[int]]]:
    """Return calibration and held-out samples of one token more than the model reads."""
    path = tokenizer_path(source)
    assert path is not None
    tokenizer, length = load_tokenizer(path), text.seq_length + 1
    if text.held_out is not None:
        samples = read_calibration(text.file, tokenizer, text.num_samples, length, key=text.key)
        return samples, read_calibration(text.held_out, tokenizer, text.num_held_out, length, key=text.key)
    try:
        both = read_calibration(text.file, tokenizer, text.num_samples + text.num_held_out, length, key=text.key)
    except ConfigError as error:
        said = str(error).partition("\nhint:")[0]
        raise ConfigError(
            f"{said}; {text.num_held_out} of these are held out",
            hint="give more text, --held-out text of its own, or less of --num-samples, --num-held-out or --seq-length",
        ) from error
    every = len(both) / text.num_held_out
    unseen = {int((number + 0.5) * every) for number in range(text.num_held_out)}
    return [one for place, one in enumerate(both) if place not in unseen], [both[place] for place in sorted(unseen)]


def _measure(
    model: "ModelOnRanks", text: "TextSamples", plan: PruningPlan, watch: Callable[[str, int, int], None]
) -> tuple[Scores, dict[tuple[int, ...], float]]:
    from megatron_7b.compression.pruning.measuring import measure_scores, measure_without

    scores = measure_scores(
        model,
        text,
        with_depth=plan.scores_depth,
        on_progress=lambda done, total: watch("calibration text", done, total),
    )
    if plan.options.depth_score != "perplexity":
        return scores, {}
    candidates = layer_candidates(plan)
    losses = measure_without(
        model, text, candidates, on_progress=lambda done, total: watch("layers left out", done, total)
    )
    return scores, losses


def _write(job: _Job, measured: Measured, report: Report) -> None:
    from megatron_7b.checkpoint.weights import CheckpointWeights, write_weights
    from megatron_7b.compression.pruning.weights import prune_weights

    started = time.perf_counter()
    vocab_size = read_manifest(job.source).vocab_size
    report("pruning", f"{job.plan.describe()}: {describe_model(job.plan.target, vocab_size)}")
    tensors = prune_weights(CheckpointWeights(job.source, verify=False), job.plan, measured.kept, vocab_size)
    record: dict[str, Any] = {"made_from": str(job.source.resolve()), **describe_pruning(job.plan, measured)}
    with staged_folder(job.output) as staging:
        written = write_weights(
            staging,
            tensors,
            job.pruned,
            companions=Companions.of_checkpoint(job.source),
            records={RECORD: json.dumps(record, indent=1) + "\n"},
        )
        take_checkpoint(staging, written)
    num_bytes = sum(file.stat().st_size for file in job.output.glob("*.distcp"))
    report(
        "wrote", f"{job.output}: {num_bytes / 1e6:,.1f} MB, {time.perf_counter() - started:.1f} s; no optimizer state"
    )


def without_model(overrides: Mapping[str, object] | None) -> dict[str, object]:
    """Leave out options of the larger model."""
    return {path: value for path, value in (overrides or {}).items() if not path.startswith("model.")}


def wait_for_all() -> None:
    """Wait until the main rank has written. Collective: all ranks."""
    import torch.distributed as dist

    if dist.get_world_size() > 1:
        dist.barrier()


def watch_nothing(_what: str, _done: int, _total: int) -> None:
    """Show no progress."""
