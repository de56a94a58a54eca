"""`checkpoint.json`: what a checkpoint is, the hash of every file in it, and a checksum of itself."""

import dataclasses
import json
import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from megatron_7b.checkpoint.records import (
    NO_RECORDS,
    FileRecord,
    Records,
    advice_on_damage,
    find_bad_records,
    hash_files,
    verify_files,
)
from megatron_7b.config import RunConfig, load_config, save_config
from megatron_7b.errors import CheckpointError
from megatron_7b.files import flush_to_disk
from megatron_7b.runtime.strict_json import CHECKSUM, MismatchError, build, checksum, parse_object

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
CONFIG = "config.yaml"
FORMAT_VERSION = 3
_SEALED_SINCE = 2
"""Before, a manifest had no checksum."""
_OWN_NAMES_SINCE = 3
"""Before, tensors had megatron-core's names."""
_ONLY_OPTIMIZER = "adamw"
"""That of formats 1 and 2."""
NUM_UPDATES = "num_updates"
type OnOptimizerChange = Literal["refuse", "restart"]
_STEP_FOLDER = re.compile(r"step_(\d{8,})")
_LARGEST = 2**63 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counters:
    """Progress of a run: everything that resuming needs besides the tensors."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    optimizer_steps: int = 0
    """Applied updates, without skipped steps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """The checkpoint that has the parameters which one of an adapter lacks."""

    identity: str
    """Hash of its weights as they are stored."""
    path: str
    """Where it was."""
    relative_path: str | None = None
    """The same as seen from the checkpoint of the adapter."""


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
    optimizer: str | None = None
    """Name of the optimizer whose state it has; formats 1 and 2, which knew one only, do not say."""
    optimizer_scalars: dict[str, Any] | None = None
    """What the optimizer keeps beside tensors."""
    sample_order: dict[str, Any] | None = None
    """What the training samples were, and in which order: `data.sample_order`; None where no run wrote it."""
    base: Base | None = None
    """What the parameters that are not in it are taken from; None: it has all of them."""
    files: dict[str, FileRecord] = dataclasses.field(default_factory=dict)
    """By path relative to the folder."""
    format_version: int = FORMAT_VERSION

    @property
    def is_sealed(self) -> bool:
        """Whether the manifest was checked against a checksum of its own."""
        return self.format_version >= _SEALED_SINCE

    @property
    def optimizer_name(self) -> str | None:
        """Name of the optimizer whose state it has; None if it has none."""
        return (self.optimizer or _ONLY_OPTIMIZER) if self.has_optimizer else None

    @property
    def num_updates(self) -> int:
        """Updates that its optimizer has done, which are fewer than the run's if it was started afresh."""
        return int((self.optimizer_scalars or {}).get(NUM_UPDATES, self.counters.optimizer_steps))

    @property
    def has_core_names(self) -> bool:
        """Whether its tensors have megatron-core's names instead of those of the model's table."""
        return self.format_version < _OWN_NAMES_SINCE


