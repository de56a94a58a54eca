"""What counts as a checkpoint, what is published, and what a damaged one is called."""

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_7b.checkpoint import (
    Counters,
    Manifest,
    latest_checkpoint,
    publish,
    read_config,
    read_manifest,
    resolve_checkpoint,
    verify_files,
)
from megatron_7b.checkpoint.manifest import MANIFEST, write_manifest
from megatron_7b.checkpoint.publishing import check_free_space, keep_newest, new_staging_folder, recover
from megatron_7b.errors import CheckpointError, PathError
from tests.support.tiny_runs import tiny_config

MANIFEST_FIELDS = Manifest(
    counters=Counters(step=3, consumed_samples=24, consumed_tokens=768, optimizer_steps=3),
    vocab_size=509,
    params_dtype="float32",
    layout="TP1×PP1×DP1",
    world_size=1,
    has_optimizer=True,
)


def stage(checkpoints: Path, step: int) -> Path:
    checkpoints.mkdir(exist_ok=True)
    staging = new_staging_folder(checkpoints, step)
    (staging / "__0_0.distcp").write_bytes(random.Random(step).randbytes(4096))
    counters = Counters(step=step, consumed_samples=8 * step, consumed_tokens=256 * step, optimizer_steps=step)
    write_manifest(staging, dataclasses.replace(MANIFEST_FIELDS, counters=counters), tiny_config())
    return staging


def test_only_complete_checkpoints_are_found(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    assert latest_checkpoint(checkpoints) is None
    first = publish(stage(checkpoints, 3), 3)
    stage(checkpoints, 9)  # a save that was cut off before it was published
    (checkpoints / "step_9").mkdir()  # no name of ours
    for path in (tmp_path, checkpoints, checkpoints / "latest", first):
        assert resolve_checkpoint(path) == first.resolve()
    assert (checkpoints / "latest").readlink() == Path("step_00000003")
    second = publish(stage(checkpoints, 10), 10)
    assert resolve_checkpoint(tmp_path) == second.resolve() == (checkpoints / "latest").resolve()


@pytest.mark.parametrize("fault", ["manifest", "all", "link"])
def test_a_newest_step_without_manifest_is_refused_and_the_one_before_is_named(fault: str, tmp_path: Path) -> None:
    """An interrupted save leaves no folder of a step, so this one was complete once."""
    checkpoints = tmp_path / "checkpoints"
    first, second = publish(stage(checkpoints, 3), 3), publish(stage(checkpoints, 10), 10)
    if fault == "manifest":
        (second / MANIFEST).unlink()
    else:
        shutil.rmtree(second)
        second.mkdir() if fault == "all" else second.symlink_to(tmp_path / "nowhere")
    for path in (tmp_path, checkpoints):
        with pytest.raises(CheckpointError, match=r"step_00000010 is damaged(.|\n)*complete one is .*step_00000003"):
            resolve_checkpoint(path)
    with pytest.raises(CheckpointError, match="damaged"):
        latest_checkpoint(checkpoints)
    with pytest.raises((CheckpointError, PathError), match=r"step_00000010"):
        resolve_checkpoint(checkpoints / "latest")
    assert resolve_checkpoint(first) == first.resolve()
    (second.unlink if second.is_symlink() else lambda: shutil.rmtree(second))()
    assert latest_checkpoint(checkpoints) == first


def test_an_older_step_without_manifest_does_not_matter(tmp_path: Path) -> None:
    first, second = publish(stage(tmp_path, 3), 3), publish(stage(tmp_path, 10), 10)
    (first / MANIFEST).unlink()
    assert latest_checkpoint(tmp_path) == second
    third = publish(stage(tmp_path, 11), 11)
    assert keep_newest(tmp_path, 1, third) == [second]
    assert first.is_dir()  # what nobody understands, nobody removes


def test_a_folder_that_is_not_there_is_not_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(tmp_path / "not mounted")
    with pytest.raises(CheckpointError, match="points to .*not mounted, which is not there"):
        resolve_checkpoint(tmp_path)
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="is no folder"):
        resolve_checkpoint(tmp_path)


def test_a_folder_that_may_not_be_read_is_not_an_empty_one() -> None:
    with tempfile.TemporaryDirectory() as name, as_somebody_else():
        checkpoints = Path(name, "checkpoints")
        with pytest.raises(CheckpointError, match="checkpoints cannot be read: Permission denied"):
            latest_checkpoint(checkpoints)


