"""Whether what a command is about to write can be put where it was asked for: known before any work is done."""

import os
import stat
from pathlib import Path

from megatron_7b.errors import PathError


def check_can_create(path: Path, what: str) -> None:
    """Refuse a path at which nothing can be created: something above it is a file, or may not be written to.

    Args:
        path: File or folder that is to be made; it may be there already.
        what: What it is, as messages name it: "the run folder".

    Raises:
        PathError: That is so, or no file system takes such a name.
    """
    for above in path.absolute().parents:
        try:
            found = above.stat()
        except FileNotFoundError:
            continue
        except NotADirectoryError:  # one further up is a file
            continue
        except OSError as error:
            raise PathError(f"{what} {path} cannot be made: {above}: {error.strerror}", hint=_HINT) from error
        if not stat.S_ISDIR(found.st_mode):
            raise PathError(f"{what} {path} cannot be made: {above} is a file", hint=_HINT)
        if not path.exists() and not os.access(above, os.W_OK | os.X_OK):
            raise PathError(f"{what} {path} cannot be made: you may not write to {above}", hint=_HINT)
        return


def check_file_to_write(file: Path, what: str) -> None:
    """Refuse a file that cannot be written, or that is there and is a folder.

    Args:
        file: The file; nothing is made. Whoever writes it makes the folders above it (`files.writing_output`).
        what: What it is, as messages name it: "--output".

    Raises:
        PathError: That is so.
    """
    if file.is_dir():
        raise PathError(f"{what} {file} is a folder; expected a file", hint=_HINT)
    check_can_create(file, what)
    if file.exists() and not os.access(file.parent, os.W_OK | os.X_OK):  # it is replaced, by a new file beside it
        raise PathError(f"{what} {file} cannot be replaced: you may not write to {file.parent}", hint=_HINT)


def check_folder_to_write(folder: Path, what: str) -> None:
    """Refuse a folder that cannot be made, or that is there and is a file or may not be written to.

    Args:
        folder: The folder; nothing is made.
        what: What it is, as messages name it.

    Raises:
        PathError: That is so.
    """
    try:
        found = folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        if folder.is_symlink():
            raise PathError(f"{what} {folder} is a link to something that is not there", hint=_HINT) from None
        check_can_create(folder, what)
        return
    except OSError as error:
        raise PathError(f"{what} {folder} cannot be used: {error.strerror}", hint=_HINT) from error
    if not stat.S_ISDIR(found.st_mode):
        raise PathError(f"{what} {folder} is a file; expected a folder, or a path that is still free", hint=_HINT)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PathError(f"{what} {folder} cannot be written to", hint=_HINT)


def check_new_folder(folder: Path, *, overwrite: bool, inputs: tuple[Path, ...] = ()) -> None:
    """Refuse a folder that is to be made anew and cannot be, or that would replace something.

    Args:
        folder: The folder; nothing is made.
        overwrite: Whether an existing one may be replaced.
        inputs: Folders that are read, which `folder` may not touch.

    Raises:
        PathError: It cannot be made, is not empty and may not be replaced, or contains or equals an input.
    """
    check_folder_to_write(folder, "the output")
    resolved = folder.resolve()
    for source in inputs:
        if source.resolve().is_relative_to(resolved):
            raise PathError(f"the output {folder} would replace what is read from {source}", hint=_HINT)
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise PathError(f"the output {folder} is not empty", hint="choose another, or replace it with --overwrite")


_HINT = "give a path that is free, in a folder that you may write to"
