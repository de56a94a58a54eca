"""Files that appear whole or not at all: what is left of a write that fails, is killed, or has company."""

import errno
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megatron_7b.files import remove_any, remove_interrupted, replace_text, replacing
from tests.support.small_disk import small_disk


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    replace_text(path, "first")
    with path.open() as reader:
        replace_text(path, "zweite Fassung, länger")
        assert reader.read() == "first"
    assert path.read_text(encoding="utf-8") == "zweite Fassung, länger"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    replace_text(path, "first")
    with pytest.raises(UnicodeEncodeError), replacing(path) as beside:
        beside.write_text("half, and what cannot be written: \ud800")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_not_written_is_not_replaced_by_nothing(tmp_path: Path) -> None:
    replace_text(tmp_path / "file.txt", "first")
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "file.txt"):
        pass
    assert (tmp_path / "file.txt").read_text() == "first"


def test_numpy_on_a_full_disk_names_the_file(tmp_path: Path) -> None:
    """It says "27060 requested and 3824 written", without a code."""
    with small_disk(tmp_path / "disk", 64) as disk:
        told = pytest.raises(OSError, match="No space left on device: .*numbers")
        with told as caught, replacing(disk / "numbers") as beside, beside.open("wb") as stream:
            np.zeros(1 << 17).tofile(stream)
        assert caught.value.errno == errno.ENOSPC
        assert list(disk.iterdir()) == []


def test_many_writers_leave_one_whole_file(tmp_path: Path) -> None:
    texts = [str(number) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: replace_text(tmp_path / "file.txt", text), texts))
    assert (tmp_path / "file.txt").read_text() in texts
    assert len(list(tmp_path.iterdir())) == 1


def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    for operation in range(100):
        replace_text(path, "old")
        if not _killed_while_replacing(path, operation):
            break
        assert path.read_text() in ("old", "new")
        remove_interrupted(tmp_path)
        assert list(tmp_path.iterdir()) == [path]
    assert operation >= 3  # the file is opened, opened again to wait for the disk, renamed
    assert path.read_text() == "new"


def _killed_while_replacing(path: Path, operation: int) -> bool:
    """Write in a process that is killed before its n-th call of the file system; whether it came to that."""
    child = os.fork()
    if child == 0:
        left = operation

        def strike(event: str, _: object) -> None:
            nonlocal left
            if event in ("open", "os.rename", "os.remove"):
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        sys.addaudithook(strike)
        replace_text(path, "new")
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_link_is_removed_and_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("folder", "link", "nothing"):
        remove_any(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
