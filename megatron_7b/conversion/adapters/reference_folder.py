"""The base of an adapter as a Hugging Face folder for the time of a comparison."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_7b.checkpoint import Companions, read_config, read_manifest
from megatron_7b.conversion.adapters.headed_base import base_with_head
from megatron_7b.conversion.companions import give_back_companions
from megatron_7b.conversion.folder_writer import DEFAULT_MAX_SHARD_BYTES, write_weights
from megatron_7b.conversion.progress import torch_dtype
from megatron_7b.conversion.weights import to_hugging_face


@contextlib.contextmanager
def reference_folder(base: Path, checkpoint: Path, beside: Path) -> Iterator[Path]:
    """Write a checkpoint as a Hugging Face folder that is there for the duration of a with block.

    Args:
        base: A complete checkpoint of a whole model.
        checkpoint: That of the adapter; if it has a head, so has the folder.
        beside: The folder is made beside this one, where there is room for weights.

    Yields:
        The folder; it has no tokenizer.

    Raises:
        CheckpointError: The checkpoint is damaged.
        ConversionError: The disk has too little room.
    """
    folder = beside.with_name(f"{beside.name}.base")
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    folder.mkdir()
    try:
        manifest, model = read_manifest(base), read_config(base).model
        adapted = read_config(checkpoint).model
        model = adapted if adapted.has_head else model
        write_weights(
            folder,
            to_hugging_face(base_with_head(base, checkpoint, model), model, manifest.vocab_size),
            model=model,
            vocab_size=manifest.vocab_size,
            dtype=torch_dtype(manifest.params_dtype),
            max_shard_bytes=DEFAULT_MAX_SHARD_BYTES,
        )
        give_back_companions(
            Companions.of_checkpoint(base),
            folder,
            model=model,
            vocab_size=manifest.vocab_size,
            dtype="bfloat16" if manifest.params_dtype == "bfloat16" else "float32",
        )
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
