"""From a Hugging Face folder to a checkpoint that any layout can train on, with proof that nothing changed."""

import tempfile
import time
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from megatron_7b.checkpoint.companions import Companions
from megatron_7b.config import DataConfig, PrecisionConfig, RunConfig, check_config
from megatron_7b.config.schema import ModelConfig, ObjectiveConfig
from megatron_7b.conversion.adapters.folder import is_peft_folder
from megatron_7b.conversion.adapters.importing import AdapterImport, import_adapter
from megatron_7b.conversion.companions import gather_companions
from megatron_7b.conversion.current_names import CurrentNames
from megatron_7b.conversion.families import FAMILIES
from megatron_7b.conversion.folder_reader import CONFIG_FILE, HuggingFaceFolder
from megatron_7b.conversion.fresh_head import fresh_shapes, fresh_tensors
from megatron_7b.conversion.hf_config import from_hugging_face_config
from megatron_7b.conversion.progress import DtypeName, Report, describe_model, describe_output, tell_nobody, torch_dtype
from megatron_7b.conversion.replacing import check_replaces_import
from megatron_7b.conversion.staging import staged_folder, take_checkpoint
from megatron_7b.conversion.weights import check_hugging_face_shapes, from_hugging_face
from megatron_7b.errors import ConfigError
from megatron_7b.model.fitting import check_conversion
from megatron_7b.model.parameters import Shape
from megatron_7b.model.starting_head import has_same_head
from megatron_7b.runtime.output_paths import check_new_folder
from megatron_7b.runtime.process.logs import loading
from megatron_7b.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

_EMBEDDING = "shared.weight"


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """How a folder is imported.

    Attributes:
        dtype: Stored number format; auto is BF16 if all of the input is, else FP32.
        parity_dtype: Arithmetic of the comparison.
        max_position_embeddings: Shortens the context; a window that is no shorter is left out. None keeps it.
        overwrite: Replace an earlier output of this command.
        head: Fields of the model section that put a head in the place of the output layer; a fresh one, unless the
            folder has the very same. None: what the folder has.
        seed: Of the run that trains what is fresh; None: the usual one.
        base: Of an adapter: the checkpoint or the folder of its model; None takes what the adapter names.
    """

    dtype: DtypeName = "auto"
    parity_dtype: DtypeName = "fp32"
    max_position_embeddings: int | None = None
    overwrite: bool = False
    head: Mapping[str, Any] | None = None
    seed: int | None = None
    base: Path | None = None


def import_from_hugging_face(
    source: str | Path, output: str | Path, options: ImportOptions | None = None, report: Report = tell_nobody
) -> None:
    """Write a Hugging Face folder as a checkpoint, and publish it if both models compute the same logits.

    What the folder holds beside weights goes along, for the exports of all runs that start from the checkpoint. A PEFT
    folder becomes a checkpoint of an adapter.

    Args:
        source: Folder with config.json and safetensors, or one that PEFT has saved.
        output: Checkpoint to write.
        options: How; None takes the defaults.
        report: Takes what is being done, and warnings.

    Raises:
        ConfigError: The memory cannot hold the model.
        ConversionError: The folder cannot be converted exactly, or the models differ; nothing was published. What
            needs no torch is checked before torch is imported.
    """
    started = time.perf_counter()
    if is_peft_folder(Path(source)):
        _import_adapter(Path(source), Path(output), options or ImportOptions(), report)
        return
    if options is not None and options.base is not None:
        raise ConfigError(f"{source} is no adapter, so it has no base", hint="leave out --base")
    folder, output, options = HuggingFaceFolder(Path(source)), Path(output), options or ImportOptions()
    check_new_folder(output, overwrite=options.overwrite, inputs=(folder.path,))
    check_replaces_import(output)
    found = from_hugging_face_config(folder.config, max_position_embeddings=options.max_position_embeddings)
    model = found if options.head is None else replace(found, add_binary_head=False, **options.head)
    family = FAMILIES[model.architecture]
    if family.output_layer is not None:
        is_tied = _is_tied(folder, family.output_layer)
        model = replace(model, share_embeddings_and_output_weights=is_tied)
    vocab_size = model.vocab_size
    assert vocab_size is not None
    weights = CurrentNames(folder, family.names_of(model, renews_head=not has_same_head(model, found)))
    fresh = fresh_shapes(model, vocab_size, weights.lacking) if weights.lacking else {}
    check_hugging_face_shapes({**weights.shapes, **fresh}, model, vocab_size)
    stored = _widest_dtype(weights) if options.dtype == "auto" else options.dtype
    config = _run_config(model, stored)
    check_config(config)
    check_conversion(model, vocab_size, stored, options.parity_dtype)
    report("reading", f"{folder.path}: {describe_model(model, vocab_size)}")
    _warn_of_heads(weights, fresh, report)

    # From here on torch, transformers and megatron-core are needed, which take seconds to import.
    with loading("torch and transformers"):
        from megatron_7b.checkpoint.weights import write_weights
        from megatron_7b.conversion.comparison import Comparison

    dtype = torch_dtype(stored)
    head = fresh_tensors(model, vocab_size, weights.lacking, seed=options.seed) if fresh else {}
    whole = from_hugging_face(ChainMap(head, cast("dict[str, Tensor]", weights)), model, vocab_size)
    tensors = ((name, tensor.to(dtype)) for name, tensor in whole)
    with staged_folder(output) as staging, tempfile.TemporaryDirectory() as temporary:
        companions = _gather(folder.path, Path(temporary), vocab_size, report)
        comparison = Comparison(
            folder.path,
            model,
            vocab_size,
            torch_dtype(options.parity_dtype),
            round_to=dtype,
            unused=[*weights.left, *weights.buffers],
            fresh=head,
        )
        take_checkpoint(staging, write_weights(staging, tensors, config, companions=companions))
        comparison.check(staging, report)
    num_bytes = sum(file.stat().st_size for file in output.glob("*.distcp"))
    report("wrote", f"{output}: {describe_output(num_bytes, stored, time.perf_counter() - started)}")