def write_manifest(folder: Path, manifest: Manifest, config: RunConfig, hashes: Records = NO_RECORDS) -> None:
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
    content = dataclasses.asdict(dataclasses.replace(manifest, files=files))
    content[CHECKSUM] = checksum(content)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1))
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Read `checkpoint.json`, and believe it only if nothing in it was changed.

    Raises:
        CheckpointError: It is missing or damaged, belongs to another step than the folder's name says, or was not
            written by this version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a checkpoint: it has no {MANIFEST}",
            hint="name a folder such as RUN/checkpoints/latest; an interrupted save leaves none",
        )
    try:
        content = parse_object(path.read_text(encoding="utf-8"))
        _check_version(path, content)
        found = checksum(content)
        expected = content.pop(CHECKSUM, found)
        if expected != found:
            raise MismatchError(f"it was changed: its checksum is {expected!r:.60}, that of its content {found}")
        manifest = build(Manifest, content, MANIFEST, exact=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", hint=advice_on_damage(folder)) from error
    if problems := list(_contradictions(manifest)):
        raise CheckpointError(f"{path} contradicts itself: {'; '.join(problems)}", hint=advice_on_damage(folder))
    _check_folder_name(folder, manifest)
    return manifest


def read_config(folder: Path) -> RunConfig:
    """Return the effective configuration of the run that wrote a checkpoint.

    Raises:
        CheckpointError: The folder is not a checkpoint, or its configuration is damaged.
        ConfigError: Its configuration is not one of this version.
    """
    manifest, config = read_manifest(folder), load_config(config_file(folder))
    if config.model.vocab_size != manifest.vocab_size:
        raise CheckpointError(
            f"{folder} is damaged: {MANIFEST} has vocab_size {manifest.vocab_size}, {CONFIG} has "
            f"model.vocab_size {config.model.vocab_size}",
            hint=advice_on_damage(folder),
        )
    return config


def config_file(folder: Path) -> Path:
    """Return the path of the configuration of a checkpoint, once its hash was found right.

    Raises:
        CheckpointError: The folder is not a checkpoint, or its configuration is damaged.
    """
    verify_files(folder, read_manifest(folder).files, names=[CONFIG])
    return folder / CONFIG


def warn_of_missing_checksum(folder: Path, manifest: Manifest) -> None:
    """Say so if damage to the manifest itself could not have been noticed."""
    if not manifest.is_sealed:
        logger.warning(
            "%s is of an earlier version, without a checksum of its own: damage to its counters might go unnoticed. "
            "Checkpoints that are saved from now on have one",
            folder / MANIFEST,
        )


def optimizer_starts_afresh(folder: Path, manifest: Manifest, name: str, on_change: OnOptimizerChange) -> bool:
    """Return whether a resume leaves out the optimizer's state, because it is another optimizer's.

    Args:
        folder: The checkpoint.
        manifest: Its manifest.
        name: The optimizer of this start.
        on_change: `checkpoint.on_optimizer_change` of this start.

    Raises:
        CheckpointError: It is another one's, and that is not wanted.
    """
    before = manifest.optimizer_name
    if before in (None, name):
        return False
    if on_change == "refuse":
        raise CheckpointError(
            f"{folder} has the state of optimizer.name {before}, this start has optimizer.name {name}",
            hint=f"continue with --optimizer.name {before}; with --checkpoint.on-optimizer-change restart, {name} "
            "continues from the same weights with a state of its own",
        )
    return True


def _payload_files(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root) / name
            if path != folder / MANIFEST:
                yield path


def _check_version(path: Path, content: dict[str, object]) -> None:
    version = content.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version!r:.60}, expected {FORMAT_VERSION}",
            hint="use the version of megatron_7b that wrote it, unless the file is damaged",
        )
    # A manifest that has a checksum is compared with it, whatever version it claims to have.
    if version >= _SEALED_SINCE and CHECKSUM not in content:
        raise MismatchError(f"it has no {CHECKSUM}, although its format version is {version}")


def _contradictions(manifest: Manifest) -> Iterator[str]:
    """What cannot be true of any run; all that protects a manifest without a checksum."""
    counters = manifest.counters
    for name, value in (dataclasses.asdict(counters) | {"vocab_size": manifest.vocab_size}).items():
        if not 0 <= value <= _LARGEST:
            yield f"{name} is {value}"
    scalars = manifest.optimizer_scalars or {}
    if any(type(value) not in (int, float) or not 0 <= value <= _LARGEST for value in scalars.values()):
        yield f"optimizer_scalars are {scalars!r:.60}"
    if manifest.num_updates > counters.optimizer_steps:
        yield f"the optimizer did {manifest.num_updates} of {counters.optimizer_steps} updates"
    if counters.optimizer_steps > counters.step:
        yield f"{counters.optimizer_steps} updates in {counters.step} steps"
    if counters.consumed_samples and not counters.step:
        yield f"{counters.consumed_samples} samples consumed before the first step"
    if (counters.consumed_samples > 0) != (counters.consumed_tokens > 0) or (
        counters.consumed_tokens < counters.consumed_samples
    ):
        yield f"{counters.consumed_tokens} tokens in {counters.consumed_samples} samples"
    sizes = re.findall(r"\b(?:TP|PP|CP|DP)(\d{1,9})\b", manifest.layout)
    if math.prod(map(int, sizes)) != manifest.world_size or len(sizes) < 3:
        yield f"layout {manifest.layout!r:.60} for {manifest.world_size} ranks"
    yield from find_bad_records(manifest.files)
    if MANIFEST in manifest.files:
        yield f"{MANIFEST} lists itself"


def _check_folder_name(folder: Path, manifest: Manifest) -> None:
    match = _STEP_FOLDER.fullmatch(folder.name) or _STEP_FOLDER.fullmatch(folder.resolve().name)
    if match and int(match.group(1)) != manifest.counters.step:
        own_name = f"step_{manifest.counters.step:08d}"
        raise CheckpointError(
            f"{folder.resolve()} holds the checkpoint of step {manifest.counters.step}, not of step "
            f"{int(match.group(1))}",
            hint=f"it was copied or renamed: call it {own_name}, or move it out of the checkpoints folder",
        )
