"""From a checkpoint to the same model with zeros in its matrices: measure inputs, choose zeros, and measure again."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_7b.checkpoint import Companions, read_config, resolve_checkpoint
from megatron_7b.checkpoint.inference_config import inference_config
from megatron_7b.compression.pruning.checkpoint import (
    RECORD,
    CalibrationText,
    check_source,
    read_text,
    wait_for_all,
    watch_nothing,
)
from megatron_7b.compression.pruning.plan import check_can_be_pruned
from megatron_7b.compression.pruning.scores import perplexity
from megatron_7b.config import RunConfig
from megatron_7b.config.schema import ModelConfig
from megatron_7b.conversion.progress import Report, describe_model, tell_nobody
from megatron_7b.conversion.staging import staged_folder, take_checkpoint
from megatron_7b.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_7b.compression.pruning.samples import TextSamples
    from megatron_7b.compression.pruning.sparsity import Pattern
    from megatron_7b.model.on_ranks import ModelOnRanks

_BYTES_AT_ONCE = 1 << 30
"""Of sums over inputs, in every rank's memory: of as many layers at a time as fit."""


@dataclass(frozen=True, kw_only=True)
class SparseOptions:
    """Which weights become zero.

    Attributes:
        sparsity: Their share, `0.5`, or `2:4`: two in every four that follow one another in a row.
        method: What chooses them.
        overwrite: Replace an earlier output of this command.
    """

    sparsity: str
    method: Literal["magnitude", "wanda", "sparsegpt"] = "wanda"
    overwrite: bool = False


@dataclass(frozen=True)
class SparseMatrix:
    """What has become of a matrix.

    Attributes:
        name: As in checkpoints.
        sparsity: Share of zeros.
        error: How much its output changes on calibration text, as a share of its size.
    """

    name: str
    sparsity: float
    error: float


