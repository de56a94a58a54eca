"""What counts as a checkpoint, what is published, and what a damaged one is called."""

import dataclasses
import random
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
from megatron_7b.checkpoint.folders import check_free_space, keep_newest, new_staging_folder, remove_leftovers
from megatron_7b.checkpoint.manifest import MANIFEST, write_manifest
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
    staging = new_staging_folder(checkpoints, step)
    (staging / "__0_0.distcp").write_bytes(random.Random(step).randbytes(4096))
    counters = dataclasses.replace(MANIFEST_FIELDS.counters, step=step)
    write_manifest(staging, dataclasses.replace(MANIFEST_FIELDS, counters=counters), tiny_config())
    return staging


def test_only_complete_checkpoints_are_found(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    assert latest_checkpoint(checkpoints) is None
    first = publish(stage(checkpoints, 3), 3)
    stage(checkpoints, 9)  # a save that was cut off before it was published
    (checkpoints / "step_00000012").mkdir()  # a folder without a manifest
    for path in (tmp_path, checkpoints, checkpoints / "latest", first):
        assert resolve_checkpoint(path) == first.resolve()
    assert (checkpoints / "latest").readlink() == Path("step_00000003")
    second = publish(stage(checkpoints, 10), 10)
    assert resolve_checkpoint(tmp_path) == second.resolve() == (checkpoints / "latest").resolve()


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


def test_retention_keeps_the_newest_and_leftovers_go(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        publish(stage(tmp_path, step), step)
    stage(tmp_path, 5)
    assert [path.name for path in keep_newest(tmp_path, 2)] == ["step_00000001", "step_00000002"]
    assert keep_newest(tmp_path, 0) == []
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000003", "step_00000004"]


def test_a_save_that_cannot_fit_is_refused(tmp_path: Path) -> None:
    check_free_space(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"has .* MB left"):
        check_free_space(tmp_path, 1 << 60)
