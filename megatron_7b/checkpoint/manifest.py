"""`checkpoint.json`: what a checkpoint is, and the hash of every file in it."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict

import xxhash

from megatron_7b.config import RunConfig, load_config, save_config
from megatron_7b.errors import CheckpointError
from megatron_7b.runtime.durable import flush_to_disk

MANIFEST = "checkpoint.json"
CONFIG = "config.yaml"
FORMAT_VERSION = 1
_CHUNK = 1 << 24
_DAMAGED = "move this checkpoint away: the run then goes on from the newest one that is left"


class FileRecord(TypedDict):
    """Size and hash of a file."""

    bytes: int
    xxh3: str


NO_HASHES: Mapping[str, FileRecord] = MappingProxyType({})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counters:
    """Progress of a run: everything that resuming needs besides the tensors."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    optimizer_steps: int = 0
    """Applied updates, without skipped steps; Adam's bias correction depends on this number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of `checkpoint.json`."""

    counters: Counters
    vocab_size: int
    params_dtype: str
    layout: str
    """Layout that wrote it, for people; it can be loaded at any other."""
    world_size: int
    has_optimizer: bool
    sample_order: dict[str, Any] | None = None
    """What the training samples were, and in which order: `data.sample_order`; None where no run wrote it."""
    files: dict[str, FileRecord] = dataclasses.field(default_factory=dict)
    """By path relative to the folder."""
    format_version: int = FORMAT_VERSION


def _payload_files(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root) / name
            if path != folder / MANIFEST:
                yield path


def _hash_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def hash_files(folder: Path, paths: Sequence[Path]) -> dict[str, FileRecord]:
    """Read files of a checkpoint and return their records."""
    with ThreadPoolExecutor(max_workers=min(16, (os.cpu_count() or 1) * 2)) as pool:
        return {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "xxh3": digest}
            for path, digest in zip(paths, pool.map(_hash_file, paths), strict=True)
        }


def write_manifest(
    folder: Path, manifest: Manifest, config: RunConfig, hashes: Mapping[str, FileRecord] = NO_HASHES
) -> None:
    """Write `config.yaml`, and `checkpoint.json` with a record of every file of the otherwise complete checkpoint.

    Args:
        folder: The checkpoint.
        manifest: What it is.
        config: Of the run.
        hashes: Records of files that are already hashed; the others are hashed here.
    """
    save_config(config, folder / CONFIG)
    others = [path for path in _payload_files(folder) if str(path.relative_to(folder)) not in hashes]
    for path in others:  # tokenizer and configuration; shards are on the disk when their writers return
        flush_to_disk(path)
    files = dict(sorted(({**hashes, **hash_files(folder, others)}).items()))
    text = json.dumps(dataclasses.asdict(dataclasses.replace(manifest, files=files)), indent=1)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Read `checkpoint.json`.

    Raises:
        CheckpointError: it is missing, or was not written by this version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a checkpoint: it has no {MANIFEST}",
            hint="name a folder such as RUN/checkpoints/latest; an interrupted save leaves none",
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {fields.get('format_version')}, expected {FORMAT_VERSION}",
                hint="use the version of megatron_7b that wrote it",
            )
        return Manifest(**{**fields, "counters": Counters(**fields["counters"])})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", hint=_DAMAGED) from error


def verify_files(folder: Path, manifest: Manifest, *, names: list[str] | None = None) -> None:
    """Compare files with their recorded sizes and hashes.

    Args:
        folder: The checkpoint.
        manifest: Its manifest.
        names: Files to check; None means all.

    Raises:
        CheckpointError: files are missing or differ; all of them are named.
    """
    expected = manifest.files if names is None else {name: manifest.files[name] for name in names}
    problems = []
    present = {}
    for name, record in expected.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != record["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, expected {record['bytes']}")
        else:
            present[name] = path
    for name, found in hash_files(folder, list(present.values())).items():
        if found["xxh3"] != expected[name]["xxh3"]:
            problems.append(f"{name} was changed: hash {found['xxh3']}, expected {expected[name]['xxh3']}")
    if problems:
        raise CheckpointError(f"{folder} is damaged: " + "; ".join(problems), hint=_DAMAGED)


def read_config(folder: Path) -> RunConfig:
    """Return the effective configuration of the run that wrote a checkpoint.

    Raises:
        CheckpointError: the folder is not a checkpoint.
        ConfigError: its configuration is not one of this version.
    """
    read_manifest(folder)
    return load_config(folder / CONFIG)
