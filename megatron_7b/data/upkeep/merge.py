"""Joining corpora, in order, by streaming: the files that one preprocessing run over the same documents writes.

The .bin is the parts' ids one after the other. In the .idx the three tables are joined table by table; what refers to a
position is moved by what comes before the part. Both are copied in pieces, so memory does not grow with the corpora.
Every part is compared with the hashes of its manifest on the way: no damage gets a valid hash of its own.
"""

import itertools
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_7b import __version__
from megatron_7b.data.corpus.fingerprint import spot_hash
from megatron_7b.data.corpus.indexed_dataset import IndexedDataset, resolve_prefix
from megatron_7b.data.corpus.manifest import Counts, EngineFacts, FileFacts, Manifest
from megatron_7b.data.corpus.manifest_reader import load_manifest, manifest_path
from megatron_7b.data.corpus.publish import PUBLISHED, find_existing, get_suffixed, publish, remove_temporary
from megatron_7b.data.corpus.scan import Advance, read_chunks, scan_file, tell_nobody
from megatron_7b.data.preprocess.journal import hash_job
from megatron_7b.data.preprocess.shards import Shard
from megatron_7b.errors import ConfigError, DataFormatError
from megatron_7b.runtime.output_paths import check_can_create

_HEADER_BYTES = 34
_ENTRIES_AT_ONCE = 1 << 19


@dataclass(frozen=True)
class _Part:
    dataset: IndexedDataset
    manifest: Manifest

    @property
    def prefix(self) -> str:
        return self.dataset.prefix

    @property
    def num_sequences(self) -> int:
        return len(self.dataset)


def merge_corpora(
    prefixes: Sequence[str], output: str, *, advance: Advance = tell_nobody, command: Sequence[str] = ()
) -> Manifest:
    """Join corpora in the order given, into what one preprocessing run over the same documents writes.

    Args:
        prefixes: Of existing corpora with manifests.
        output: Prefix of the new one, taken as it is. If it holds these very corpora already, nothing is done.
        advance: Told, from any thread, of bytes that have been read.
        command: For the manifest.

    Raises:
        ConfigError: The output exists or has no room, a part is given twice, or parts don't belong together.
        DataFormatError: A part is damaged or has no manifest.
    """
    merge = Merge(prefixes, output)
    written = load_manifest(output) if merge.is_done else merge.run(advance=advance, command=command)
    assert written is not None
    return written


