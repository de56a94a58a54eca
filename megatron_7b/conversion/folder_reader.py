"""A Hugging Face model folder as a lazy mapping from tensor name to tensor."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_7b.errors import ConversionError, PathError
from megatron_7b.model.parameters import Shape

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES = ("F32", "BF16", "F16", "F64")


class HuggingFaceFolder(Mapping[str, Tensor]):
    """Tensors of a folder by name, each read from disk when it is asked for.

    The headers of all files are read and checked at once; a cut or foreign file is noticed before anything is
    converted. No pickle is ever opened.

    Attributes:
        path: The folder.
        config: Parsed config.json.
        shapes: Shape of every tensor.
        dtypes: Number format of every tensor, in safetensors' spelling ("F32", "BF16", "F16").
    """

    def __init__(self, path: str | Path) -> None:
        """Open a folder.

        Raises:
            ConversionError: The folder, its config.json or its weights are missing, damaged or not in safetensors.
        """
        self.path = Path(path)
        if not self.path.is_dir():
            raise PathError(f"{self.path} is not a folder", hint="give the folder that holds config.json")
        self.config = _read_config(self.path)
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        self._files: dict[str, Any] = {}
        for file, expected in _weight_files(self.path).items():
            self._add_file(file, expected)
        _check_dtypes(self.dtypes)

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor."""
        return cast(Tensor, self._files[name].get_tensor(name))

    def __iter__(self) -> Iterator[str]:
        """Go through the names without reading tensors."""
        return iter(self.shapes)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self.shapes)

    def _add_file(self, file: Path, expected: frozenset[str] | None) -> None:
        try:
            opened: Any = safe_open(file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ConversionError(
                f"{file} cannot be read: {error}", hint="the file is missing or was not copied completely"
            ) from error
        names = set(opened.keys())
        if expected is not None and names != expected:
            raise ConversionError(
                f"{file} does not hold what {INDEX_FILE} says: {sorted(names ^ expected)[:3]} differ",
                hint="files of two exports were mixed",
            )
        for name in names:
            header = opened.get_slice(name)
            self.shapes[name] = tuple(header.get_shape())
            self.dtypes[name] = header.get_dtype()
            self._files[name] = opened


def read_json(file: Path) -> dict[str, object]:
    """Read a file that holds one JSON object.

    Raises:
        ConversionError: It is missing or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PathError(f"{file} is missing") from None
    except (OSError, ValueError) as error:
        raise ConversionError(f"{file} is not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{file} holds a {type(content).__name__}, expected a JSON object")
    return content


def _read_config(folder: Path) -> dict[str, object]:
    if not (folder / CONFIG_FILE).is_file() and (folder / "adapter_config.json").is_file():
        raise ConversionError(
            f"{folder} holds an adapter, not a model", hint="merge the adapter into its base model and convert that"
        )
    return read_json(folder / CONFIG_FILE)


def _weight_files(folder: Path) -> dict[Path, frozenset[str] | None]:
    """Files of the weights, each with the names that the index promises (None without an index)."""
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ConversionError(f"{folder / INDEX_FILE} has no weight_map from names to files")
        names: dict[Path, set[str]] = {}
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise ConversionError(f"{folder / INDEX_FILE} points outside its folder: {file!r}")
            names.setdefault(folder / file, set()).add(name)
        return {file: frozenset(expected) for file, expected in names.items()}
    if (folder / SINGLE_FILE).is_file():
        return {folder / SINGLE_FILE: None}
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ConversionError(
            f"{folder} holds only pickled weights ({', '.join(pickles[:3])}), which can run code when they are opened",
            hint="where you trust them, let transformers write safetensors: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)",
        )
    raise PathError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def _check_dtypes(dtypes: Mapping[str, str]) -> None:
    foreign = sorted(f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype not in _DTYPES)
    if foreign:
        raise ConversionError(
            f"{len(foreign)} tensors are not floating-point numbers of 16 bits or more: {', '.join(foreign[:3])}",
            hint="quantised weights are not converted, use the original ones",
        )
