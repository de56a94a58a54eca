"""Shard i of N of the input: consecutive records, so that N shards one after the other are one run.

All files follow one another on one axis of bytes, which is cut into N equal parts. A record of an uncompressed
JSONL file belongs to the part in which it begins, a row group of parquet or a compressed file to the part in which its
middle is. No shard needs to know anything of the others.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import xxhash

from megatron_7b.data.reading.blocks import TextDocuments
from megatron_7b.data.reading.sources import Source
from megatron_7b.errors import ConfigError


@dataclass(frozen=True)
class Shard:
    """One of `count` parts, numbered from 0."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `i/N`.

        Raises:
            ConfigError: It is not that, or i is not below N.
        """
        if (match := re.fullmatch(r"(\d+)/(\d+)", text)) is None:
            raise ConfigError(f"--shard {text}: expected i/N, such as 0/16", hint="or none, for all of the input")
        index, count = map(int, match.groups())
        if index >= count:
            raise ConfigError(f"--shard {text}: shards are numbered from 0, so the last of {count} is {count - 1}")
        return cls(index, count)

    @property
    def suffix(self) -> str:
        """What the output's name gets, so that names sort as shards do."""
        return f"_{self.index:05d}-of-{self.count:05d}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def find_slurm_shard(environment: Mapping[str, str]) -> tuple[Shard, str] | None:
    """Return the shard of this process in a Slurm job array or a step of several tasks, and the variables that say so.

    A batch script's own shell and a shell that salloc opened are tasks of no step, or of a step of one: for them there
    is no shard, whatever was allocated.

    Raises:
        ConfigError: The array's numbers say nothing of how many parts there are.
    """
    index, count, names = 0, 1, []
    if "SLURM_ARRAY_TASK_ID" in environment:
        task, first, last, count = (
            int(environment.get(f"SLURM_ARRAY_TASK_{name}", 0)) for name in ("ID", "MIN", "MAX", "COUNT")
        )
        if first not in (0, 1) or last - first + 1 != count:
            raise ConfigError(
                f"the job array's {count} tasks from {first} to {last} don't say which of how many shards this is",
                hint="--shard i/N says it, or --shard none for all of the input",
            )
        index = task - first
        names.append("SLURM_ARRAY_TASK_ID, _COUNT")
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1)) if "SLURM_PROCID" in environment else 1
    if tasks > 1:
        index, count = index * tasks + int(environment["SLURM_PROCID"]), count * tasks
        names.append("SLURM_PROCID, SLURM_STEP_NUM_TASKS")
    return (Shard(index, count), " and ".join(names)) if count > 1 else None


def hash_inputs(sources: Sequence[Source]) -> str:
    """Return a hash of names and sizes, the same for all shards of one run, wherever its files are mounted."""
    return xxhash.xxh3_128_hexdigest(json.dumps([(source.path.name, source.size) for source in sources]).encode())


def take_shard(sources: Sequence[Source], shard: Shard, text_documents: TextDocuments) -> list[Source]:
    """Return the sources that a shard reads, whole or in part."""
    total = sum(source.size for source in sources)
    begin, end = total * shard.index // shard.count, total * (shard.index + 1) // shard.count
    taken, offset = [], 0
    for source in sources:
        first, last = max(0, begin - offset), min(source.size, end - offset)
        offset += source.size
        if first >= last:
            continue
        if (first, last) == (0, source.size):
            taken.append(source)
        elif source.can_be_cut(text_documents) or source.format == ".parquet":
            taken.append(Source(source.path, (first, last)))
        elif first <= source.size // 2 < last:
            taken.append(source)
    return taken
