"""The files of a checkpoint: names that stay in its folder, and hashes that are compared before a byte is used."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType

import xxhash

from megatron_7b.errors import CheckpointError

INDEX = ".metadata"
"""Torch's list of the tensors in a folder, and of where they are in its files."""
TOKENIZER, HUGGING_FACE, OPTIMIZER = "tokenizer", "hugging_face", "optimizer"
"""Folders in a checkpoint."""
_CHUNK = 1 << 24
_HASH_DIGITS = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class FileRecord:
    """Size and hash of a file."""

    bytes: int
    xxh3: str


type Records = Mapping[str, FileRecord]
"""By path relative to the folder of the checkpoint."""

NO_RECORDS: Records = MappingProxyType({})


def advice_on_damage(folder: Path) -> str:
    """Return what to do about a checkpoint that is damaged, whether it is one of a run or stands alone."""
    if folder.absolute().parent.name == "checkpoints":
        return "move this checkpoint away: the run then continues from the newest one that is left"
    return "copy it again from where it came from, or give the command again that wrote it"


def hash_files(folder: Path, paths: Sequence[Path]) -> dict[str, FileRecord]:
    """Read files of a checkpoint and return their records.

    Raises:
        OSError: One of them cannot be read.
    """
    with ThreadPoolExecutor(max_workers=min(16, (os.cpu_count() or 1) * 2)) as pool:
        return {
            str(path.relative_to(folder)): FileRecord(path.stat().st_size, digest)
            for path, digest in zip(paths, pool.map(_hash_file, paths), strict=True)
        }


def find_bad_records(files: Records) -> Iterator[str]:
    """Yield what no save would have written: names that leave the folder, impossible sizes and hashes."""
    for name, record in files.items():
        if not _stays_inside(name):
            yield f"the file name {name!r} does not stay in the checkpoint's folder"
        if record.bytes < 0 or len(record.xxh3) != 32 or not _HASH_DIGITS.issuperset(record.xxh3):
            yield f"the record of {name!r} is none: {record.bytes} bytes, hash {record.xxh3!r:.60}"


def recorded_file(folder: Path, files: Records, name: str) -> Path:
    """Return the path of a file that is about to be read.

    Raises:
        CheckpointError: It has no record, or is a link that leaves the folder.
    """
    if name not in files:
        raise CheckpointError(
            f"{folder} is damaged: {name} has no record in its checkpoint.json", hint=advice_on_damage(folder)
        )
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(
            f"{folder}: {name} is a link to {path.resolve()}, outside the checkpoint",
            hint="put a copy of the file in its place; the folder itself may be a link",
        )
    return path


def read_recorded(folder: Path, files: Records, name: str) -> bytes:
    """Read a small file whole; what is returned is what was hashed.

    Raises:
        CheckpointError: It has no record, is missing, or differs from its record.
    """
    path = recorded_file(folder, files, name)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", hint=advice_on_damage(folder)) from error
    problem = _difference(FileRecord(len(content), xxhash.xxh3_128_hexdigest(content)), files[name])
    if problem:
        raise CheckpointError(f"{folder} is damaged: {name} {problem}", hint=advice_on_damage(folder))
    return content


def verify_files(folder: Path, files: Records, *, names: Iterable[str] | None = None) -> None:
    """Compare files with their recorded sizes and hashes.

    Args:
        folder: The checkpoint.
        files: Its records.
        names: Files to check; None means all.

    Raises:
        CheckpointError: Files are missing, differ or lead out of the folder; all that are missing or differ are named.
    """
    problems = []
    present = []
    for name in files if names is None else names:
        path = recorded_file(folder, files, name)
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != files[name].bytes:
            problems.append(f"{name} has {path.stat().st_size} bytes, expected {files[name].bytes}")
        else:
            present.append(path)
    try:
        found = hash_files(folder, present)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}", hint=advice_on_damage(folder)) from error
    for name, record in found.items():
        if problem := _difference(record, files[name]):
            problems.append(f"{name} {problem}")
    if problems:
        raise CheckpointError(f"{folder} is damaged: " + "; ".join(problems), hint=advice_on_damage(folder))


def check_nothing_foreign(folder: Path, files: Records) -> None:
    """Refuse a folder with files that a reader could take for parts of the checkpoint, but that were not saved with it.

    What nobody reads may be there: notes, hidden files of an editor or a file system.

    Raises:
        CheckpointError: There are such files; all of them are named.
    """
    foreign = [name for name in sorted(_names(folder) - files.keys()) if _could_be_read(name)]
    if foreign:
        raise CheckpointError(
            f"{folder} holds files that are not part of the checkpoint: {', '.join(foreign)}",
            hint="they have no record in its checkpoint.json: move them away, or copy the checkpoint again",
        )


def names_below(files: Records, part: str) -> list[str]:
    """Return the names of the recorded files in a folder of the checkpoint."""
    return [name for name in files if name.startswith(f"{part}/")]


def _hash_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _difference(found: FileRecord, expected: FileRecord) -> str:
    if found.bytes != expected.bytes:
        return f"has {found.bytes} bytes, expected {expected.bytes}"
    return "" if found.xxh3 == expected.xxh3 else f"was changed: hash {found.xxh3}, expected {expected.xxh3}"


def _stays_inside(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # a lone surrogate that is no byte of a file name
        return False
    path = PurePosixPath(name)
    # Equal to its own normal form: no empty part, no `.`, no slash at either end.
    is_plain = str(path) == name and not path.is_absolute() and name != "." and ".." not in path.parts
    return is_plain and not set("\\\0") & set(name)


def _names(folder: Path) -> set[str]:
    found = set()
    for root, _, names in os.walk(folder):
        found |= {(Path(root) / name).relative_to(folder).as_posix() for name in names}
    return found


def _could_be_read(name: str) -> bool:
    path = PurePosixPath(name)
    if path.name.startswith(".") and path.name != INDEX:
        return False
    if path.parent == PurePosixPath():
        return path.name.endswith((".distcp", ".metadata", ".pt"))
    return path.parts[0] in {TOKENIZER, HUGGING_FACE, OPTIMIZER}