@dataclass
class SparseCheckpoint:
    """What came of it.

    Attributes:
        folder: The checkpoint.
        options: What was asked for.
        matrices: In the order of the forward pass; on the main rank.
        loss_before: On held-out text, nats per token.
        loss_after: The same with zeros.
        held_out_tokens: What the losses are over.
    """

    folder: Path
    options: SparseOptions
    matrices: list[SparseMatrix] = field(default_factory=list)
    loss_before: float = math.nan
    loss_after: float = math.nan
    held_out_tokens: int = 0

    def rows(self) -> list[list[str]]:
        """Return a table: sparsity and errors of each layer's matrices."""
        kinds = list(dict.fromkeys(one.name.split(".", 3)[3].removesuffix(".weight") for one in self.matrices))
        rows = [["layer", "zeros", *(f"error of {kind.split('.')[1]}" for kind in kinds)]]
        for first in range(0, len(self.matrices), len(kinds)):
            of_layer = self.matrices[first : first + len(kinds)]
            zeros = sum(one.sparsity for one in of_layer) / len(of_layer)
            rows.append([of_layer[0].name.split(".")[2], f"{zeros:.1%}", *(f"{one.error:.4f}" for one in of_layer)])
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON has it."""
        before, after = (
            value if math.isfinite(value := perplexity(loss)) else None for loss in (self.loss_before, self.loss_after)
        )
        figures = {"before": before, "after": after, "held_out_tokens": self.held_out_tokens}
        return {"output": str(self.folder), "perplexity": figures, **self.record()}

    def record(self) -> dict[str, Any]:
        """Return what is kept in the checkpoint."""
        matrices = [{"name": one.name, "sparsity": one.sparsity, "error": one.error} for one in self.matrices]
        return {"sparsity": self.options.sparsity, "method": self.options.method, "matrices": matrices}


def check_sparsity(checkpoint: Path, output: Path, config: RunConfig, options: SparseOptions) -> "Pattern":
    """Return the pattern, and refuse what shows early to be impossible.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, or has no tokenizer.
        ConfigError: The model cannot have such zeros.
        PathError: The output is there already.
    """
    from megatron_7b.compression.pruning.sparsity import Pattern

    pattern = Pattern.parse(options.sparsity)
    check_can_be_pruned(config.model)
    model = config.model
    widths = {"hidden_size": model.hidden_size, "ffn_hidden_size": model.ffn_hidden_size}
    for name, width in {**widths, "width of all heads": model.num_attention_heads * model.head_width}.items():
        if width % pattern.of:
            raise ConfigError(f"--sparsity is {options.sparsity}, but {name} is {width}, no multiple of {pattern.of}")
    check_source(checkpoint, output, config, overwrite=options.overwrite)
    return pattern


def sparsify_checkpoint(
    checkpoint: Path,
    output: Path,
    calibration: CalibrationText,
    options: SparseOptions,
    *,
    overrides: Mapping[str, object] | None = None,
    report: Report = tell_nobody,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> SparseCheckpoint:
    """Write a checkpoint of the same model with zeros in the matrices of its layers.

    All inputs are those of the model without zeros. The arguments are those of `prune_checkpoint`.

    Returns:
        The same on all ranks, but for the matrices, which the main one has.

    Collective: all ranks of the launcher's world; a process without a launcher is a world of its own.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, or has no tokenizer.
        ConfigError: The model cannot have such zeros, or the text is too short.
        PathError: The output is there already, or there is no calibration text.
    """
    source = resolve_checkpoint(checkpoint)
    settings = {"data.seq_length": calibration.seq_length, **(overrides or {})}
    config = inference_config(source, settings)
    pattern = check_sparsity(source, output, config, options)
    samples, held_out = read_text(source, calibration)

    from megatron_7b.checkpoint.open_model import opened_model
    from megatron_7b.compression.pruning.measuring import measure_loss_of
    from megatron_7b.compression.pruning.samples import TextSamples

    fp32_on_cpu = "precision.params_dtype" not in (overrides or {})
    report("reading", f"{source}: {describe_model(config.model, config.model.vocab_size or 0)}")
    text, unseen = TextSamples(samples), TextSamples(held_out)
    result = SparseCheckpoint(output, options, held_out_tokens=unseen.num_samples * unseen.seq_length)
    with opened_model(source, config, fp32_on_cpu=fp32_on_cpu) as model:
        watch = on_progress if model.layout.is_main and on_progress is not None else watch_nothing
        result.loss_before = measure_loss_of(model, unseen, partial(watch, "held-out text"))
        changed = _sparsified(model, text, source, pattern, result, watch)
        if model.layout.is_main:
            _write(source, changed, result, report)
        wait_for_all()
    with opened_model(output, inference_config(output, settings), fp32_on_cpu=fp32_on_cpu) as model:
        result.loss_after = measure_loss_of(model, unseen, partial(watch, "sparse model"))
    return result


def _sparsified(
    model: "ModelOnRanks",
    text: "TextSamples",
    source: Path,
    pattern: "Pattern",
    result: SparseCheckpoint,
    watch: Callable[[str, int, int], None],
) -> dict[str, "Tensor"]:
    """Return the matrices with zeros, in the number format of the checkpoint, on the main rank."""
    from megatron_7b.checkpoint.weights import CheckpointWeights
    from megatron_7b.compression.pruning.inputs import measure_inputs
    from megatron_7b.compression.pruning.sparsity import sparsify
    from megatron_7b.compression.quantization.statistics import output_error

    weights, changed = CheckpointWeights(source, verify=False), {}
    for layers in _portions(model.config.model):
        some = "all layers" if len(layers) == model.config.model.num_layers else f"layers {layers[0]} to {layers[-1]}"
        grams = measure_inputs(model, text, layers, partial(watch, f"inputs of {some}"))
        for number, (name, gram) in enumerate(grams.items() if model.layout.is_main else ()):
            watch(f"matrices of {some}", number, len(grams))
            stored = weights[name]
            before = stored.to(model.device).float()
            after = sparsify(before, gram, pattern, result.options.method).to(stored.dtype)
            changed[name] = after.cpu()
            zeros = float((after == 0).double().mean())
            result.matrices.append(SparseMatrix(name, zeros, output_error(before, after.float(), gram)))
    return changed


def _portions(model: ModelConfig) -> Iterator[range]:
    """Yield as many layers at a time as their sums fit into the memory that is given to them."""
    widths = (model.hidden_size, model.hidden_size, model.num_attention_heads * model.head_width, model.ffn_hidden_size)
    size = max(1, _BYTES_AT_ONCE // (4 * sum(width**2 for width in widths)))
    for first in range(0, model.num_layers, size):
        yield range(first, min(first + size, model.num_layers))


def _write(source: Path, changed: dict[str, "Tensor"], result: SparseCheckpoint, report: Report) -> None:
    from megatron_7b.checkpoint.weights import CheckpointWeights, write_weights

    weights, trained = CheckpointWeights(source, verify=False), read_config(source)
    config = replace(trained, checkpoint=replace(trained.checkpoint, initialize_from=None))
    tensors = ((name, changed[name] if name in changed else weights[name]) for name in weights)
    record = {"made_from": str(source.resolve()), **result.record()}
    with staged_folder(result.folder) as staging:
        written = write_weights(
            staging,
            tensors,
            config,
            companions=Companions.of_checkpoint(source),
            records={RECORD: json.dumps(record, indent=1) + "\n"},
        )
        take_checkpoint(staging, written)
    report("wrote", f"{result.folder}; no optimizer state")
