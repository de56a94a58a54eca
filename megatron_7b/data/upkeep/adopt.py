"""A manifest for a corpus that has none, such as one from Megatron's tool."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from megatron_7b import __version__
from megatron_7b.data.corpus.indexed_dataset import IndexedDataset, resolve_prefix
from megatron_7b.data.corpus.manifest import Counts, EngineFacts, FileFacts, Manifest, describe_tokenizer
from megatron_7b.data.corpus.manifest_reader import manifest_path
from megatron_7b.data.corpus.scan import (
    Advance,
    ScannedBin,
    count_empty_documents,
    document_of,
    scan_bin,
    scan_file,
    tell_nobody,
)
from megatron_7b.errors import ConfigError, DataFormatError
from megatron_7b.tokenizer import Tokenizer

_WRITTEN_TYPES = (np.dtype(np.uint16), np.dtype(np.int32))


def adopt_corpus(
    prefix: str,
    tokenizer: Tokenizer,
    *,
    overwrite: bool = False,
    advance: Advance = tell_nobody,
    command: Sequence[str] = (),
) -> Manifest:
    """Check a corpus completely and write `PREFIX.json`, beside and then renamed.

    The origin of the corpus (sources, options, engine) is not recorded in its files, so the manifest leaves it out.

    Args:
        prefix: Of an existing corpus.
        tokenizer: The one that wrote it. Every id is checked against its vocabulary; whether it is the right one only
            shows in the text that `data show` prints.
        overwrite: Replace an existing manifest.
        advance: Told, from any thread, of bytes that have been read.
        command: For the manifest.

    Raises:
        ConfigError: There is a manifest already.
        DataFormatError: The corpus is damaged, its ids are neither uint16 nor int32, or one is beyond the vocabulary.
    """
    prefix = resolve_prefix(prefix)
    file = manifest_path(prefix)
    if file.exists() and not overwrite:
        raise ConfigError(f"{file} exists", hint="`megatron-7b data verify` checks it; --overwrite replaces it")
    dataset = IndexedDataset(prefix, verify=True)
    if dataset.dtype not in _WRITTEN_TYPES:
        raise DataFormatError(
            f"{prefix}.idx says that ids are {dataset.dtype}, expected uint16 or int32",
            hint="write the corpus again with `megatron-7b preprocess`",
        )
    scan, idx = _scan(dataset, tokenizer, advance)
    _check_ids(dataset, tokenizer, scan)
    manifest = Manifest(
        tokenizer=describe_tokenizer(tokenizer),
        counts=Counts(
            documents=dataset.num_documents,
            sequences=len(dataset),
            tokens=dataset.num_tokens,
            empty_documents=count_empty_documents(dataset),
            bad_records=0,
            min_id=scan.ids.min_id,
            max_id=scan.ids.max_id,
        ),
        token_bytes=dataset.dtype.itemsize,
        bin=scan.file,
        idx=idx,
        options={},
        engine=EngineFacts(name="unknown"),
        sources=[],
        bad_records=[],
        command=list(command),
        version=__version__,
    )
    manifest.save(file)
    return manifest


def _scan(dataset: IndexedDataset, tokenizer: Tokenizer, advance: Advance) -> tuple[ScannedBin, FileFacts]:
    with ThreadPoolExecutor(1, "adopt") as pool:
        idx = pool.submit(scan_file, Path(f"{dataset.prefix}.idx"), advance)
        return scan_bin(Path(f"{dataset.prefix}.bin"), dataset.dtype, tokenizer.vocab_size, advance), idx.result()


def _check_ids(dataset: IndexedDataset, tokenizer: Tokenizer, scan: ScannedBin) -> None:
    if scan.ids.first_outside is None:
        return
    position, value = scan.ids.first_outside
    raise DataFormatError(
        f"{dataset.prefix}.bin has {scan.ids.num_outside} ids outside of 0 to {tokenizer.vocab_size - 1}, the "
        f"vocabulary of {tokenizer.path or tokenizer.kind}; the first is {value}, token {position}, in document "
        f"{document_of(dataset, position)}",
        hint="name the tokenizer that wrote the corpus",
    )
