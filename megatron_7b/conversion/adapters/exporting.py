"""From a checkpoint of an adapter to a PEFT folder, or with the base to a whole model, with proof of either."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_7b.checkpoint import Companions, Manifest, read_config, read_manifest
from megatron_7b.checkpoint.base import find_base
from megatron_7b.config.schema import RunConfig
from megatron_7b.conversion.adapters.config import write_peft_config
from megatron_7b.conversion.adapters.folder import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from megatron_7b.conversion.adapters.plan import AdapterPlan, plan_adapter, pruned, to_peft
from megatron_7b.conversion.families import FAMILIES
from megatron_7b.conversion.hf_config import check_exportable
from megatron_7b.conversion.hf_tokenizer import copy_tokenizer, give_back_tokenizer
from megatron_7b.conversion.json_files import write_json
from megatron_7b.conversion.progress import DtypeName, Report, describe_model, torch_dtype
from megatron_7b.conversion.staging import staged_folder
from megatron_7b.errors import ConversionError
from megatron_7b.model.fitting import check_conversion
from megatron_7b.runtime.process.logs import loading

if TYPE_CHECKING:
    from torch import Tensor

_NOT_LOW_RANK = {
    "bottleneck": "PEFT has no such adapter, and it cannot be merged as it is not linear",
}


@dataclass(frozen=True)
class AdapterSource:
    """A checkpoint of an adapter, with the model that it belongs to.

    Attributes:
        checkpoint: The checkpoint.
        base: That of the model.
        manifest: Of the adapter's.
        config: Of the run that trained it.
        plan: Its tensors.
    """

    checkpoint: Path
    base: Path
    manifest: Manifest
    config: RunConfig
    plan: AdapterPlan

    @classmethod
    def of(cls, checkpoint: Path, base: Path | None) -> "AdapterSource":
        """Open a checkpoint of an adapter.

        Args:
            checkpoint: The checkpoint.
            base: Where the model is now, if not where it was.

        Raises:
            CheckpointError: The model is not found.
            ConversionError: There is no such adapter elsewhere.
        """
        manifest, config = read_manifest(checkpoint), read_config(checkpoint)
        if config.adapter.method in _NOT_LOW_RANK:
            raise ConversionError(
                f"{checkpoint} holds an adapter of method {config.adapter.method}, which cannot be written: "
                f"{_NOT_LOW_RANK[config.adapter.method]}",
                hint="generate and evaluate take the checkpoint itself",
            )
        found = find_base(checkpoint, base, is_asked_for=base is not None)
        assert found is not None
        check_exportable(config.model)
        return cls(checkpoint, found, manifest, config, plan_adapter(config))


def export_adapter(
    source: AdapterSource, output: Path, *, base_name: str | None, parity_dtype: DtypeName, report: Report
) -> None:
    """Write an adapter as a PEFT folder, and publish it if it makes of the base what it does here.

    Args:
        source: The adapter.
        output: Folder to write, checked.
        base_name: What the base is called in adapter_config.json: a name on the hub, or a path.
        parity_dtype: Arithmetic of the comparison.
        report: Takes what is being done, and warnings.

    Raises:
        CheckpointError: A file is damaged.
        ConversionError: The adapter is not the same elsewhere; nothing was published.
    """
    started = time.perf_counter()
    model, vocab_size = source.config.model, source.manifest.vocab_size
    source.plan.check_modules_are_whole()
    check_conversion(model, vocab_size, parity_dtype)
    companions = Companions.of_checkpoint(source.checkpoint)
    with loading("torch and transformers"):
        from megatron_7b.checkpoint.weights import CheckpointWeights
        from megatron_7b.conversion.adapters.applying import has_peft
        from megatron_7b.conversion.adapters.reference_folder import reference_folder
        from megatron_7b.conversion.comparison import Comparison

    report("reading", f"{source.checkpoint}: {describe_adapter(source.config)}; base: {source.base}")
    with staged_folder(output) as staging, reference_folder(source.base, source.checkpoint, staging) as reference:
        tensors = dict(to_peft(source.plan, CheckpointWeights(source.checkpoint)))
        num_bytes = write_peft_folder(staging, source, tensors, base_name)
        if companions.tokenizer is not None:
            if not give_back_tokenizer(companions.tokenizer, reference, model_max_length=None):
                report(
                    "warning", "transformers' AutoTokenizer gives text other ids than the tokenizer of the checkpoint"
                )
            copy_tokenizer(reference, staging)
        if not has_peft():
            report("warning", "PEFT is not installed: the adapter is compared as its format says; pip install peft")
        comparison = Comparison(reference, model, vocab_size, torch_dtype(parity_dtype), adapter=staging)
        comparison.check(source.checkpoint, report)
    report("wrote", f"{output}: an adapter of {num_bytes / 1e6:.1f} MB, {time.perf_counter() - started:.1f} s")
    if base_name is None:
        report("base", "adapter_config.json names no base; --base-name NAME has AutoPeftModel find it")


def describe_adapter(config: RunConfig) -> str:
    """Name an adapter in one line."""
    adapter = config.adapter
    rank = adapter.initial_rank if adapter.method == "adalora" else adapter.rank
    return f"{adapter.method} of rank {rank} for {describe_model(config.model, config.model.vocab_size or 1)}"


def write_peft_folder(
    folder: Path, source: AdapterSource, tensors: "Mapping[str, Tensor]", base_name: str | None
) -> int:
    """Write adapter_config.json, adapter_model.safetensors and a README.

    Args:
        folder: An existing folder.
        source: The adapter.
        tensors: Whole tensors by name without PEFT's prefix.
        base_name: What the base is called.

    Returns:
        Bytes of all tensors.
    """
    from safetensors.torch import save_file

    plan, config = source.plan, source.config
    rank_pattern: dict[str, list[bool]] = {}
    if config.adapter.method == "adalora":
        tensors, rank_pattern = pruned(tensors)
    content = write_peft_config(
        config.adapter,
        kind=config.model.head if config.model.has_head else config.model.traits.kind,
        base=base_name,
        target_modules=plan.target_modules,
        modules_to_save=plan.modules_to_save,
        is_transposed=plan.is_transposed,
        rank_pattern=rank_pattern,
        total_step=config.training.train_steps,
    )
    write_json(folder / CONFIG_FILE, content)
    stored = {PREFIX + name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(stored, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / WEIGHTS_FILE).chmod((folder / CONFIG_FILE).stat().st_mode)
    (folder / "README.md").write_text(_readme(source, base_name), encoding="utf-8")
    return sum(tensor.nbytes for tensor in stored.values())


def _readme(source: AdapterSource, base_name: str | None) -> str:
    base, made = base_name or "BASE", f"megatron-7b {version('megatron-7b')}"
    front = ["library_name: peft", *([f"base_model: {base_name}"] if base_name else []), "tags:", "- lora"]
    text = f"An adapter ({describe_adapter(source.config)}), written by {made}: {source.manifest.counters.step} steps."
    auto_class = FAMILIES[source.config.model.architecture].auto_class
    code = [
        "from peft import PeftModel",
        f"from transformers import {auto_class}",
        "",
        f'model = PeftModel.from_pretrained({auto_class}.from_pretrained("{base}"), ".")',
    ]
    return "\n".join(["---", *front, "---", "", text, "", "```python", *code, "```", ""])
