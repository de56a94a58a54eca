"""Checkpoints that somebody has tampered with: pickles that would make a folder, wherever a file could hold one."""

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash

from megatron_7b.checkpoint.index import parse_index
from megatron_7b.checkpoint.manifest import MANIFEST
from megatron_7b.checkpoint.records import FileRecord
from megatron_7b.config.schema import RunConfig
from megatron_7b.runtime.strict_json import CHECKSUM, checksum
from tests.support.tiny_runs import build


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self._marker),)


def plant(file: Path, marker: Path) -> None:
    """Put a pickle into a file; into each part of a shard, where the index says that one begins."""
    raw = pickle.dumps(Bomb(marker))
    if file.suffix == ".distcp":
        saved = io.BytesIO()
        torch.save(Bomb(marker), saved)
        _plant_in_parts(file, [raw, saved.getvalue()])
    elif file.suffix == ".pt":
        torch.save({"args": Bomb(marker)}, file)
    elif file.suffix == ".yaml":
        file.write_text(f"model: !!python/object/apply:os.mkdir ['{marker}']\n")
    else:
        file.write_bytes(raw)


def _plant_in_parts(shard: Path, pickles: list[bytes]) -> None:
    content = bytearray(shard.read_bytes() if shard.exists() else b"")
    index = shard.with_name(".metadata").read_bytes()
    beside = {path.name: FileRecord(path.stat().st_size, "") for path in shard.parent.iterdir()}
    parts = parse_index(index, beside)
    sections = [chunk.section for tensor in parts.tensors.values() for chunk in tensor.chunks]
    for number, section in enumerate([*sections, *parts.objects.values()]):
        planted = pickles[number % len(pickles)]
        if section.file == shard.name and len(planted) <= section.length:
            content[section.start : section.start + section.length] = planted.ljust(section.length, b"\0")
    shard.write_bytes(content or pickles[0])


def change_record(folder: Path, name: str, *, deleted: bool) -> None:
    """Delete a file's record, or make it fit what the file holds now; the manifest's checksum is right again."""
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    if deleted:
        content["files"].pop(name, None)
    else:
        data = (folder / name).read_bytes()
        content["files"][name] = {"bytes": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)}
    content[CHECKSUM] = checksum(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def read_everything(config: RunConfig, folder: Path, *, verify: bool) -> dict[str, str]:
    """Entry point of a rank: what each way to read a checkpoint raised, "" where it raised nothing."""
    from megatron_7b.checkpoint import read_config, tokenizer_path
    from megatron_7b.checkpoint.load import load_checkpoint, load_weights
    from megatron_7b.checkpoint.weights import CheckpointWeights
    from megatron_7b.errors import MegatronError

    trainer = build(config)
    ways: dict[str, Callable[[], object]] = {
        "configuration": lambda: read_config(folder),
        "tokenizer": lambda: tokenizer_path(folder),
        "tensors": lambda: dict(CheckpointWeights(folder, verify=verify)),
        "weights": lambda: load_weights(folder, trainer.model, verify=verify),
        "start": lambda: load_weights(folder, trainer.model, trainer.optimizer, verify=verify),
        "resume": lambda: load_checkpoint(
            folder, chunks=trainer.model, optimizer=trainer.optimizer, layout=trainer.layout, verify=verify
        ),
    }
    answers = {}
    for name, read in ways.items():
        try:
            read()
            answers[name] = ""
        except MegatronError as error:
            answers[name] = str(error)
    return answers
