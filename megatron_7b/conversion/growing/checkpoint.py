"""From a checkpoint to a larger model's, published if both compute the same where that is promised."""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_7b.checkpoint import Companions, read_config, read_manifest, resolve_checkpoint
from megatron_7b.checkpoint.base import check_is_whole
from megatron_7b.config import RunConfig
from megatron_7b.conversion.folder_reader import CONFIG_FILE, HuggingFaceFolder
from megatron_7b.conversion.growing.plan import GrowOptions, plan_growth
from megatron_7b.conversion.hf_config import from_hugging_face_config
from megatron_7b.conversion.importing import ImportOptions, import_from_hugging_face
from megatron_7b.conversion.progress import Report, describe_model, describe_output, tell_nobody, torch_dtype
from megatron_7b.conversion.replacing import check_replaces_import
from megatron_7b.conversion.resized import config_of_resized
from megatron_7b.conversion.staging import staged_folder, take_checkpoint
from megatron_7b.model.fitting import check_conversion
from megatron_7b.runtime.output_paths import check_new_folder
from megatron_7b.runtime.process.logs import loading

if TYPE_CHECKING:
    from megatron_7b.conversion.parity import Parity


@dataclass(frozen=True)
class GrownCheckpoint:
    """What came of it.

    Attributes:
        folder: The checkpoint.
        config: Its configuration: that of the run that trained the smaller model, with the larger one in it.
        parity: How far the logits of the two models are apart.
        preserves: Whether they are meant to be the same.
    """

    folder: Path
    config: RunConfig
    parity: "Parity"
    preserves: bool


def grow_checkpoint(
    checkpoint: Path, output: Path, options: GrowOptions, report: Report = tell_nobody
) -> GrownCheckpoint:
    """Write the checkpoint of a larger model that starts where a smaller one has got to.

    Unless layers are stacked, both compute the same logits, or nothing is published. Tokenizer and other companions go
    along; optimizer state and counters do not: a run that starts from the result begins at step 0.

    Args:
        checkpoint: A checkpoint of any layout, a folder that has one, or a Hugging Face folder.
        output: Checkpoint to write.
        options: What the model is to become.
        report: Takes what is being done, and warnings.

    Raises:
        CheckpointError: The checkpoint is missing or damaged.
        ConfigError: The model cannot become that, or the memory cannot hold it. All of this is checked before torch is
            imported.
        ConversionError: The models differ; nothing was published.
    """
    started = time.perf_counter()
    is_hugging_face = _is_hugging_face(checkpoint)
    source = checkpoint if is_hugging_face else resolve_checkpoint(checkpoint)
    check_new_folder(output, overwrite=options.overwrite, inputs=(source,))
    check_replaces_import(output)
    if is_hugging_face:
        plan_growth(from_hugging_face_config(HuggingFaceFolder(checkpoint).config), options)
        with _imported(checkpoint, output, report) as imported:
            return grow_checkpoint(imported, output, options, report)
    check_is_whole(source)
    manifest, config = read_manifest(source), read_config(source)
    growth = plan_growth(config.model, options)
    grown = config_of_resized(config, growth.target, report, size="larger")
    companions = Companions.of_checkpoint(source)
    check_conversion(growth.target, manifest.vocab_size, "fp32")

    # From here on torch and megatron-core are needed, which take seconds to import.
    with loading("torch and megatron-core"):
        from megatron_7b.checkpoint.weights import CheckpointWeights, write_weights
        from megatron_7b.conversion.growing.proof import Probe
        from megatron_7b.conversion.growing.weights import grow_weights
        from megatron_7b.conversion.growing.widening import Widening

    weights = CheckpointWeights(source)
    report("reading", f"{source}: {describe_model(config.model, manifest.vocab_size)}; written at {manifest.layout}")
    report("growing", f"{growth.describe()}: {describe_model(growth.target, manifest.vocab_size)}")
    stored = "bf16" if manifest.params_dtype == "bfloat16" and Widening(growth).is_exact_in_bf16 else "fp32"
    dtype = torch_dtype(stored)
    tensors = ((name, tensor.to(dtype)) for name, tensor in grow_weights(weights, growth, manifest.vocab_size))
    with staged_folder(output) as staging:
        probe = Probe(source, config, preserves=growth.preserves)
        take_checkpoint(staging, write_weights(staging, tensors, grown, companions=companions))
        parity = probe.check(staging, growth.target, report)
    num_bytes = sum(file.stat().st_size for file in output.glob("*.distcp"))
    report(
        "wrote", f"{output}: {describe_output(num_bytes, stored, time.perf_counter() - started)}; no optimizer state"
    )
    return GrownCheckpoint(output, grown, parity, growth.preserves)


def _is_hugging_face(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


@contextlib.contextmanager
def _imported(folder: Path, output: Path, report: Report) -> Iterator[Path]:
    """Import a Hugging Face folder beside the output, for the duration of a with block."""

    def but_what_was_written(topic: str, message: str) -> None:
        if topic != "wrote":
            report(topic, message)

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.imported-", dir=output.parent) as temporary:
        checkpoint = Path(temporary) / "checkpoint"
        import_from_hugging_face(folder, checkpoint, ImportOptions(), but_what_was_written)
        yield checkpoint
