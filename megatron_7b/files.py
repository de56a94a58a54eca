"""Files and folders that appear complete or not at all, and that survive a power cut; files that were never fetched.

Whoever writes a file that others read writes beside it, waits for the disk, and renames. The name beside is new every
time: two processes that write the same file never share it, and a process that was killed leaves nothing in the way.
"""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

_LFS = b"version https://git-lfs"
LFS_HINT = "the folder was cloned without its large files: `git lfs pull` in there fetches them"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write a file to, which takes the place of `path` at the end of a with block.

    If the block raises, what was written is removed, and `path` is as before.

    Raises:
        OSError: The file could not be written; it is named.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield beside
        flush_to_disk(beside)
        os.replace(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError) and not error.filename:  # a full disk is met by a nameless file
            code = error.errno or errno.ENOSPC  # NumPy only says how little it has written
            raise OSError(code, os.strerror(code), str(path)) from error
        raise
    flush_to_disk(path.parent)


@contextlib.contextmanager
def writing_output(path: Path) -> Iterator[Path]:
    """Yield a path to write a file to that somebody asked for, as `replacing` does; folders above it are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        yield beside


def replace_text(path: Path, text: str) -> None:
    """Write a text file as `replacing` does."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_output(path: Path, text: str) -> None:
    """Write a text file as `writing_output` does."""
    with writing_output(path) as beside:
        beside.write_text(text, encoding="utf-8")


def remove_interrupted(folder: Path) -> None:
    """Remove what killed processes left beside files and folders. Call only while nobody writes there."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            remove_any(path)


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is the note that a git clone without Git LFS leaves in place of a large file.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS


def remove_any(path: Path) -> None:
    """Remove a file, a link (never what it points to), or a folder with everything in it.

    Raises:
        OSError: Something could not be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk.

    Raises:
        OSError: The content could not be written. Some network file systems refuse to flush a folder, and some folders
            may not be read; that is no error.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not path.is_dir():
            raise


def flush_tree_to_disk(folder: Path) -> None:
    """Wait until a folder and all that is in it are on the disk; raises as `flush_to_disk`."""
    for path in (*folder.rglob("*"), folder):
        flush_to_disk(path)
