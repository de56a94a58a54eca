"""Records on disk: a corpus like any other, a document each, and beside it what a task needs to know of them.

A document has a sequence for each part of its record: a conversation has one, a preference has the chosen and the
rejected reply. `PREFIX.mask` has a number per token of the `.bin` (float16): how much it counts as a prediction, or its
class. `PREFIX.values` has the same count of numbers for each record (float32): its label or labels, its answer.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_7b import __version__
from megatron_7b.data.corpus.fingerprint import spot_hash
from megatron_7b.data.corpus.indexed_dataset import IndexedDataset, token_dtype_for
from megatron_7b.data.corpus.manifest import EngineFacts, FileFacts, Manifest, describe_tokenizer
from megatron_7b.data.corpus.manifest_reader import load_manifest
from megatron_7b.data.corpus.publish import MASK_SUFFIX, VALUES_SUFFIX, get_suffixed, publish, remove_temporary
from megatron_7b.data.preprocess.output import CorpusOutput
from megatron_7b.errors import DataFormatError
from megatron_7b.files import flush_to_disk
from megatron_7b.tokenizer import Tokenizer

MASK_DTYPE = np.dtype("<f2")
"""Exact for whole numbers up to 2048, which is as many classes as tokens may have."""
VALUES_DTYPE = np.dtype("<f4")


@dataclass(frozen=True, eq=False)
class EncodedRecord:
    """A record as a model learns it.

    Attributes:
        sequences: Its parts, int [n_i] each.
        token_values: [sum of n_i], a number per token of all parts; None: this kind of records has none.
        values: [k], numbers of the record as a whole; None: this kind of records has none.
    """

    sequences: Sequence[NDArray[np.integer]]
    token_values: NDArray[np.floating] | None = None
    values: NDArray[np.floating] | None = None


def write_records(
    records: Iterable[EncodedRecord],
    prefix: str,
    tokenizer: Tokenizer,
    *,
    source: Path,
    kind: str,
    options: Mapping[str, Any],
    command: Sequence[str] = (),
) -> Manifest:
    """Write records as a corpus; nothing has its final name before all of it is complete.

    Args:
        records: All with token values or none, all with as many values.
        prefix: Path of the files to write, without extension.
        tokenizer: Whose ids they have.
        source: The file that they were read from, for the manifest.
        kind: What they are, in the plural; `check_kind` compares it.
        options: For the manifest: what else decided the content.
        command: For the manifest.

    Raises:
        DataFormatError: Whatever reading the records raises; nothing is left on the disk.
    """
    dtype = token_dtype_for(tokenizer.vocab_size)
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    output = CorpusOutput(prefix, dtype, tokenizer.vocab_size)
    try:
        with ExitStack() as held:
            mask, values = (_SideFile(prefix, suffix, held) for suffix in (MASK_SUFFIX, VALUES_SUFFIX))
            for record in records:
                lengths = np.array([len(part) for part in record.sequences], np.int32)
                ids = np.concatenate(record.sequences).astype(dtype)
                output.add(ids, np.array([len(ids)]), None if len(lengths) == 1 else [lengths])
                mask.add(record.token_values, MASK_DTYPE)
                values.add(record.values, VALUES_DTYPE)
        beside = {side.suffix: facts for side in (mask, values) if (facts := side.complete())}
        counts, bin_facts, idx_facts = output.complete()
    except BaseException:
        output.abort()
        remove_temporary(prefix)
        raise
    manifest = Manifest(
        tokenizer=describe_tokenizer(tokenizer),
        counts=counts,
        token_bytes=dtype.itemsize,
        bin=bin_facts,
        idx=idx_facts,
        beside=beside,
        options=dict(options),
        engine=EngineFacts(name=kind),
        sources=[{"path": str(source.absolute()), "size": source.stat().st_size}],
        bad_records=[],
        command=list(command),
        version=__version__,
    )
    manifest.write(get_suffixed(prefix, ".json.tmp"))
    publish(prefix)
    return manifest


class _SideFile:
    """One file of numbers on its way to disk; it is there only if the records have such numbers."""

    def __init__(self, prefix: str, suffix: str, held: ExitStack) -> None:
        self.suffix = suffix
        self._file = get_suffixed(prefix, f"{suffix}.tmp")
        self._held = held
        self._stream: BinaryIO | None = None
        self._digest = xxhash.xxh3_128()

    def add(self, numbers: NDArray[np.floating] | None, dtype: np.dtype[Any]) -> None:
        """Append numbers."""
        if numbers is None:
            return
        if self._stream is None:
            self._stream = self._held.enter_context(self._file.open("wb"))
        content = numbers.astype(dtype).tobytes()
        self._digest.update(content)
        self._stream.write(content)

    def complete(self) -> FileFacts | None:
        """Bring a closed file to the disk, and say what it is; None if nothing was added."""
        if self._stream is None:
            return None
        flush_to_disk(self._file)
        size, spots = self._file.stat().st_size, spot_hash(self._file)
        return FileFacts(size=size, xxh3_128=self._digest.hexdigest(), spots=spots)


class RecordCorpus:
    """A corpus with what is beside it; all of it is mapped.

    Args:
        prefix: Of its files.

    Attributes:
        dataset: The tokens: a document is a record, a sequence one of its parts.
        lengths: int64 [records], tokens of each record.

    Raises:
        DataFormatError: A file is missing or damaged, or is not of this corpus.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.dataset = IndexedDataset(prefix)
        self.lengths = self.dataset.document_lengths()
        self._starts = np.cumsum(self.lengths) - self.lengths
        mask, values = (get_suffixed(self.dataset.prefix, suffix) for suffix in (MASK_SUFFIX, VALUES_SUFFIX))
        if not mask.exists() and not values.exists():
            raise DataFormatError(
                f"{self.dataset.prefix} is a corpus of text: it has neither {mask.name} nor {values.name}, which say "
                "what is trained",
                hint="give the JSONL file of the records",
            )
        self._token_values = self._mapped(mask, MASK_DTYPE, self.dataset.num_tokens) if mask.exists() else None
        self._values: NDArray[np.floating] | None = None
        self._further: NDArray[np.floating] | None = None
        if values.exists():
            per_record = values.stat().st_size // VALUES_DTYPE.itemsize // max(1, self.num_records)
            flat = self._mapped(values, VALUES_DTYPE, per_record * self.num_records)
            self._values = flat.reshape(self.num_records, per_record)

    @property
    def num_records(self) -> int:
        """Records."""
        return self.dataset.num_documents

    @property
    def num_values(self) -> int:
        """Numbers that each record has as a whole."""
        return sum(numbers.shape[1] for numbers in (self._values, self._further) if numbers is not None)

    def join(self, numbers: NDArray[np.floating]) -> None:
        """Give each record further numbers after those that it has, [records, m]; they replace earlier ones."""
        if len(numbers) != self.num_records:
            raise DataFormatError(
                f"there are further values of {len(numbers):,} records, but {self.dataset.prefix} has "
                f"{self.num_records:,}"
            )
        self._further = numbers

    def parts(self, number: int) -> NDArray[np.int32]:
        """Return the lengths of the parts of a record, [parts]."""
        return self.dataset.sequence_lengths[slice(*self.dataset.document_indices[number : number + 2])]

    def tokens(self, number: int, length: int | None = None) -> NDArray[np.integer]:
        """Return the first tokens of a record, or all, [length]."""
        start = int(self._starts[number])
        return self.dataset.tokens(start, start + int(self.lengths[number] if length is None else length))

    def token_values(self, number: int, length: int | None = None) -> NDArray[np.float32]:
        """Return the numbers of the first tokens of a record, or of all, [length]; zeros if it has none."""
        kept = int(self.lengths[number] if length is None else length)
        if self._token_values is None:
            return np.zeros(kept, np.float32)
        start = int(self._starts[number])
        return self._token_values[start : start + kept].astype(np.float32)

    def values(self, number: int) -> NDArray[np.float32]:
        """Return the numbers of a record as a whole, [num_values]."""
        known = [numbers[number] for numbers in (self._values, self._further) if numbers is not None]
        return np.concatenate(known).astype(np.float32) if known else np.empty(0, np.float32)

    def _mapped(self, file: Path, dtype: np.dtype[Any], count: int) -> NDArray[np.floating]:
        size, expected = file.stat().st_size, count * dtype.itemsize
        if size != expected:
            unit = "two for each token" if dtype == MASK_DTYPE else "as many for each record"
            raise DataFormatError(
                f"{file} has {size:,} bytes, expected {expected:,}, {unit}", hint="write the corpus again"
            )
        return np.memmap(file, dtype, "r") if size else np.empty(0, dtype)


def check_kind(prefix: str, kind: str) -> None:
    """Refuse a corpus of another kind of records; one without a manifest is believed.

    Raises:
        DataFormatError: It is of another kind, or of text.
    """
    manifest = load_manifest(prefix)
    if manifest is None or manifest.engine.name == kind:
        return
    found = manifest.engine.name if manifest.beside else "text"
    raise DataFormatError(
        f"{prefix} is a corpus of {found}, expected {kind}", hint="give the JSONL file of the records"
    )
