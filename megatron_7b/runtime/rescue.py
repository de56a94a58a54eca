"""What took hours to compute outlives a disk that has no room for it: then it is put elsewhere, or printed."""

import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from megatron_7b.errors import MegatronError
from megatron_7b.files import remove_any, writing_output


def write_or_rescue(path: Path, write: Callable[[IO[str]], object]) -> None:
    """Write a text file as `files.writing_output` does; where that fails, in another folder, or to standard output.

    Args:
        path: The file; folders above it are made.
        write: Writes all of it, as often as it is called.

    Raises:
        MegatronError: It is not at the path; the message says where it is.
    """
    try:
        with writing_output(path) as beside:
            _write_file(beside, write)
    except OSError as error:
        what = f"{path} cannot be written: {error.strerror or error}"
    else:
        return
    for place in (None, Path.cwd(), Path.home()):
        with contextlib.suppress(OSError):
            rescued = _write_new(place, path.name, write)
            raise MegatronError(f"{what}; it is in {rescued} instead", hint=f"mv {rescued} {path}")
    write(sys.stdout)
    sys.stdout.flush()
    raise MegatronError(f"{what}, nor any other folder; it was printed instead")


def _write_new(place: Path | None, name: str, write: Callable[[IO[str]], object]) -> Path:
    """Write a file in a new folder at a place; None: where the system keeps such."""
    folder = Path(tempfile.mkdtemp(prefix="megatron_7b-", dir=place))
    try:
        _write_file(folder / name, write)
    except BaseException:
        remove_any(folder)
        raise
    return folder / name


def _write_file(file: Path, write: Callable[[IO[str]], object]) -> None:
    with file.open("w", encoding="utf-8") as stream:
        write(stream)
