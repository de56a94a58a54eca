"""A Hugging Face folder under the names that its tensors have today, whichever release and class wrote it."""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from megatron_7b.conversion.families import OtherNames
from megatron_7b.errors import ConversionError
from megatron_7b.model.parameters import Shape

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_7b.conversion.folder_reader import HuggingFaceFolder

_MOST_NAMED = 8


class CurrentNames(Mapping[str, "Tensor"]):
    """The tensors of a folder that its model has, by their current names.

    Args:
        folder: The folder.
        other_names: How it may differ.

    Attributes:
        shapes: Shape of every tensor.
        dtypes: Number format of every tensor.
        left: The folder's names of the tensors of heads that the model does not have.
        buffers: The folder's names of what every model computes by itself.
        lacking: Beginnings of the names of the model's heads that are missing as a whole.

    Raises:
        ConversionError: A tensor is there under two names.
    """

    def __init__(self, folder: "HuggingFaceFolder", other_names: OtherNames) -> None:
        self._folder = folder
        self._names: dict[str, str] = {}
        self.left: list[str] = []
        self.buffers: list[str] = []
        has_base = any(name.startswith(other_names.base) for name in folder)
        for name in folder:
            current = _current_name(name, other_names, has_base=has_base)
            if re.fullmatch(other_names.buffers, current):
                self.buffers.append(name)
            elif current.startswith(other_names.foreign_heads):
                self.left.append(name)
            elif current in self._names:
                raise ConversionError(f"{folder.path} has {current} under two names: {self._names[current]} and {name}")
            else:
                self._names[current] = name
        self.shapes: Mapping[str, Shape] = {current: folder.shapes[name] for current, name in self._names.items()}
        self.dtypes: Mapping[str, str] = {current: folder.dtypes[name] for current, name in self._names.items()}
        self.lacking = tuple(
            head for head in other_names.heads if not any(name.startswith(head) for name in self._names)
        )

    def __getitem__(self, name: str) -> "Tensor":
        """Read one tensor."""
        return self._folder[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        """Go through the names without reading tensors."""
        return iter(self._names)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self._names)

    def describe_left(self) -> str:
        """Return the tensors that are left out, in words."""
        more = len(self.left) - _MOST_NAMED
        return ", ".join(sorted(self.left)[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _current_name(name: str, other_names: OtherNames, *, has_base: bool) -> str:
    if not has_base and not name.startswith(other_names.heads):
        name = other_names.base + name
    for former, current in other_names.endings.items():
        if name.endswith(former):
            return name.removesuffix(former) + current
    return name
