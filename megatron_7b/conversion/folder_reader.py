"""A Hugging Face model folder as a lazy mapping from tensor name to tensor. Opening it needs no torch."""

from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError, safe_open

from megatron_7b.conversion.families import FAMILIES
from megatron_7b.conversion.json_files import read_json
from megatron_7b.errors import ConversionError, PathError
from megatron_7b.files import LFS_HINT, is_lfs_pointer
from megatron_7b.model.parameters import Shape

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_INTEGER_BUFFERS = (".attn.bias", ".position_ids")
"""Masks and positions in old folders of GPT-2 and BERT, which are no weights."""
_DTYPES = ("F32", "BF16", "F16", "F64")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class HuggingFaceFolder(Mapping[str, "Tensor"]):
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
        self._files: dict[str, Path] = {}
        self._opened: dict[Path, Any] = {}
        for file, expected in _weight_files(self.path, self.config).items():
            self._add_file(file, expected)
        _check_dtypes(self.dtypes)

    def __getitem__(self, name: str) -> "Tensor":
        """Read one tensor."""
        file = self._files[name]
        if file not in self._opened:
            self._opened[file] = safe_open(file, framework="pt")
        return cast("Tensor", self._opened[file].get_tensor(name))

    def __iter__(self) -> Iterator[str]:
        """Go through the names without reading tensors."""
        return iter(self.shapes)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self.shapes)

    def _add_file(self, file: Path, expected: frozenset[str] | None) -> None:
        try:
            opened: Any = safe_open(file, framework="np")  # which reads the header without importing torch
        except (OSError, SafetensorError) as error:
            if file.is_file() and is_lfs_pointer(file):
                raise ConversionError(f"{file} is a pointer of Git LFS, not the file itself", hint=LFS_HINT) from error
            raise ConversionError(
                f"{file} cannot be read: {error}", hint="the file is missing or was not copied completely"
            ) from error
        names = set(opened.keys())
        if expected is not None:
            _check_agrees_with_index(file, names, expected)
        for name in names:
            header = opened.get_slice(name)
            self.shapes[name] = tuple(header.get_shape())
            self.dtypes[name] = header.get_dtype()
            self._files[name] = file


def _read_config(folder: Path) -> dict[str, object]:
    if (folder / "adapter_config.json").is_file():
        what = "an adapter beside a model" if (folder / CONFIG_FILE).is_file() else "an adapter, not a model"
        raise ConversionError(f"{folder} holds {what}", hint="merge the adapter into its base model and convert that")
    if not (folder / CONFIG_FILE).is_file() and (found := sorted(folder.glob(f"snapshots/*/{CONFIG_FILE}"))):
        raise ConversionError(
            f"{folder} has no {CONFIG_FILE}; it is an entry of the hub's cache", hint=f"give {found[-1].parent}"
        )
    return read_json(folder / CONFIG_FILE)


def _weight_files(folder: Path, config: Mapping[str, object]) -> dict[Path, frozenset[str] | None]:
    """Return the files of the weights, each with the names that the index promises (None without an index)."""
    if (folder / INDEX_FILE).is_file():
        return dict(_read_index(folder))
    if (folder / SINGLE_FILE).is_file():
        return {folder / SINGLE_FILE: None}
    shards = sorted(file.name for file in folder.glob("model-*-of-*.safetensors"))
    if shards:
        raise ConversionError(
            f"{folder} has {len(shards)} weight files such as {shards[0]}, but no {INDEX_FILE}",
            hint="copy the index too: it says how many files there are and what each holds",
        )
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        family = FAMILIES.get(str(config.get("model_type")))
        raise ConversionError(
            f"{folder} holds only pickled weights ({', '.join(pickles[:3])}), which can run code when they are opened",
            hint="where you trust them, let transformers write safetensors: "
            f"{family.auto_class if family else 'AutoModel'}.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)",
        )
    raise PathError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def _read_index(folder: Path) -> dict[Path, frozenset[str]]:
    index = folder / INDEX_FILE
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ConversionError(f"{index} has no weight_map from names to files")
    names: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if Path(file).name != file:
            raise ConversionError(f"{index} points outside its folder: {file!r}")
        names.setdefault(folder / file, set()).add(name)
    missing = sorted(file.name for file in names if not file.is_file())
    if missing:
        raise ConversionError(
            f"{folder} lacks {len(missing)} of the {len(names)} files that {INDEX_FILE} names, such as {missing[0]}",
            hint="the folder was not copied completely",
        )
    single = folder / SINGLE_FILE
    if single not in names and single.is_file():
        raise ConversionError(
            f"{folder} holds two sets of weights: {SINGLE_FILE}, which transformers reads where it exists, and the "
            f"{len(names)} files of {INDEX_FILE}",
            hint="move the one that is not meant away: most often an older export was left there",
        )
    return {file: frozenset(expected) for file, expected in names.items()}


def _check_agrees_with_index(file: Path, names: Set[str], expected: Set[str]) -> None:
    problems = []
    if lacking := sorted(expected - names):
        problems.append(f"lacks {', '.join(lacking[:3])}, which the index places there")
    if unexpected := sorted(names - expected):
        problems.append(f"holds {', '.join(unexpected[:3])}, which the index does not place there")
    if problems:
        raise ConversionError(
            f"{file} does not hold what {INDEX_FILE} says: it {' and '.join(problems)}",
            hint="files of two exports were mixed",
        )


def _check_dtypes(dtypes: Mapping[str, str]) -> None:
    foreign = sorted(
        f"{name} is {dtype}"
        for name, dtype in dtypes.items()
        if dtype not in _DTYPES and not name.endswith(_INTEGER_BUFFERS)
    )
    if foreign:
        raise ConversionError(
            f"{len(foreign)} tensors are not floating-point numbers of 16 bits or more: {', '.join(foreign[:3])}",
            hint="quantised weights are not converted, use the original ones",
        )
