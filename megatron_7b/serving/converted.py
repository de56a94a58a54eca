"""Conversions of Hugging Face folders, kept from one start of a server to the next. Imports no torch.

A conversion has a folder of its own, named after the path that it was made from, with a note of what was read: size,
time and SHA-256 of each file. If sizes and times are as they were, it is used at once; if only times differ, hashes
decide; else it is made anew.
"""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_7b import __version__
from megatron_7b.errors import ConfigError
from megatron_7b.files import flush_tree_to_disk, remove_any

_NOTE = "source.json"
_HOST = socket.gethostname().replace(".", "-")


def default_folder() -> Path:
    """Return where conversions are kept unless the user says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_7b" / "converted"


def converted(source: Path, folder: Path, convert: Callable[[Path], None]) -> Path:
    """Return the checkpoint of a Hugging Face folder, converted if that was not done before or its files have changed.

    Servers that start at once may each convert; what is complete first stays.

    Args:
        source: The Hugging Face folder.
        folder: Of all conversions.
        convert: Writes the checkpoint to a path that does not exist; raises if that fails, and then nothing is kept.

    Raises:
        ConfigError: The source is no folder, has changed meanwhile, or the folder cannot be written to.
    """
    source = source.resolve()
    if not source.is_dir():
        raise ConfigError(f"--hf {source} is no folder", hint="a folder with config.json and *.safetensors")
    own = folder / f"{source.name}-{hashlib.sha256(os.fsencode(source)).hexdigest()[:12]}"
    checkpoint = own / source.name
    if _is_current(own, source):
        return checkpoint
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(own)
        staging = Path(tempfile.mkdtemp(prefix=f".{own.name}.{_HOST}.{os.getpid()}.", dir=folder))
    except OSError as error:
        raise ConfigError(
            f"the conversion cannot be kept in {folder}: {error.strerror}", hint="--converted DIR names another folder"
        ) from None
    try:
        before = _facts(source)
        convert(staging / source.name)
        note = {"version": __version__, "source": str(source), "files": _with_hashes(source, before)}
        if _facts(source) != before:
            raise ConfigError(f"{source} has changed while it was converted", hint="start again once it is complete")
        (staging / _NOTE).write_text(json.dumps(note, indent=1))
        flush_tree_to_disk(staging)
        _publish(staging, own, source)
    finally:
        remove_any(staging)
    return checkpoint


def _remove_abandoned(own: Path) -> None:
    """Remove what servers that were killed on this machine have left of conversions."""
    for staging in own.parent.glob(glob.escape(f".{own.name}.{_HOST}.") + "*"):
        process = staging.name.split(".")[-2]
        if process.isdecimal() and not _is_running(int(process)):
            shutil.rmtree(staging, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True


def _publish(staging: Path, own: Path, source: Path) -> None:
    """Rename a complete conversion into its place, that of a stale one if there is one."""
    if own.exists() and not _is_current(own, source):
        stale = Path(tempfile.mkdtemp(prefix=f".{own.name}.stale.", dir=own.parent))
        with contextlib.suppress(OSError):  # another server has been faster
            own.rename(stale / own.name)
        shutil.rmtree(stale, ignore_errors=True)
    try:
        staging.rename(own)
    except OSError:
        if not _is_current(own, source):
            raise


def _is_current(own: Path, source: Path) -> bool:
    """Whether a conversion is complete, of this version, and of the files as they are now."""
    try:
        note = json.loads((own / _NOTE).read_text())
        known, version = note["files"], note["version"]
        noted = {name: [size, time] for name, (size, time, _) in known.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    if version != __version__ or not (own / source.name).is_dir():
        return False
    now = _facts(source)
    if now == noted:
        return True
    if {name: size for name, (size, _) in now.items()} != {name: size for name, (size, _) in noted.items()}:
        return False
    changed = {name for name, facts in now.items() if facts != noted[name]}
    if any(_hash(source / name) != known[name][2] for name in changed):
        return False
    with contextlib.suppress(OSError):  # touched or copied: next time its hashes need not be computed
        note["files"] = {name: [*facts, known[name][2]] for name, facts in now.items()}
        replacement = own / f".{_NOTE}.{os.getpid()}"
        replacement.write_text(json.dumps(note, indent=1))
        replacement.replace(own / _NOTE)
    return True


def _facts(source: Path) -> dict[str, list[int]]:
    """Return size [bytes] and time of the last change [ns] of each file."""
    files = (file for file in sorted(source.rglob("*")) if file.is_file() and not file.name.startswith("."))
    return {str(file.relative_to(source)): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _with_hashes(source: Path, facts: dict[str, list[int]]) -> dict[str, list[Any]]:
    return {name: [*of_file, _hash(source / name)] for name, of_file in facts.items()}


def _hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
