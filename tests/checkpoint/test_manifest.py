"""`checkpoint.json` is believed only as it was written: every flipped bit, cut, deletion and edit is refused."""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_7b.checkpoint import Manifest, config_file, publish, read_config, read_manifest, tokenizer_path
from megatron_7b.checkpoint.manifest import CONFIG, MANIFEST, Counters, warn_of_missing_checksum, write_manifest
from megatron_7b.checkpoint.publishing import new_staging_folder
from megatron_7b.checkpoint.records import verify_files
from megatron_7b.errors import CheckpointError
from megatron_7b.runtime.strict_json import CHECKSUM, checksum
from megatron_7b.tokenizer import load_tokenizer
from tests.support.tiny_runs import VOCAB_SIZE, tiny_config

STEP = 4
type Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A published checkpoint with a shard, a tokenizer and an optimizer."""
    (tmp_path / "checkpoints").mkdir()
    staging = new_staging_folder(tmp_path / "checkpoints", STEP)
    load_tokenizer("bytes").save(staging / "tokenizer")
    (staging / "optimizer").mkdir()
    for name in ("__0_0.distcp", ".metadata", "optimizer/__0_0.distcp", "optimizer/.metadata"):
        (staging / name).write_bytes(name.encode() * 50)
    manifest = Manifest(
        counters=Counters(step=STEP, consumed_samples=32, consumed_tokens=1024, optimizer_steps=3),
        vocab_size=VOCAB_SIZE,
        params_dtype="float32",
        layout="TP2×PP1×VPP2×CP2×DP3",
        world_size=12,
        has_optimizer=True,
    )
    write_manifest(staging, manifest, tiny_config())
    return publish(staging, STEP)


def rewrite(folder: Path, edit: Edit, *, version: int = 3, sealed: bool = True) -> None:
    """Edit the manifest as someone who knows how its checksum is computed."""
    content = json.loads((folder / MANIFEST).read_text())
    content["format_version"] = version
    edit(content)
    content.pop(CHECKSUM)
    if sealed:
        content[CHECKSUM] = checksum(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def damages(content: bytes) -> Iterator[bytes]:
    for position in range(len(content)):
        for bit in range(8):
            yield content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]
        yield content[:position] + content[position + 1 :]
        yield content[:position]
    lines = content.splitlines(keepends=True)
    for number in range(len(lines)):
        yield b"".join(lines[:number] + lines[number + 1 :])
        yield b"".join(lines[:number] + lines[number : number + 1] + lines[number:])


def test_what_to_do_about_damage_depends_on_whose_it_is(folder: Path, tmp_path: Path) -> None:
    (folder / "__0_0.distcp").write_bytes(b"other")
    alone = Path(shutil.copytree(folder, tmp_path / "imported"))
    for place, advice in ((folder, "move this checkpoint away: the run then continues"), (alone, "copy it again")):
        with pytest.raises(CheckpointError, match=f"__0_0.distcp has 5 bytes(.|\n)*hint: {advice}"):
            verify_files(place, read_manifest(place).files)


def test_no_flip_cut_or_deletion_changes_what_is_read(folder: Path) -> None:
    """White space may differ; what is read never does."""
    content, expected = (folder / MANIFEST).read_bytes(), read_manifest(folder)
    refused = 0
    for damaged in damages(content):
        (folder / MANIFEST).write_bytes(damaged)
        try:
            found = read_manifest(folder)
        except CheckpointError:
            refused += 1
        else:
            assert found == expected, damaged
    assert refused > 8 * len(content)


def test_a_lower_version_does_not_get_round_the_checksum(folder: Path) -> None:
    content = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(content.replace('"format_version": 3', '"format_version": 1'))
    with pytest.raises(CheckpointError, match="it was changed: its checksum"):
        read_manifest(folder)
    rewrite(folder, lambda content: None, sealed=False)
    with pytest.raises(CheckpointError, match="it has no checksum"):
        read_manifest(folder)


def test_a_manifest_of_the_version_without_checksums_is_read_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = read_manifest(folder)
    warn_of_missing_checksum(folder, expected)
    assert caplog.records == []
    rewrite(folder, lambda content: None, version=1, sealed=False)
    manifest = read_manifest(folder)
    assert manifest == dataclasses.replace(expected, format_version=1)
    assert read_config(folder) == tiny_config()
    with caplog.at_level(logging.WARNING):
        warn_of_missing_checksum(folder, manifest)
    assert "without a checksum of its own" in caplog.text
    rewrite_v1 = {"consumed_samples": 0, "step": 2, "optimizer_steps": 5, "consumed_tokens": 31}
    for name, value in rewrite_v1.items():
        before = (folder / MANIFEST).read_text()
        (folder / MANIFEST).write_text(json.dumps(_with_counter(json.loads(before), name, value)))
        with pytest.raises(CheckpointError):
            read_manifest(folder)
        (folder / MANIFEST).write_text(before)


def _with_counter(content: dict[str, Any], name: str, value: int) -> dict[str, Any]:
    return {**content, "counters": {**content["counters"], name: value}}


def _record(name: str, **fields: object) -> Edit:
    return lambda content: content["files"].update({name: {"bytes": 3, "xxh3": "0" * 32, **fields}})


IMPOSSIBLE: dict[str, tuple[Edit, str]] = {
    "step": (lambda content: content["counters"].update(step=5), "holds the checkpoint of step 5, not of step 4"),
    "updates": (lambda content: content["counters"].update(optimizer_steps=5), "5 updates in 4 steps"),
    "negative": (lambda content: content["counters"].update(consumed_samples=-1), "consumed_samples is -1"),
    "huge": (lambda content: content["counters"].update(consumed_tokens=2**63), "consumed_tokens is"),
    "no samples": (lambda content: content["counters"].update(consumed_samples=0), "1024 tokens in 0 samples"),
    "no tokens": (lambda content: content["counters"].update(consumed_tokens=0), "0 tokens in 32 samples"),
    "text": (lambda content: content["counters"].update(step="4"), "step is '4', expected int"),
    "null": (lambda content: content["counters"].update(step=None), "step is None, expected int"),
    "lacking": (lambda content: content["counters"].pop("consumed_tokens"), "has no consumed_tokens"),
    "unknown": (lambda content: content.update(comment=""), "unknown fields: 'comment'"),
    "world size": (lambda content: content.update(world_size=11), "for 11 ranks"),
    "layout": (lambda content: content.update(layout="one rank"), "layout 'one rank'"),
    "files": (lambda content: content.update(files=[]), "files is"),
    "no record": (lambda content: content["files"].update(a=1), r"files\['a'\] is 1"),
    "size": (_record("a", bytes=-1), "the record of 'a' is none"),
    "hash": (_record("a", xxh3="0" * 31), "the record of 'a' is none"),
    "capitals": (_record("a", xxh3="A" * 32), "the record of 'a' is none"),
    "itself": (_record(MANIFEST), "lists itself"),
}
NAMES = [
    "",
    ".",
    "..",
    "/etc/hostname",
    "../x",
    "a/../../x",
    "a//b",
    "./a",
    "a/",
    "a\\b",
    "a\0b",
    "\ud800",
    "tokenizer/..",
]


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_no_save_writes_is_refused_even_with_a_right_checksum(case: str, folder: Path) -> None:
    edit, complaint = IMPOSSIBLE[case]
    rewrite(folder, edit)
    with pytest.raises(CheckpointError, match=complaint):
        read_manifest(folder)


@pytest.mark.parametrize("name", NAMES)
def test_names_stay_in_the_folder(name: str, folder: Path) -> None:
    rewrite(folder, _record(name))
    with pytest.raises(CheckpointError, match="does not stay in the checkpoint's folder"):
        read_manifest(folder)


@pytest.mark.parametrize("part", ["__0_0.distcp", "optimizer"])
def test_links_stay_in_the_folder(part: str, folder: Path, tmp_path: Path) -> None:
    files = read_manifest(folder).files
    (folder / part).rename(tmp_path / "elsewhere")
    (folder / part).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"is a link to .*elsewhere.*, outside the checkpoint"):
        verify_files(folder, files)
    (folder / part).unlink()
    (tmp_path / "elsewhere").rename(folder / "kept")
    (folder / part).symlink_to("kept")
    verify_files(folder, files)


def test_the_folder_itself_may_be_a_link_and_have_any_name_that_does_not_lie(folder: Path, tmp_path: Path) -> None:
    expected = read_manifest(folder)
    for name in ("best", "step_00000004_copy"):
        (tmp_path / name).symlink_to(folder)
        assert read_manifest(tmp_path / name) == expected
        verify_files(tmp_path / name, expected.files)
    (tmp_path / "step_00000050").symlink_to(folder)
    moved = folder.rename(folder.with_name("step_00000060"))
    for lying in (tmp_path / "step_00000050", moved):
        lying.unlink() if lying.is_symlink() else None
        if not lying.exists():
            lying.symlink_to(moved)
        with pytest.raises(CheckpointError, match="holds the checkpoint of step 4, not of step"):
            read_manifest(lying)


def test_configuration_and_tokenizer_are_checked_before_they_are_read(folder: Path) -> None:
    assert config_file(folder) == folder / CONFIG
    assert tokenizer_path(folder) == folder / "tokenizer"
    (marker,) = (folder / "tokenizer").iterdir()
    content = marker.read_bytes()
    for damaged in (content + b" ", b""):
        marker.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"tokenizer/.*bytes"):
            tokenizer_path(folder)
    marker.write_bytes(content)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"not part of the checkpoint: tokenizer/tokenizer\.json"):
        tokenizer_path(folder)
    (folder / CONFIG).write_text((folder / CONFIG).read_text().replace("num_layers: 4", "num_layers: 8"))
    for read in (read_config, config_file):
        with pytest.raises(CheckpointError, match=r"config\.yaml was changed"):
            read(folder)


def test_the_vocabulary_is_that_of_the_configuration(folder: Path) -> None:
    rewrite(folder, lambda content: content.update(vocab_size=VOCAB_SIZE - 1))
    with pytest.raises(CheckpointError, match=rf"vocab_size {VOCAB_SIZE - 1}, config\.yaml has .* {VOCAB_SIZE}"):
        read_config(folder)


def test_a_folder_that_cannot_be_read_is_an_error_of_the_user(folder: Path) -> None:
    files = read_manifest(folder).files
    shard = folder / "__0_0.distcp"
    shard.unlink()
    os.mkfifo(shard)  # reading it would wait for ever
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is missing"):
        verify_files(folder, files)