class Merge:
    """Some corpora that can be joined: making it has checked everything that shows before their ids are read."""

    def __init__(self, prefixes: Sequence[str], output: str) -> None:
        """Open all parts.

        Args:
            prefixes: Of existing corpora with manifests.
            output: Prefix of the new one, taken as it is.

        Raises:
            ConfigError: The output exists or has no room, a part is given twice, or parts don't belong together.
            DataFormatError: A part is damaged or has no manifest.
        """
        self.output = output
        self._parts = [_open_part(prefix) for prefix in prefixes]
        _check_parts(self._parts)
        _check_shards(self._parts)
        self._job_hash = hash_job(
            {"parts": [[one.manifest.bin.xxh3_128, one.manifest.idx.xxh3_128] for one in self._parts]}
        )
        self.is_done = self._find_own_output()
        """Whether an earlier call has already joined these very parts."""
        if not self.is_done:
            self._check_output()

    @property
    def num_bytes(self) -> int:
        """Bytes that are to be copied."""
        return sum(part.manifest.bin.size + part.manifest.idx.size for part in self._parts)

    def find_differences(self) -> list[str]:
        """Return the options that parts were written with differently, in words: odd, but no reason to refuse."""
        found = []
        for name in ("level", "append_eod", "prepend_bos"):
            values = {str(part.manifest.options[name]) for part in self._parts if name in part.manifest.options}
            if len(values) > 1:
                found.append(f"the parts were written with different values of {name}: {', '.join(sorted(values))}")
        return found

    def run(self, *, advance: Advance, command: Sequence[str] = ()) -> Manifest:
        """Write the joined corpus; whatever stops it leaves nothing, or what the next call replaces.

        Raises:
            DataFormatError: A part is not what its manifest says.
        """
        try:
            Path(self.output).parent.mkdir(parents=True, exist_ok=True)
            bin_facts = _write(get_suffixed(self.output, ".bin.tmp"), self._copy_bins(advance))
            idx_facts = _write(get_suffixed(self.output, ".idx.tmp"), self._join_indices(advance))
            manifest = _join_manifests(self._parts, bin_facts, idx_facts, command, self._job_hash)
            manifest.write(get_suffixed(self.output, ".json.tmp"))
            publish(self.output)
        except BaseException:
            remove_temporary(self.output)
            for suffix in PUBLISHED:  # there were none before
                get_suffixed(self.output, suffix).unlink(missing_ok=True)
            raise
        return manifest

    def _find_own_output(self) -> bool:
        if len(find_existing(self.output)) < len(PUBLISHED):
            return False
        try:
            manifest = load_manifest(self.output)
        except DataFormatError:
            return False
        return manifest is not None and manifest.job_hash == self._job_hash

    def _check_output(self) -> None:
        if existing := find_existing(self.output):
            raise ConfigError(
                f"the output exists: {', '.join(map(str, existing))}", hint="choose another, or remove these"
            )
        check_can_create(Path(self.output), "the output")
        folder = next(folder for folder in Path(self.output).absolute().parents if folder.exists())
        free = shutil.disk_usage(folder).free
        if free < self.num_bytes:
            raise ConfigError(
                f"the joined corpus takes {self.num_bytes:,} bytes, and {folder} has {free:,} left",
                hint="choose an output on another disk",
            )

    def _copy_bins(self, advance: Advance) -> Iterator[memoryview]:
        for part in self._parts:
            file = Path(f"{part.prefix}.bin")
            digest = xxhash.xxh3_128()
            with file.open("rb", buffering=0) as stream:
                for chunk in read_chunks(stream, advance):
                    digest.update(chunk.data)
                    yield chunk.data
            _check_hash(file, part.manifest.bin.xxh3_128, digest.hexdigest())

    def _join_indices(self, advance: Advance) -> Iterator[memoryview | bytes]:
        parts = [part.dataset for part in self._parts]
        with Path(f"{parts[0].prefix}.idx").open("rb") as stream:
            mark_and_type = stream.read(18)
        num_sequences, num_documents = sum(map(len, parts)), sum(part.num_documents for part in parts)
        yield mark_and_type + struct.pack("<QQ", num_sequences, num_documents + 1)
        first_byte = _offsets(parts, lambda part: part.corpus.bin_bytes)
        first_sequence = _offsets(parts, len)
        for part in parts:
            yield from _shifted(part.sequence_lengths, 0)
            advance(part.corpus.idx_bytes)
        for part, offset in zip(parts, first_byte, strict=True):
            yield from _shifted(part.corpus.sequence_pointers, offset)
        for part, offset in zip(parts, first_sequence, strict=True):
            # The last bound of a part is the first one of the next.
            yield from _shifted(part.document_indices[:-1], offset)
        yield struct.pack("<q", num_sequences)


def _open_part(prefix: str) -> _Part:
    resolved = resolve_prefix(prefix)
    manifest = load_manifest(resolved)
    if manifest is None:
        raise DataFormatError(
            f"{manifest_path(resolved)} does not exist, so nothing says which tokenizer wrote {resolved}",
            hint=f"`megatron-7b data adopt {resolved} --tokenizer DIR` writes it",
        )
    dataset = IndexedDataset(resolved, verify=True)
    corpus = dataset.corpus
    plain = _HEADER_BYTES + 12 * len(dataset) + 8 * (dataset.num_documents + 1)
    if not corpus.is_contiguous or corpus.idx_bytes != plain:
        raise DataFormatError(
            f"{resolved}.idx is not of a plain text corpus: its sequences have modes, or leave gaps in the .bin",
            hint="write the corpus again with `megatron-7b preprocess`",
        )
    file = Path(f"{resolved}.idx")
    _check_hash(file, manifest.idx.xxh3_128, scan_file(file, lambda _: None).xxh3_128)
    return _Part(dataset, manifest)


def _check_parts(parts: Sequence[_Part]) -> None:
    first, seen = parts[0], set()
    for part in parts:
        real = os.path.realpath(part.prefix)
        if real in seen:
            raise ConfigError(f"{part.prefix} is given twice", hint="a blend reads a corpus more often, by its weight")
        seen.add(real)
        if part.dataset.dtype != first.dataset.dtype:
            raise ConfigError(
                f"{first.prefix} has ids of type {first.dataset.dtype} ({first.dataset.dtype.itemsize} bytes), "
                f"{part.prefix} of type {part.dataset.dtype} ({part.dataset.dtype.itemsize} bytes)",
                hint="preprocess both with the same tokenizer, or train on a blend of the two",
            )
        ours, theirs = (replace(one.manifest.tokenizer, path=None) for one in (first, part))
        if ours != theirs:
            differing = [name for name, value in asdict(ours).items() if value != getattr(theirs, name)]
            raise ConfigError(
                f"{first.prefix} and {part.prefix} were written with different tokenizers: "
                + "; ".join(f"{name} {getattr(ours, name)} and {getattr(theirs, name)}" for name in differing),
                hint="preprocess both with the same tokenizer",
            )


