"""A folder appears complete or not at all: it is written beside its place and renamed."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_7b.files import flush_tree_to_disk


@contextlib.contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """Give a folder to write into, and rename it to `output` when the block ends without an exception.

    After an exception nothing is left beside `output`, and a previous `output` is untouched. What a killed process
    left is removed by the next one.

    Yields:
        The empty folder, hidden beside `output` under a name that nobody else uses.
    """
    output = output.resolve()
    staging = output.with_name(f".{output.name}.megatron_7b-convert.tmp")
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    try:
        yield staging
        flush_tree_to_disk(staging)
        _publish(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def take_checkpoint(staging: Path, checkpoint: Path) -> None:
    """Make a staging folder itself the one checkpoint that was written into it."""
    (staging / "latest").unlink(missing_ok=True)
    for path in checkpoint.iterdir():
        path.rename(staging / path.name)
    checkpoint.rmdir()


def _publish(staging: Path, output: Path) -> None:
    if not output.exists():
        os.replace(staging, output)
        return
    # A folder with content cannot be replaced in one system call: move it aside, so that it is never half deleted.
    previous = Path(tempfile.mkdtemp(prefix=output.name + ".old-", dir=output.parent))
    os.replace(output, previous)
    try:
        os.replace(staging, output)
    except OSError:
        os.replace(previous, output)
        raise
    shutil.rmtree(previous)
