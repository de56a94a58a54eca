"""A model in fewer bits, layer by layer, with what it has lost: all that `megatron-7b compress quantize` does.

Two streams of samples pass through the model. Held-out text passes through each layer twice, as it was and as it is
now, and gives both perplexities; text to calibrate with passes through the layers as they are now, so that each layer
is rounded for the inputs that it will have. In memory are one layer, sums over its inputs, and the hidden states of the
samples.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import exp, prod
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_7b.compression.calibration import read_calibration
from megatron_7b.compression.quantization.ignoring import check_ignored, is_ignored
from megatron_7b.compression.quantization.options import QuantizeOptions
from megatron_7b.compression.quantization.result import Quantized
from megatron_7b.compression.quantization.schemes import Scheme, check_groups
from megatron_7b.compression.quantization.source import Source, copy_companions
from megatron_7b.conversion import HuggingFaceFolder
from megatron_7b.conversion.progress import Report, tell_nobody
from megatron_7b.conversion.replacing import check_replaces_export
from megatron_7b.conversion.staging import staged_folder
from megatron_7b.errors import ConfigError, MegatronError, PathError
from megatron_7b.files import replacing
from megatron_7b.runtime.output_paths import check_can_create, check_new_folder
from megatron_7b.runtime.process.logs import loading
from megatron_7b.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_7b.compression.quantization.storage import Storage
    from megatron_7b.conversion.layerwise import LayerwiseDecoder

type OnLayer = Callable[[int, int], None]
"""Takes the number of layers that are done, and of all."""

_SEQ_LENGTH = 512
_BYTES = {"F64": 8, "F32": 4}


@dataclass(frozen=True)
class Texts:
    """Samples of text, [n][s] ids.

    Attributes:
        calibration: What is looked at; empty: nothing.
        held_out: What perplexity is measured on; empty: it is not.
    """

    calibration: list[list[int]]
    held_out: list[list[int]]


def quantize(
    output: str | Path,
    options: QuantizeOptions,
    *,
    checkpoint: str | Path | None = None,
    hf: str | Path | None = None,
    report: Report = tell_nobody,
    on_layer: OnLayer | None = None,
) -> Quantized:
    """Quantise a model, measure what it has lost, and publish it if that is not too much.

    Args:
        output: Folder to write, or for a scheme of llama.cpp's the .gguf file.
        options: How.
        checkpoint: A checkpoint of any layout, or
        hf: a Hugging Face folder.
        report: Takes what is being done, and warnings.
        on_layer: Called after each layer.

    Returns:
        Sizes, perplexities and errors.

    Raises:
        CheckpointError: The checkpoint is damaged.
        ConfigError: Options are impossible, the output exists, the model is of another kind, or the text is too short.
        ConversionError: The folder cannot be read.
        MegatronError: Perplexity has grown by more than `options.max_loss`; nothing was published.
    """
    started = time.perf_counter()
    scheme = options.check()
    output = Path(output)
    inputs = tuple(Path(one) for one in (checkpoint, hf) if one is not None)
    _check_output(output, scheme, options, inputs)
    source = Source.read(None if checkpoint is None else Path(checkpoint), None if hf is None else Path(hf))
    if isinstance(scheme, Scheme):
        _check_matrices(source, scheme, options)
    else:
        _check_gguf(source)
    texts = _read_texts(source, options)
    with source.opened(output, report) as folder:
        with loading("torch and transformers"):
            from megatron_7b.conversion.layerwise import LayerwiseDecoder
        import torch

        decoder = LayerwiseDecoder(folder, "cuda" if torch.cuda.is_available() else "cpu")
        result = Quantized(output, options.scheme, options.method if isinstance(scheme, Scheme) else "rtn")
        result.bytes_before = sum(
            prod(shape) * _BYTES.get(folder.dtypes[name], 2) for name, shape in folder.shapes.items()
        )
        with _opened_storage(output, folder, decoder, scheme, options) as storage:
            _quantize_layers(decoder, storage, texts, result, on_layer)
            result.bytes_after = storage.finish()
            result.kept = storage.kept
            _check_loss(result, options, report)
    result.seconds = time.perf_counter() - started
    return result


def _check_output(output: Path, scheme: Scheme | str, options: QuantizeOptions, inputs: tuple[Path, ...]) -> None:
    if isinstance(scheme, Scheme):
        check_new_folder(output, overwrite=options.overwrite, inputs=inputs)
        check_replaces_export(output)
        return
    if output.suffix != ".gguf":
        raise ConfigError(f"--output {output} is to be a file of llama.cpp's", hint=f"such as {output}.gguf")
    if output.is_dir():
        raise PathError(f"--output {output} is a folder, expected a path that is free")
    if output.exists() and not options.overwrite:
        raise PathError(f"--output {output} exists", hint="choose another, or replace it with --overwrite")
    check_can_create(output, "the output")


def _check_gguf(source: Source) -> None:
    """Refuse what llama.cpp does not compute."""
    with loading("torch"):
        from megatron_7b.compression.quantization.gguf.architecture import GgufArchitecture

    GgufArchitecture.of(source.config, source.path)


def _check_matrices(source: Source, scheme: Scheme, options: QuantizeOptions) -> None:
    """Refuse groups that do not fit, and names of no matrix."""
    if source.config.get("model_type") == "gpt2":
        raise ConfigError(
            f"{source.path} is a GPT-2, whose matrices transformers keeps as Conv1D, for which compressed-tensors has "
            "no format",
            hint="--scheme gguf:q8_0 and its kin store it",
        )
    shapes = {
        name.removesuffix(".weight"): shape
        for name, shape in source.shapes.items()
        if name.endswith(("_proj.weight", "lm_head.weight")) and len(shape) == 2
    }
    has_head = "lm_head" in shapes
    if not has_head and not is_ignored("lm_head", options.ignore):
        raise ConfigError(
            "the output layer is the word embedding, which stays as it is", hint="add lm_head to --ignore"
        )
    check_ignored([*shapes, *([] if has_head else ["lm_head"])], options.ignore)
    check_groups(scheme, {name: shape[1] for name, shape in shapes.items() if not is_ignored(name, options.ignore)})


def _read_texts(source: Source, options: QuantizeOptions) -> Texts:
    if options.calibration is None and options.held_out is None:
        return Texts([], [])
    if source.tokenizer is None:
        raise ConfigError(
            f"{source.path} carries no tokenizer, so text cannot be read",
            hint="leave out --calibration and --held-out, or quantise a checkpoint that carries one",
        )
    tokenizer = load_tokenizer(source.tokenizer)
    context = source.config.get("max_position_embeddings") or source.config.get("n_positions")
    longest = context if isinstance(context, int) else _SEQ_LENGTH
    length = options.seq_length or min(_SEQ_LENGTH, longest)
    if length > longest:
        raise ConfigError(f"--seq-length is {length}, and the model's context is {longest}")
    if options.calibration is None:
        return Texts([], read_calibration(str(options.held_out), tokenizer, options.num_held_out, length))
    if options.held_out is not None:
        held_out = read_calibration(options.held_out, tokenizer, options.num_held_out, length)
        return Texts(read_calibration(options.calibration, tokenizer, options.num_samples, length), held_out)
    total = options.num_samples + options.num_held_out
    samples = read_calibration(options.calibration, tokenizer, total, length)
    kept = {number * total // options.num_held_out for number in range(options.num_held_out)}
    return Texts(
        [sample for number, sample in enumerate(samples) if number not in kept], [samples[one] for one in sorted(kept)]
    )


@contextlib.contextmanager
def _opened_storage(
    output: Path,
    folder: HuggingFaceFolder,
    decoder: "LayerwiseDecoder",
    scheme: Scheme | str,
    options: QuantizeOptions,
) -> "Iterator[Storage]":
    if isinstance(scheme, Scheme):
        from megatron_7b.compression.quantization.compressed_folder import CompressedFolder

        with staged_folder(output) as staging:
            copy_companions(folder.path, staging)
            yield CompressedFolder(staging, folder, scheme, options)
        return
    from megatron_7b.compression.quantization.gguf.file import GgufFile

    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as beside:
        yield GgufFile(beside, folder, decoder, scheme)


def _quantize_layers(
    decoder: "LayerwiseDecoder", storage: "Storage", texts: Texts, result: Quantized, on_layer: OnLayer | None
) -> None:
    import torch

    with torch.inference_mode():
        first = {name: decoder.folder[name] for name in decoder.first_names()}
        replaced = storage.first(first)
        calibration = decoder.embed(texts.calibration, replaced) if texts.calibration else None
        before = decoder.embed(texts.held_out) if texts.held_out else None
        after = decoder.embed(texts.held_out, replaced) if texts.held_out else None
        del first
        for number in range(decoder.num_layers):
            _quantize_layer(decoder, storage, number, result, (calibration, before, after))
            if on_layer is not None:
                on_layer(number + 1, decoder.num_layers)
        _quantize_last(decoder, storage, texts, result, replaced, (calibration, before, after))


def _quantize_layer(
    decoder: "LayerwiseDecoder",
    storage: "Storage",
    number: int,
    result: Quantized,
    streams: "tuple[Tensor | None, Tensor | None, Tensor | None]",
) -> None:
    from megatron_7b.compression.quantization.statistics import InputStatistics

    calibration, before, after = streams
    prefix = decoder.layer_prefix(number)
    with decoder.layer(number) as layer:
        statistics = None
        if calibration is not None and (linears := storage.linears(prefix, layer)):
            statistics = InputStatistics(linears)
            with statistics.gathering():
                decoder.run_layer(number, layer, calibration, keeps_result=False)
        if before is not None:
            decoder.run_layer(number, layer, before)
        result.errors += storage.layer(prefix, layer, statistics)
        with storage.computing(prefix, layer):
            for stream in (calibration, after):
                if stream is not None:
                    decoder.run_layer(number, layer, stream)


def _quantize_last(
    decoder: "LayerwiseDecoder",
    storage: "Storage",
    texts: Texts,
    result: Quantized,
    replaced: "dict[str, Tensor]",
    streams: "tuple[Tensor | None, Tensor | None, Tensor | None]",
) -> None:
    from megatron_7b.compression.quantization.predictions import compare_predictions
    from megatron_7b.compression.quantization.statistics import InputStatistics

    calibration, before, after = streams
    with contextlib.ExitStack() as stages:
        original = None if before is None else stages.enter_context(decoder.last_stage())
        stage = stages.enter_context(decoder.last_stage(replaced))
        statistics = None
        if calibration is not None and not decoder.is_tied and (linears := storage.linears("", stage)):
            statistics = InputStatistics(linears)
            with statistics.gathering():
                for states in calibration:
                    stage(states)
        result.errors += storage.last(decoder.norm_prefix, stage, statistics)
        if original is not None and before is not None and after is not None:
            with storage.computing("", stage):
                losses = compare_predictions(original, before, stage, after, texts.held_out)
            result.perplexity_before, result.perplexity_after = _exp(losses.before), _exp(losses.after)
            result.divergence, result.num_tokens = losses.divergence, losses.num_tokens


def _check_loss(result: Quantized, options: QuantizeOptions, report: Report) -> None:
    if result.loss is None or result.loss <= options.max_loss:
        return
    worst = result.largest_error
    figures = (
        f"perplexity grows from {result.perplexity_before:.3f} to {result.perplexity_after:.3f}, by {result.loss:.1%}, "
        f"and {options.max_loss:.1%} is allowed (--max-loss)"
    )
    if options.force:
        report("warning", f"{figures}; published all the same")
        return
    raise MegatronError(
        f"{figures}; nothing was published" + (f"; the matrix that suffers most is {worst.name}" if worst else ""),
        hint="use more bits, smaller groups or --method gptq, keep what suffers with --ignore, or publish with --force",
    )


def _exp(loss: float) -> float:
    return exp(loss) if loss < 700 else float("inf")
