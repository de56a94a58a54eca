"""From a PEFT folder and its base to a checkpoint of an adapter, with proof that it makes of the base what it did."""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_7b.checkpoint import Companions, read_config, read_manifest, resolve_checkpoint
from megatron_7b.checkpoint.base import describe_base
from megatron_7b.config import RunConfig, check_config
from megatron_7b.config.adapters import AdapterConfig
from megatron_7b.conversion.adapters.exporting import describe_adapter
from megatron_7b.conversion.adapters.folder import PeftFolder
from megatron_7b.conversion.adapters.names import modules_of, shortest_names
from megatron_7b.conversion.adapters.plan import adapted_modules, check_peft_shapes, from_peft, plan_adapter
from megatron_7b.conversion.progress import DtypeName, Report, torch_dtype
from megatron_7b.conversion.replacing import check_replaces_import
from megatron_7b.conversion.staging import staged_folder, take_checkpoint
from megatron_7b.errors import ConfigError, ConversionError, PathError
from megatron_7b.files import remove_any
from megatron_7b.model.fitting import check_conversion
from megatron_7b.model.kinds import parameter_table
from megatron_7b.runtime.output_paths import check_new_folder
from megatron_7b.runtime.process.logs import loading

type ImportBase = Callable[[Path, Path], None]
"""Imports a Hugging Face folder as a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class AdapterImport:
    """What is imported, and where to.

    Attributes:
        folder: PEFT folder.
        base: The model that it belongs to: a checkpoint, or a Hugging Face folder; None: what the folder names.
        output: Checkpoint to write.
        parity_dtype: Arithmetic of the comparison.
        overwrite: Replace an earlier output of this command.
    """

    folder: Path
    base: Path | None
    output: Path
    parity_dtype: DtypeName
    overwrite: bool


def import_adapter(task: AdapterImport, import_base: ImportBase, report: Report) -> None:
    """Write a PEFT folder as a checkpoint of an adapter, and publish it if it makes of the base what PEFT makes of it.

    A base that is a Hugging Face folder is imported first, as a checkpoint beside the output.

    Args:
        task: What is imported, and where to.
        import_base: Called for such a base.
        report: Takes what is being done, and warnings.

    Raises:
        CheckpointError: The base is damaged, or not a whole model.
        ConfigError: There is no base.
        ConversionError: The adapter cannot be converted exactly, does not fit the base, or the models differ; the
            adapter was not published.
    """
    started, folder = time.perf_counter(), PeftFolder(task.folder)
    named = task.base or _named_base(folder)
    check_new_folder(task.output, overwrite=task.overwrite, inputs=(folder.path, named))
    check_replaces_import(task.output)
    with contextlib.ExitStack() as undone:
        base = _checkpoint_of(named, task, import_base, report, undone)
        _import_beside(folder, base, task, report)
        undone.pop_all()
    report("wrote", f"{task.output}: {time.perf_counter() - started:.1f} s")


def _import_beside(folder: PeftFolder, base: Path, task: AdapterImport, report: Report) -> None:
    """Write an adapter beside a base that is a checkpoint; raises as `import_adapter`."""
    config = _adapter_config(folder, base)
    plan = plan_adapter(config)
    check_peft_shapes(folder.unpruned_shapes, plan, ties_copies=folder.config.ties_copies)
    assert config.model.vocab_size is not None
    check_conversion(config.model, config.model.vocab_size, task.parity_dtype)
    report("reading", f"{folder.path}: {describe_adapter(config)}; base: {base}")

    with loading("torch and transformers"):
        from megatron_7b.checkpoint.weights import write_weights
        from megatron_7b.conversion.adapters.reference_folder import reference_folder
        from megatron_7b.conversion.comparison import Comparison

    record = describe_base(base)
    seen = replace(record, relative_path=os.path.relpath(record.path, task.output.resolve()))
    with staged_folder(task.output) as staging:
        written = write_weights(
            staging, from_peft(plan, folder.unpruned()), config, companions=Companions.of_checkpoint(base), base=seen
        )
        take_checkpoint(staging, written)
        with reference_folder(base, base, staging) as reference:
            arithmetic = torch_dtype(task.parity_dtype)
            comparison = Comparison(reference, config.model, config.model.vocab_size, arithmetic, adapter=folder.path)
        comparison.check(staging, report)


def _named_base(folder: PeftFolder) -> Path:
    """Return the base that adapter_config.json names, if that is a folder here."""
    named = folder.config.base
    if named is not None and Path(named).is_dir():
        return Path(named)
    what = "no base" if named is None else f"the base {named}, which is no folder here"
    raise ConfigError(
        f"{folder.path} names {what}",
        hint="--base names the model that the adapter belongs to: a checkpoint or a folder",
    )


def _checkpoint_of(
    named: Path, task: AdapterImport, import_base: ImportBase, report: Report, undone: contextlib.ExitStack
) -> Path:
    """Return a base as a checkpoint; one that had to be made goes again if `undone` is closed."""
    if not named.exists():
        raise PathError(f"--base is {named}, which does not exist")
    if not (named / "config.json").is_file():
        return resolve_checkpoint(named)
    output = task.output.resolve()
    checkpoint = output.with_name(f"{output.name}.base")
    report("base", f"{named} is imported as {checkpoint}")
    import_base(named, checkpoint)
    undone.callback(remove_any, checkpoint)
    return checkpoint


def _adapter_config(folder: PeftFolder, base: Path) -> RunConfig:
    """Return the configuration of a run that trains the adapter further.

    Raises:
        ConversionError: The base has no modules of the adapter's names.
    """
    config, vocab_size = read_config(base), read_manifest(base).vocab_size
    table = parameter_table(config.model, vocab_size)
    everything = modules_of(table.values())
    adapted = adapted_modules(folder)
    saved = {name.rpartition(".")[0] for name in folder if ".lora_" not in name}
    if unknown := sorted((adapted | saved) - everything):
        raise ConversionError(
            f"{folder.path} has tensors for {', '.join(unknown[:4])}{', …' if len(unknown) > 4 else ''}, which the "
            f"base {base} does not have",
            hint="the adapter belongs to another model",
        )
    adapter: AdapterConfig = replace(
        folder.config.adapter,
        target_modules=tuple(shortest_names(adapted, everything)),
        modules_to_save=tuple(shortest_names(saved, everything)),
    )
    checkpoint = replace(config.checkpoint, initialize_from=str(base))
    total, training = folder.config.total_step, config.training
    if total is not None:  # AdaLoRA's schedule was made for so many steps
        training = replace(training, train_steps=total)
    made = replace(config, adapter=adapter, checkpoint=checkpoint, training=training)
    check_config(made)
    return made
