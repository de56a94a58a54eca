"""Writes the weights of a Hugging Face model folder, in files of limited size."""

import shutil
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_7b.config.schema import ModelConfig
from megatron_7b.conversion.folder_reader import INDEX_FILE, SINGLE_FILE
from megatron_7b.conversion.json_files import write_json
from megatron_7b.conversion.weights import plan_weights
from megatron_7b.errors import ConversionError

DEFAULT_MAX_SHARD_BYTES = 4 * 2**30
"""Largest weight file; also about the memory that writing takes."""


def write_weights(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    model: ModelConfig,
    vocab_size: int,
    dtype: torch.dtype,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> int:
    """Write safetensors files, and their index where there is more than one.

    Args:
        folder: An existing folder.
        tensors: Name and tensor in the order that `to_hugging_face` yields.
        model: Shape of the model, from which the division into files is known beforehand.
        vocab_size: True vocabulary size.
        dtype: Number format to store.
        max_shard_bytes: Largest file, unless a single tensor is larger.

    Returns:
        Bytes of all tensors.

    Raises:
        ConversionError: The disk has too little room.
    """
    sizes = weight_sizes(model, vocab_size, dtype)
    total = sum(sizes.values())
    check_free_space(folder, total)
    shards = assign_shards(sizes, max_shard_bytes)
    files = shard_file_names(len(shards))
    stream = iter(tensors)
    for file, names in zip(files, shards, strict=True):
        shard = {name: _storable(tensor, dtype) for name, tensor in (next(stream) for _ in names)}
        assert list(shard) == names, "the stream does not follow the plan"
        _save(shard, folder / file)
    assert next(stream, None) is None, "the stream is longer than the plan"
    if len(files) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def weight_sizes(model: ModelConfig, vocab_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the bytes of every Hugging Face tensor, in the order of the plan."""
    return {
        name: prod(shape) * dtype.itemsize
        for entry in plan_weights(model, vocab_size)
        for name, shape in zip(entry.hugging_face, entry.mapping.hugging_face_shapes, strict=True)
    }


def assign_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Divide tensors into files in their order, each file as full as fits."""
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def shard_file_names(num_shards: int) -> list[str]:
    """Return the names that transformers gives its files."""
    if num_shards == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05d}-of-{num_shards:05d}.safetensors" for number in range(1, num_shards + 1)]


def check_free_space(folder: Path, num_bytes: int) -> None:
    """Check that a file system has room.

    Raises:
        ConversionError: It has not.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ConversionError(
            f"{folder} needs {num_bytes / 2**30:.1f} GiB and the disk has {free / 2**30:.1f} GiB free",
            hint="free some space, or store --dtype bf16",
        )


def _save(shard: dict[str, Tensor], file: Path) -> None:
    file.touch()
    mode = file.stat().st_mode
    save_file(shard, file, metadata={"format": "pt"})
    file.chmod(mode)  # safetensors 0.8 makes files that only their owner can read


def _storable(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring a tensor into the form that safetensors stores: its own contiguous memory."""
    tensor = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    # Slices of one matrix share its storage, which safetensors refuses.
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