@contextlib.contextmanager
def as_somebody_else() -> Iterator[None]:
    """Give up the rights of root, for whom nothing is unreadable."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_is_no_checkpoint_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(PathError, match="does not exist"):
        resolve_checkpoint(tmp_path / "nowhere")
    with pytest.raises(PathError, match="no complete checkpoint"):
        resolve_checkpoint(tmp_path)
    (tmp_path / MANIFEST).write_text("{not json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text('{"format_version": 99}')
    with pytest.raises(CheckpointError, match="format version 99"):
        read_manifest(tmp_path)


def test_manifest_and_configuration_come_back(tmp_path: Path) -> None:
    folder = publish(stage(tmp_path, 3), 3)
    manifest = read_manifest(folder)
    assert dataclasses.replace(manifest, files={}) == MANIFEST_FIELDS
    assert read_config(folder) == tiny_config()
    verify_files(folder, manifest.files)


@pytest.mark.parametrize("fault", ["bit", "zeros", "cut", "missing", "grown"])
def test_every_damage_is_found_and_named(fault: str, tmp_path: Path) -> None:
    folder = publish(stage(tmp_path, 3), 3)
    shard = folder / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    if fault == "bit":
        content[random.Random(0).randrange(len(content))] ^= 1 << 3
    elif fault == "zeros":
        content[1024:2048] = bytes(1024)
    elif fault == "cut":
        del content[-1:]
    elif fault == "grown":
        content += b"\0"
    if fault == "missing":
        shard.unlink()
    else:
        shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp"):
        verify_files(folder, read_manifest(folder).files)


def test_saving_a_step_again_replaces_it_whole(tmp_path: Path) -> None:
    first = publish(stage(tmp_path, 3), 3)
    (first / "left over").write_text("")
    second = publish(stage(tmp_path, 3), 3)
    assert first == second
    assert not (second / "left over").exists()
    assert not list(tmp_path.glob(".tmp-*"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_retention_keeps_the_newest_and_leftovers_go(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        published = publish(stage(tmp_path, step), step)
    stage(tmp_path, 5)
    assert [path.name for path in keep_newest(tmp_path, 2, published)] == ["step_00000001", "step_00000002"]
    assert keep_newest(tmp_path, 0, published) == []
    assert keep_newest(tmp_path, 9, published) == []
    recover(tmp_path)
    assert names(tmp_path) == ["latest", "step_00000003", "step_00000004"]


def test_retention_never_removes_what_was_just_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither for a copy under a higher number nor for a checkpoint that is really ahead; neither counts as ours."""
    old = publish(stage(tmp_path, 4), 4)
    shutil.copytree(old, tmp_path / "step_00000050")
    shutil.copytree(old, tmp_path / "step_00000006")
    publish(stage(tmp_path, 60), 60)
    published = publish(stage(tmp_path, 8), 8)
    assert keep_newest(tmp_path, 1, published) == [old]
    assert names(tmp_path) == ["latest", *(f"step_{step:08d}" for step in (6, 8, 50, 60))]
    assert (tmp_path / "latest").resolve() == published.resolve()
    assert "step_00000060 is ahead of step 8" in caplog.text


def test_links_are_retired_and_what_they_point_to_stays(tmp_path: Path) -> None:
    checkpoints, archive = tmp_path / "checkpoints", tmp_path / "archive"
    old = publish(stage(checkpoints, 1), 1)
    archive.mkdir()
    old.rename(archive / old.name)
    old.symlink_to(archive / old.name)
    assert keep_newest(checkpoints, 1, publish(stage(checkpoints, 2), 2)) == [old]
    assert names(checkpoints) == ["latest", "step_00000002"]
    verify_files(archive / old.name, read_manifest(archive / old.name).files)


def test_something_else_called_latest_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`cp -rL` makes a whole checkpoint of the link."""
    shutil.copytree(publish(stage(tmp_path, 1), 1), tmp_path / "copy")
    (tmp_path / "latest").unlink()
    (tmp_path / "copy").rename(tmp_path / "latest")
    published = publish(stage(tmp_path, 2), 2)
    assert latest_checkpoint(tmp_path) == published
    assert "latest could not be pointed at step_00000002" in caplog.text
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000002"]


def save_again(checkpoints: Path) -> None:
    """A save that replaces a step, makes room, and what the next start does."""
    published = publish(next(checkpoints.glob(".tmp-step_00000003-*")), 3)
    keep_newest(checkpoints, 1, published)
    recover(checkpoints)


def killed_at(operation: int, checkpoints: Path) -> bool:
    """Run `save_again` in a process that is killed before its n-th change to the disk; whether it came to that."""
    child = os.fork()
    if child == 0:
        left = operation

        def strike(event: str, _: object) -> None:
            nonlocal left
            if event in ("os.rename", "os.remove", "os.rmdir", "os.symlink", "os.mkdir"):
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        sys.addaudithook(strike)
        save_again(checkpoints)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    template = tmp_path / "template"
    publish(stage(template, 2), 2)
    old = publish(stage(template, 3), 3)
    (old / "of the first save").write_text("")
    stage(template, 3)
    kills = 0
    while True:
        checkpoints = tmp_path / str(kills)
        shutil.copytree(template, checkpoints, symlinks=True)
        if not killed_at(kills, checkpoints):
            break
        kills += 1
        recover(checkpoints)
        newest = latest_checkpoint(checkpoints)
        assert newest is not None
        assert newest.name == "step_00000003"
        verify_files(newest, read_manifest(newest).files)
        assert set(names(checkpoints)) <= {"latest", "step_00000002", "step_00000003"}
        assert (checkpoints / "latest").resolve() == newest.resolve()
    assert kills > 10
    assert not (checkpoints / "step_00000003" / "of the first save").exists()


def test_a_save_that_cannot_fit_is_refused(tmp_path: Path) -> None:
    check_free_space(tmp_path, 1, step=3)
    with pytest.raises(CheckpointError, match=r"has .* MB left"):
        check_free_space(tmp_path, 1 << 60, step=3)
