"""A disk of a few megabytes that can really run full: a tmpfs, which takes the right to mount one."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, kib: int, *options: str) -> Iterator[Path]:
    """Mount a disk of `kib` KiB for the duration of a with block; skips the test where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join((f"size={kib}k", *options)), "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a disk that is full needs the right to mount one: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, *options: str) -> None:
    """Change the options of a mounted small disk: `size=…k`, `ro`."""
    subprocess.run(["mount", "-o", ",".join(("remount", *options)), str(folder)], check=True)
