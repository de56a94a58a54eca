"""Outputs that cannot be made, or would destroy something, are refused before any work is done."""

import os
from pathlib import Path

import pytest

from megatron_7b.errors import PathError
from megatron_7b.runtime.output_paths import check_can_create, check_folder_to_write, check_new_folder


def test_new_paths_are_fine_however_deep(tmp_path: Path):
    check_can_create(tmp_path / "a" / "b" / "c", "the output")
    check_folder_to_write(tmp_path / "a" / "b", "the output")
    check_folder_to_write(tmp_path, "the output")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["file", "file/x", "file/x/y", "link", "x" * 300])
def test_what_cannot_become_a_folder(tmp_path: Path, below: str):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(PathError, match="the output .*\nhint: give a path that is free"):
        check_folder_to_write(tmp_path / below, "the output")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folders_of_others(tmp_path: Path):
    (tmp_path / "theirs").mkdir(mode=0o500)
    for path in (tmp_path / "theirs", tmp_path / "theirs" / "x"):
        with pytest.raises(PathError, match="may not write to|cannot be written to"):
            check_folder_to_write(path, "the output")


def test_outputs_that_would_destroy_something_are_refused(tmp_path: Path):
    (tmp_path / "out").mkdir()
    check_new_folder(tmp_path / "out", overwrite=False)
    (tmp_path / "out" / "a").touch()
    with pytest.raises(PathError, match="is not empty"):
        check_new_folder(tmp_path / "out", overwrite=False)
    check_new_folder(tmp_path / "out", overwrite=True)
    with pytest.raises(PathError, match="is a file"):
        check_new_folder(tmp_path / "out" / "a", overwrite=True)
    with pytest.raises(PathError, match="would replace what is read"):
        check_new_folder(tmp_path, overwrite=True, inputs=(tmp_path / "out",))