def _import_adapter(source: Path, output: Path, options: ImportOptions, report: Report) -> None:
    if options.dtype != "auto" or options.max_position_embeddings is not None:
        raise ConfigError(
            f"{source} is an adapter, which is stored as it is",
            hint="leave out --dtype and --max-position-embeddings, which are for whole models",
        )
    task = AdapterImport(
        folder=source,
        base=options.base,
        output=output,
        parity_dtype=options.parity_dtype,
        overwrite=options.overwrite,
    )

    def import_base(folder: Path, checkpoint: Path) -> None:
        of_base = ImportOptions(parity_dtype=options.parity_dtype, overwrite=options.overwrite)
        import_from_hugging_face(folder, checkpoint, of_base, report)

    import_adapter(task, import_base, report)


def _is_tied(folder: HuggingFaceFolder, output_layer: str) -> bool:
    """Whether a folder has no output layer beside its embedding, or the same one again.

    transformers 5 writes `tie_word_embeddings` true beside weights that it has kept apart, and reads them as such.
    """
    if output_layer not in folder:
        return True
    if folder.config.get("tie_word_embeddings") is False or _EMBEDDING not in folder:
        return False
    return folder.shapes[output_layer] == folder.shapes[_EMBEDDING] and folder[output_layer].equal(folder[_EMBEDDING])


def _warn_of_heads(weights: CurrentNames, fresh: Mapping[str, Shape], report: Report) -> None:
    if weights.left:
        report(
            "warning",
            f"these tensors belong to heads that the model does not have, and stay behind: {weights.describe_left()}",
        )
    if fresh:
        report(
            "warning",
            "the folder lacks these tensors of the model's head, so the checkpoint gets fresh ones, to be trained: "
            f"{', '.join(fresh)}",
        )


def _widest_dtype(folder: CurrentNames) -> DtypeName:
    """BF16 if everything is; else FP32, which holds FP16 and BF16 exactly."""
    return "bf16" if set(folder.dtypes.values()) == {"BF16"} else "fp32"


def _run_config(model: ModelConfig, dtype: DtypeName) -> RunConfig:
    """A configuration that trains the model as it is stored, on one rank until told otherwise."""
    return RunConfig(
        model=model,
        objective=ObjectiveConfig(sentence_pairs="next_sentence" if model.add_binary_head else "none"),
        precision=PrecisionConfig(params_dtype="bf16" if dtype == "bf16" else "fp32"),
        data=DataConfig(seq_length=min(DataConfig().seq_length, model.max_position_embeddings)),
    )


def _gather(source: Path, target: Path, vocab_size: int, report: Report) -> Companions:
    """Gather the companions, and warn of what is wrong with the tokenizer."""
    gathered = gather_companions(source, target)
    if gathered.left:
        report("warning", f"of {source} these stay behind: {', '.join(gathered.left)}")
    if gathered.companions.tokenizer is None:
        report("warning", f"{source} has no tokenizer, so the checkpoint carries none")
        return gathered.companions
    tokenizer = load_tokenizer(source)
    if load_tokenizer(gathered.companions.tokenizer).identity != tokenizer.identity:
        (gathered.companions.tokenizer / CONFIG_FILE).unlink()  # what is saved needs no other file to decide its ids
        tokenizer.save(gathered.companions.tokenizer)
    if tokenizer.kind == "hugging_face" and tokenizer.origin != "tokenizer.json":
        report("tokens", f"the ids are those of {tokenizer.origin}")
    if tokenizer.vocab_size > vocab_size:
        last = tokenizer.vocab_size - 1
        report("warning", f"the tokenizer has ids up to {last}, the model embeddings for {vocab_size} tokens")
    return gathered.companions
