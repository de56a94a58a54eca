"""From a checkpoint of any layout to a Hugging Face folder, with proof that nothing changed."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_7b.checkpoint import Companions, Manifest, read_config, read_manifest, resolve_checkpoint
from megatron_7b.checkpoint.base import weights_identity
from megatron_7b.config.schema import ModelConfig
from megatron_7b.conversion.adapters.exporting import AdapterSource, describe_adapter, export_adapter
from megatron_7b.conversion.adapters.headed_base import base_with_head
from megatron_7b.conversion.adapters.merging import merged_weights
from megatron_7b.conversion.adapters.plan import to_peft
from megatron_7b.conversion.companions import give_back_companions, imported_config
from megatron_7b.conversion.hf_config import check_exportable
from megatron_7b.conversion.hf_tokenizer import give_back_tokenizer
from megatron_7b.conversion.model_card import kept_card_figures, read_card_figures, write_model_card
from megatron_7b.conversion.progress import DtypeName, Report, describe_model, describe_output, tell_nobody, torch_dtype
from megatron_7b.conversion.replacing import check_replaces_adapter, check_replaces_export
from megatron_7b.conversion.sentence_transformers import write_sentence_transformers
from megatron_7b.conversion.staging import staged_folder
from megatron_7b.conversion.weights import to_hugging_face
from megatron_7b.errors import ConfigError, ConversionError
from megatron_7b.model.fitting import check_conversion
from megatron_7b.runtime.output_paths import check_new_folder
from megatron_7b.runtime.process.logs import loading

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How a checkpoint is exported.

    Attributes:
        dtype: Stored number format; auto is the checkpoint's.
        parity_dtype: Arithmetic of the comparison.
        max_shard_bytes: Largest weight file, and about the memory that writing takes.
        allow_other_token_ids: Publish even if transformers gives text other ids than the checkpoint's tokenizer.
        overwrite: Replace an earlier output of this command.
        merge: Of a checkpoint of an adapter, write the whole model with the adapter in its weights.
        base: Of a checkpoint of an adapter: where its model is now, if not where it was.
        base_name: Of a checkpoint of an adapter: what adapter_config.json calls the base.
        results: Files of evaluations, for a model card; none: what `evaluate --keep` has kept, if there is any.
    """

    dtype: DtypeName = "auto"
    parity_dtype: DtypeName = "fp32"
    max_shard_bytes: int = 4 * 2**30
    allow_other_token_ids: bool = False
    overwrite: bool = False
    merge: bool = False
    base: Path | None = None
    base_name: str | None = None
    results: tuple[Path, ...] = ()


def export_to_hugging_face(
    checkpoint: str | Path, output: str | Path, options: ExportOptions | None = None, report: Report = tell_nobody
) -> None:
    """Write a checkpoint as a Hugging Face folder, and publish it if both models compute the same logits.

    A checkpoint of an adapter becomes a PEFT folder, or with `merge` a whole model.

    Args:
        checkpoint: A checkpoint, or a folder that has one.
        output: Folder to write.
        options: How; None takes the defaults.
        report: Takes what is being done, and warnings.

    Raises:
        CheckpointError: The checkpoint is missing or damaged.
        ConfigError: The memory cannot hold the model.
        ConversionError: No Hugging Face architecture computes what the model computes, the models differ, or
            transformers would give text other ids; nothing was published. What needs no torch is checked before torch
            is imported.
    """
    started = time.perf_counter()
    checkpoint, output, options = resolve_checkpoint(Path(checkpoint)), Path(output), options or ExportOptions()
    check_new_folder(output, overwrite=options.overwrite, inputs=(checkpoint,))
    manifest, config = read_manifest(checkpoint), read_config(checkpoint)
    identity = weights_identity(manifest)
    figures = read_card_figures(options.results, identity)
    model, source = config.model, None
    if manifest.base is not None:
        source = AdapterSource.of(checkpoint, options.base)
    check_options_of_adapters(checkpoint, source, options)
    if source is not None and not options.merge:
        check_replaces_adapter(output)
        export_adapter(source, output, base_name=options.base_name, parity_dtype=options.parity_dtype, report=report)
        return
    check_replaces_export(output)
    companions = Companions.of_checkpoint(checkpoint)
    check_exportable(model)
    check_conversion(model, manifest.vocab_size, options.parity_dtype)

    # From here on torch, transformers and megatron-core are needed, which take seconds to import.
    with loading("torch and transformers"):
        from megatron_7b.conversion.comparison import Comparison
        from megatron_7b.conversion.folder_writer import write_weights

    weights, params_dtype = _weights(checkpoint, manifest, model, source)
    dtype = torch_dtype(params_dtype if options.dtype == "auto" else options.dtype)
    report("reading", f"{checkpoint}: {describe_model(model, manifest.vocab_size)}; written at {manifest.layout}")
    if source is not None:
        report("merging", f"{describe_adapter(config)}; base: {source.base}")
    with staged_folder(output) as staging:
        num_bytes = write_weights(
            staging,
            weights,
            model=model,
            vocab_size=manifest.vocab_size,
            dtype=dtype,
            max_shard_bytes=options.max_shard_bytes,
        )
        give_back_companions(companions, staging, model=model, vocab_size=manifest.vocab_size, dtype=_spelled(dtype))
        _give_back_tokenizer(companions, staging, model, options, report)
        if config.objective_name == "embedding":
            write_sentence_transformers(staging, config)
        figures = figures or kept_card_figures(checkpoint, identity, report)
        if figures:
            write_model_card(staging, output.resolve().name, model.head, figures)
        comparison = Comparison(staging, model, manifest.vocab_size, torch_dtype(options.parity_dtype))
        comparison.check(checkpoint, report, round_to=dtype, merged=source is not None)
    stored = "bf16" if _spelled(dtype) == "bfloat16" else "fp32"
    report("wrote", f"{output}: {describe_output(num_bytes, stored, time.perf_counter() - started)}")


