"""From a checkpoint of any layout to a Hugging Face folder, with proof that nothing changed."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_7b.checkpoint import Companions, read_config, read_manifest, resolve_checkpoint
from megatron_7b.checkpoint.base import check_is_whole
from megatron_7b.config.schema import ModelConfig
from megatron_7b.conversion.companions import give_back_companions, imported_config
from megatron_7b.conversion.hf_config import check_exportable
from megatron_7b.conversion.hf_tokenizer import give_back_tokenizer
from megatron_7b.conversion.progress import DtypeName, Report, describe_model, describe_output, tell_nobody, torch_dtype
from megatron_7b.conversion.replacing import check_replaces_export
from megatron_7b.conversion.staging import staged_folder
from megatron_7b.conversion.weights import to_hugging_face
from megatron_7b.errors import ConversionError
from megatron_7b.model.fitting import check_conversion
from megatron_7b.runtime.output_paths import check_new_folder
from megatron_7b.runtime.process.logs import loading

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How a checkpoint is exported.

    Attributes:
        dtype: Stored number format; auto is the checkpoint's.
        parity_dtype: Arithmetic of the comparison.
        max_shard_bytes: Largest weight file, and about the memory that writing takes.
        allow_other_token_ids: Publish even if transformers gives text other ids than the checkpoint's tokenizer.
        overwrite: Replace an earlier output of this command.
    """

    dtype: DtypeName = "auto"
    parity_dtype: DtypeName = "fp32"
    max_shard_bytes: int = 4 * 2**30
    allow_other_token_ids: bool = False
    overwrite: bool = False


def export_to_hugging_face(
    checkpoint: str | Path, output: str | Path, options: ExportOptions | None = None, report: Report = tell_nobody
) -> None:
    """Write a checkpoint as a Hugging Face folder, and publish it if both models compute the same logits.

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
    check_replaces_export(output)
    check_is_whole(checkpoint)
    manifest, model = read_manifest(checkpoint), read_config(checkpoint).model
    companions = Companions.of_checkpoint(checkpoint)
    check_exportable(model)
    check_conversion(model, manifest.vocab_size, options.parity_dtype)

    # From here on torch, transformers and megatron-core are needed, which take seconds to import.
    with loading("torch and transformers"):
        from megatron_7b.checkpoint.weights import CheckpointWeights
        from megatron_7b.conversion.comparison import Comparison
        from megatron_7b.conversion.folder_writer import write_weights

    dtype = torch_dtype(manifest.params_dtype if options.dtype == "auto" else options.dtype)
    weights = CheckpointWeights(checkpoint)
    report("reading", f"{checkpoint}: {describe_model(model, manifest.vocab_size)}; written at {manifest.layout}")
    with staged_folder(output) as staging:
        num_bytes = write_weights(
            staging,
            to_hugging_face(weights, model, manifest.vocab_size),
            model=model,
            vocab_size=manifest.vocab_size,
            dtype=dtype,
            max_shard_bytes=options.max_shard_bytes,
        )
        give_back_companions(companions, staging, model=model, vocab_size=manifest.vocab_size, dtype=_spelled(dtype))
        _give_back_tokenizer(companions, staging, model, options, report)
        comparison = Comparison(staging, model, manifest.vocab_size, torch_dtype(options.parity_dtype))
        comparison.check(checkpoint, report, round_to=dtype)
    stored = "bf16" if _spelled(dtype) == "bfloat16" else "fp32"
    report("wrote", f"{output}: {describe_output(num_bytes, stored, time.perf_counter() - started)}")


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
