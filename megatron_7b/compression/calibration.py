"""Text to calibrate with, as token ids: what activations look like is measured on it.

The file may be text of any kind that `preprocess` reads (`.txt`, `.jsonl` and `.parquet` with a key `text`, compressed
or not), conversations in JSON lines (`messages`, `prompt` and `completion`, and the other formats of fine-tuning),
which the tokenizer's chat template spells out, or the prefix of a tokenized corpus.
"""

import json
import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_7b.data.conversations.formats import find_format
from megatron_7b.data.conversations.reading import read_conversations
from megatron_7b.data.corpus.indexed_dataset import IndexedDataset
from megatron_7b.data.reading.sources import find_sources
from megatron_7b.data.reading.spread import SpreadReader
from megatron_7b.data.records.reading import RecordError
from megatron_7b.data.samples.corpus_tokenizer import read_corpus_tokenizer
from megatron_7b.errors import ConfigError, DataFormatError, PathError
from megatron_7b.tokenizer import Tokenizer
from megatron_7b.tokenizer.chat_template import ChatTemplate

_CORPUS_ENDINGS = (".bin", ".idx")
_BYTES_PER_TOKEN = 16
"""Of text: more than almost every tokenizer needs, so that what is read is enough."""


def read_calibration(
    file: str | Path, tokenizer: Tokenizer, num_samples: int, seq_length: int, *, key: str = "text"
) -> list[list[int]]:
    """Return samples of text as token ids, the same ones at every call.

    Documents follow one another, each ended by the end-of-document token if the tokenizer has one; samples are cut
    out at equal distances, so that they are spread over all that was read, and do not overlap. Of a large file no more
    is read than needed, in blocks that are spread over it.

    Args:
        file: Text, records, or the prefix of a corpus.
        tokenizer: The model's.
        num_samples: Samples.
        seq_length: Tokens of each.
        key: Of a record that is no conversation: where its text is.

    Returns:
        `num_samples` lists of `seq_length` ids.

    Raises:
        ConfigError: A number is not positive, the file has too few tokens, the corpus was written with another
            tokenizer, or conversations need a chat template that the tokenizer does not have.
        DataFormatError: The file is damaged, or has no text.
        PathError: There is no such file.
    """
    if num_samples < 1 or seq_length < 1:
        raise ConfigError(
            f"calibration with {num_samples} samples of {seq_length} tokens, expected at least one of each"
        )
    prefix = _corpus_prefix(Path(file))
    if prefix is not None:
        return _cut(_of_corpus(prefix, tokenizer), num_samples, seq_length, prefix)
    path = Path(file)
    if not path.exists():
        raise PathError(
            f"{path} does not exist, neither as a file nor as a corpus",
            hint="give a .txt or .jsonl file, or the PREFIX of PREFIX.bin and PREFIX.idx",
        )
    if path.is_file() and _holds_conversations(path, key):
        documents = _conversations(path, tokenizer)
    else:
        documents = _texts(path, tokenizer, key, num_samples * seq_length)
    end = [] if tokenizer.eod_id is None else [tokenizer.eod_id]
    ids = np.fromiter(chain.from_iterable(chain(document, end) for document in documents), np.int64)
    return _cut(ids, num_samples, seq_length, str(path))


def _corpus_prefix(path: Path) -> str | None:
    """Return the prefix if the path is that of a corpus, however much of its names was typed."""
    if path.suffix not in _CORPUS_ENDINGS and path.exists():
        return None
    text = str(path.with_suffix("")) if path.suffix in _CORPUS_ENDINGS else str(path)
    candidates = (text, f"{text}_text_document")
    return next((prefix for prefix in candidates if Path(f"{prefix}.idx").is_file()), None)


def _of_corpus(prefix: str, tokenizer: Tokenizer) -> NDArray[np.integer]:
    """Return all ids of a corpus, mapped rather than read."""
    known = read_corpus_tokenizer(prefix)
    if known is not None and known[1].identity != tokenizer.identity:
        raise ConfigError(
            f"{prefix} was written with tokenizer {known[1].identity}, the model's is {tokenizer.identity}",
            hint="calibrate with raw text, or preprocess it with the model's tokenizer",
        )
    corpus = IndexedDataset(prefix)
    return corpus.tokens(0, corpus.num_tokens)


def _holds_conversations(path: Path, key: str) -> bool:
    """Whether the first record is a conversation rather than a text."""
    if path.suffix not in (".jsonl", ".json", ".ndjson"):
        return False
    with path.open("rb") as stream:
        line = next((line for line in stream if line.strip()), b"")
    try:
        record = json.loads(line.decode("utf-8-sig"))
        if not isinstance(record, dict) or key in record:
            return False
        find_format(record)
    except (ValueError, RecordError):
        return False  # what reads texts says what is wrong with it
    return True


def _conversations(path: Path, tokenizer: Tokenizer) -> Iterator[list[int]]:
    template = ChatTemplate(tokenizer)
    for _, ids in read_conversations(
        path, lambda one: template.encode(template.render(one.conversation, add_generation_prompt=False))
    ):
        yield ids


def _texts(path: Path, tokenizer: Tokenizer, key: str, num_tokens: int) -> Iterator[list[int]]:
    reader = SpreadReader(find_sources([str(path)]), num_tokens * _BYTES_PER_TOKEN / 1e6)
    problem = None
    found = False
    for _, block in reader.read_blocks([key]):
        problem = problem or next(iter(block.bad), None)
        texts = [text for text in block.texts[0] if text.strip()]
        found = found or bool(texts)
        yield from tokenizer.encode_batch(texts)
    if not found:
        raise DataFormatError(
            f"{path} has no text to calibrate with"
            + (f"; the first record that cannot be used: {problem}" if problem else ""),
            hint=f'a line is such as {{"{key}": "Some text"}} or {{"messages": [{{"role": …}}]}}',
        )


def _cut(ids: NDArray[np.integer], num_samples: int, seq_length: int, source: str) -> list[list[int]]:
    """Cut samples out of the text at equal distances."""
    needed = num_samples * seq_length
    if len(ids) < needed:
        most = len(ids) // seq_length
        raise ConfigError(
            f"{source} has {len(ids):,} tokens, {num_samples:,} samples of {seq_length:,} need {needed:,}",
            hint=f"it is enough for {most} samples, held-out ones among them: ask for fewer, or shorter ones"
            if most
            else "give more text, or shorter samples",
        )
    starts = [math.floor(number * (len(ids) - seq_length) / max(1, num_samples - 1)) for number in range(num_samples)]
    return [ids[start : start + seq_length].tolist() for start in starts]
