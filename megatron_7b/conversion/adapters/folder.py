"""A PEFT folder: adapter_config.json and adapter_model.safetensors. Opening one needs no torch."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError, safe_open

from megatron_7b.conversion.adapters.config import PeftConfig, read_peft_config
from megatron_7b.conversion.json_files import read_json
from megatron_7b.errors import ConversionError, PathError
from megatron_7b.files import LFS_HINT, is_lfs_pointer
from megatron_7b.model.parameters import Shape

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Begins the name of every tensor: PEFT's two wrappers around the model of transformers."""


def is_peft_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


class PeftFolder(Mapping[str, "Tensor"]):
    """Tensors of a folder by the name that the base's module gives them, each read when it is asked for.

    Attributes:
        path: The folder.
        config: What adapter_config.json says.
        shapes: Shape of every tensor.
        dtypes: Number format of every tensor, in safetensors' spelling.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a folder.

        Raises:
            ConversionError: A file is missing, damaged or not in safetensors, or the adapter is of a kind that
                cannot be converted.
        """
        self.path = Path(path)
        if not (self.path / CONFIG_FILE).is_file():
            raise PathError(f"{self.path} has no {CONFIG_FILE}", hint="give the folder that PEFT has saved")
        self.config: PeftConfig = read_peft_config(read_json(self.path / CONFIG_FILE))
        self._opened: Any = None
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        self._read_header()

    def __getitem__(self, name: str) -> "Tensor":
        """Read one tensor."""
        if name not in self.shapes:
            raise KeyError(name)
        if self._opened is None:
            self._opened = safe_open(self.path / WEIGHTS_FILE, framework="pt")
        return cast("Tensor", self._opened.get_tensor(PREFIX + name))

    def __iter__(self) -> Iterator[str]:
        """Go through the names without reading tensors."""
        return iter(self.shapes)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self.shapes)

    @property
    def unpruned_shapes(self) -> dict[str, Shape]:
        """Shapes with all initial ranks of AdaLoRA."""
        rank = self.config.adapter.initial_rank
        if self.config.adapter.method != "adalora":
            return self.shapes
        return {name: _with_rank(name, shape, rank) for name, shape in self.shapes.items()}

    def unpruned(self) -> "Mapping[str, Tensor]":
        """Return the tensors with all initial ranks of AdaLoRA: those that were taken away are zero."""
        if not self.config.rank_pattern:
            return self
        return {name: self._unpruned(name) for name in self}

    def _unpruned(self, name: str) -> "Tensor":
        import torch

        module, separator, end = name.partition(".lora_")
        kept = self.config.rank_pattern.get(f"{module}.lora_E")
        tensor = self[name]
        if not separator or kept is None:
            return tensor
        rank = self.config.adapter.initial_rank
        whole = torch.zeros(_with_rank(name, tuple(tensor.shape), rank), dtype=tensor.dtype)
        whole.index_copy_(1 if end.startswith("B") else 0, torch.tensor(kept).nonzero()[:, 0], tensor)
        return whole

    def _read_header(self) -> None:
        file = self.path / WEIGHTS_FILE
        if not file.is_file():
            pickled = (self.path / "adapter_model.bin").is_file()
            raise ConversionError(
                f"{self.path} has no {WEIGHTS_FILE}",
                hint="its adapter_model.bin is a pickle, which can run code when it is opened; where you trust it, "
                "load it with PEFT and save it again"
                if pickled
                else "the folder was not copied completely",
            )
        try:
            header: Any = safe_open(file, framework="np")  # which reads the header without importing torch
        except (OSError, SafetensorError) as error:
            hint = LFS_HINT if is_lfs_pointer(file) else "the file was not copied completely"
            raise ConversionError(f"{file} cannot be read: {error}", hint=hint) from error
        foreign = sorted(name for name in header.keys() if not name.startswith(PREFIX))  # noqa: SIM118 - no mapping
        if foreign:
            raise ConversionError(
                f"{file} holds {foreign[0]}, expected names that begin with {PREFIX}", hint="it was not saved by PEFT"
            )
        for name in sorted(header.keys()):
            tensor = header.get_slice(name)
            self.shapes[name.removeprefix(PREFIX)] = tuple(tensor.get_shape())
            self.dtypes[name.removeprefix(PREFIX)] = tensor.get_dtype()


def _with_rank(name: str, shape: Shape, rank: int) -> Shape:
    """Return the shape of a tensor of AdaLoRA with another rank."""
    if name.endswith((".lora_A", ".lora_E")):
        return (rank, *shape[1:])
    return (*shape[:1], rank) if name.endswith(".lora_B") else shape