def _check_shards(parts: Sequence[_Part]) -> None:
    """Shards of one run must be all of them, in order; other corpora may be joined as one likes."""
    names = [part.manifest.options.get("shard") for part in parts]
    if not any(names):
        return
    unlike = next((part.prefix for part, name in zip(parts, names, strict=True) if name is None), None)
    if unlike is not None:
        raise ConfigError(f"{unlike} is no shard, but others of the parts are", hint="join all shards first")
    shards = [Shard.parse(str(name)) for name in names]
    expected = [Shard(index, shards[0].count) for index in range(shards[0].count)]
    if shards == expected:
        _check_one_run(parts)
        return
    if missing := [str(one) for one in expected if one not in shards]:
        raise ConfigError(
            f"shards {', '.join(missing[:10])} are not among the {len(parts)} parts",
            hint="write them first; without them documents would be lost",
        )
    raise ConfigError(
        f"the shards come in the order {', '.join(map(str, shards[:10]))}",
        hint="give each once and in order, so that the result is what one run writes",
    )


def _check_one_run(shards: Sequence[_Part]) -> None:
    first = shards[0].manifest.options
    for part in shards[1:]:
        options = part.manifest.options
        if differing := [name for name in first if name != "shard" and options.get(name) != first[name]]:
            raise ConfigError(
                f"{shards[0].prefix} and {part.prefix} are shards of different runs: of other {', '.join(differing)}",
                hint="write all shards with the same command",
            )


def _check_hash(file: Path, expected: str, found: str) -> None:
    if expected != found:
        raise DataFormatError(
            f"{file} is not what its manifest says: xxh3_128 {found}, expected {expected}",
            hint="the file is damaged, or was written anew: preprocess it again",
        )


def _offsets(parts: Sequence[IndexedDataset], size: Callable[[IndexedDataset], int]) -> list[int]:
    return list(itertools.accumulate((size(part) for part in parts), initial=0))[:-1]


def _shifted(table: NDArray[np.integer[Any]], offset: int) -> Iterator[memoryview]:
    for first in range(0, len(table), _ENTRIES_AT_ONCE):
        yield memoryview(table[first : first + _ENTRIES_AT_ONCE] + table.dtype.type(offset)).cast("B")


def _write(file: Path, pieces: Iterator[memoryview] | Iterator[memoryview | bytes]) -> FileFacts:
    """Write all pieces; they are on disk when this returns."""
    digest, size = xxhash.xxh3_128(), 0
    stream: BinaryIO
    with file.open("wb") as stream:
        for piece in pieces:
            stream.write(piece)
            digest.update(piece)
            size += len(piece)
        stream.flush()
        os.fsync(stream.fileno())
    return FileFacts(size=size, xxh3_128=digest.hexdigest(), spots=spot_hash(file))


def _join_manifests(
    parts: Sequence[_Part], bin_facts: FileFacts, idx_facts: FileFacts, command: Sequence[str], job_hash: str
) -> Manifest:
    manifests = [part.manifest for part in parts]
    common = {
        name: value
        for name, value in manifests[0].options.items()
        if name not in ("merged_from", "shard", "inputs") and all(one.options.get(name) == value for one in manifests)
    }
    origins = [
        {"prefix": part.prefix, "documents": part.manifest.counts.documents, "tokens": part.manifest.counts.tokens}
        for part in parts
    ]
    return Manifest(
        tokenizer=manifests[0].tokenizer,
        counts=_join_counts([one.counts for one in manifests]),
        token_bytes=manifests[0].token_bytes,
        bin=bin_facts,
        idx=idx_facts,
        options={**common, "merged_from": origins},
        engine=_join_engines([one.engine for one in manifests]),
        sources=[source for one in manifests for source in one.sources],
        bad_records=[record for one in manifests for record in one.bad_records],
        command=list(command),
        version=__version__,
        job_hash=job_hash,
    )


def _join_counts(counts: Sequence[Counts]) -> Counts:
    return Counts(
        documents=sum(one.documents for one in counts),
        sequences=sum(one.sequences for one in counts),
        tokens=sum(one.tokens for one in counts),
        empty_documents=sum(one.empty_documents for one in counts),
        bad_records=sum(one.bad_records for one in counts),
        min_id=min((one.min_id for one in counts if one.min_id is not None), default=None),
        max_id=max((one.max_id for one in counts if one.max_id is not None), default=None),
    )


def _join_engines(engines: Sequence[EngineFacts]) -> EngineFacts:
    return EngineFacts(
        name=", ".join(dict.fromkeys(engine.name for engine in engines)),
        checked_texts=sum(engine.checked_texts for engine in engines),
        checked_characters=sum(engine.checked_characters for engine in engines),
        replaced_documents=sum(engine.replaced_documents for engine in engines),
    )