def check_options_of_adapters(checkpoint: Path, source: AdapterSource | None, options: ExportOptions) -> None:
    """Refuse options that say nothing about what is exported.

    Raises:
        ConfigError: There are such.
    """
    given = {"--merge": options.merge, "--base": options.base is not None, "--base-name": options.base_name is not None}
    if source is None:
        unfit = [name for name, is_given in given.items() if is_given]
        if unfit:
            raise ConfigError(f"{checkpoint} holds a whole model, so there is nothing for {' and '.join(unfit)}")
    elif options.results and not options.merge:
        raise ConfigError("a model card is for whole models", hint="leave out --results, or add --merge")
    elif options.merge and options.base_name is not None:
        raise ConfigError("a merged model names no base", hint="leave out --base-name, or --merge")
    elif not options.merge and options.dtype != "auto":
        raise ConfigError(
            f"--dtype {options.dtype} is for whole models: an adapter is written as it was trained",
            hint="leave it out, or add --merge",
        )


def _weights(
    checkpoint: Path, manifest: Manifest, model: ModelConfig, source: AdapterSource | None
) -> "tuple[Iterator[tuple[str, Tensor]], str]":
    """Return the tensors of the whole model under Hugging Face's names, and the number format of most of them."""
    from megatron_7b.checkpoint.weights import CheckpointWeights

    if source is None:
        return to_hugging_face(CheckpointWeights(checkpoint), model, manifest.vocab_size), manifest.params_dtype
    own = to_hugging_face(base_with_head(source.base, checkpoint, model), model, manifest.vocab_size)
    adapter = dict(to_peft(source.plan, CheckpointWeights(checkpoint)))
    merged = merged_weights(own, adapter, source.config.adapter, is_transposed=source.plan.is_transposed)
    return merged, read_manifest(source.base).params_dtype


def _spelled(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")


def _give_back_tokenizer(
    companions: Companions, staging: Path, model: ModelConfig, options: ExportOptions, report: Report
) -> None:
    if companions.tokenizer is None:
        report("warning", "the checkpoint carries no tokenizer, so the folder has none")
        return
    imported = imported_config(companions)
    context = model.max_position_embeddings
    is_as_imported = imported is not None and imported.get("max_position_embeddings") == context
    if model.traits.position_embedding_type == "relative":
        is_as_imported = True  # there is no longest text
    problem = "transformers' AutoTokenizer gives text other ids than the tokenizer of the checkpoint, in whatever form"
    try:
        if give_back_tokenizer(companions.tokenizer, staging, model_max_length=None if is_as_imported else context):
            return
    except ConversionError as error:
        problem = str(error).partition("\nhint:")[0]
    if not options.allow_other_token_ids:
        raise ConversionError(
            f"{problem}: a model that is used with other ids than it has learnt from gives worse text",
            hint="--allow-other-token-ids publishes it all the same",
        )
    report("warning", problem)
