"""Safetensors files of limited size, from tensors of which nobody knows beforehand how many there will be."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_7b.conversion.folder_reader import INDEX_FILE
from megatron_7b.conversion.folder_writer import shard_file_names
from megatron_7b.conversion.json_files import write_json


class ShardWriter:
    """Collects tensors, and writes a file whenever it is full.

    Args:
        folder: An existing folder.
        max_shard_bytes: Largest file, unless a single tensor is larger.

    Attributes:
        num_bytes: Of all tensors so far.
    """

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self._folder, self._max_shard_bytes = folder, max_shard_bytes
        self._waiting: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self.num_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; it is copied if it is part of another one."""
        waiting = sum(one.nbytes for one in self._waiting.values())
        if self._waiting and waiting + tensor.nbytes > self._max_shard_bytes:
            self._write()
        stored = tensor.detach().to("cpu").contiguous()
        whole = stored.untyped_storage().nbytes() == stored.nbytes
        self._waiting[name] = stored if whole else stored.clone()
        self.num_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write what waits, and the index if there are several files."""
        self._write()
        files = shard_file_names(len(self._shards))
        for number, file in enumerate(files):
            self._part(number).rename(self._folder / file)
        if len(files) > 1:
            weight_map = {name: file for file, names in zip(files, self._shards, strict=True) for name in names}
            write_json(
                self._folder / INDEX_FILE, {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
            )

    def _write(self) -> None:
        if self._waiting:
            file = self._part(len(self._shards))
            file.touch()
            mode = file.stat().st_mode
            with torch.inference_mode():
                save_file(self._waiting, file, metadata={"format": "pt"})
            file.chmod(mode)  # safetensors 0.8 makes files that only their owner can read
            self._shards.append(list(self._waiting))
            self._waiting = {}

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:05d}"
