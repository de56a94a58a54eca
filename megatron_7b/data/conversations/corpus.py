"""Conversations on disk: a corpus like any other, a document each, and beside it `PREFIX.mask`.

The mask says how much each token of the `.bin` counts as a prediction: float16 in the order of the tokens, 0 for those
that only give context.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_7b import __version__
from megatron_7b.data.conversations.reading import read_conversations
from megatron_7b.data.conversations.trained import ConversationEncoder
from megatron_7b.data.corpus.fingerprint import spot_hash
from megatron_7b.data.corpus.indexed_dataset import IndexedDataset, token_dtype_for
from megatron_7b.data.corpus.manifest import EngineFacts, FileFacts, Manifest, describe_tokenizer
from megatron_7b.data.corpus.publish import MASK_SUFFIX, get_suffixed, publish, remove_temporary
from megatron_7b.data.preprocess.output import CorpusOutput
from megatron_7b.errors import DataFormatError
from megatron_7b.files import flush_to_disk
from megatron_7b.tokenizer import Tokenizer

_MASK_DTYPE = np.dtype("<f2")


def write_conversations(
    file: Path,
    prefix: str,
    encoder: ConversationEncoder,
    tokenizer: Tokenizer,
    *,
    options: Mapping[str, Any],
    command: Sequence[str] = (),
) -> Manifest:
    """Encode a file of conversations into a corpus; nothing has its final name before all of it is complete.

    Args:
        file: JSONL, see `formats`.
        prefix: Path of the files to write, without extension.
        encoder: What spells conversations out, and says what is trained.
        tokenizer: The encoder's.
        options: For the manifest: what else decided the content.
        command: For the manifest.

    Raises:
        DataFormatError: Some of the conversations cannot be used; all of them are named.
    """
    dtype = token_dtype_for(tokenizer.vocab_size)
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    output = CorpusOutput(prefix, dtype, tokenizer.vocab_size)
    mask_file = get_suffixed(prefix, f"{MASK_SUFFIX}.tmp")
    digest = xxhash.xxh3_128()
    try:
        with mask_file.open("wb") as masks:
            for _, one in read_conversations(file, encoder.encode):
                output.add(one.ids.astype(dtype), np.array([len(one.ids)]), None)
                mask = one.loss_mask.astype(_MASK_DTYPE).tobytes()
                digest.update(mask)
                masks.write(mask)
        flush_to_disk(mask_file)
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
        mask=FileFacts(size=mask_file.stat().st_size, xxh3_128=digest.hexdigest(), spots=spot_hash(mask_file)),
        options=dict(options),
        engine=EngineFacts(name="conversations"),
        sources=[{"path": str(file.absolute()), "size": file.stat().st_size}],
        bad_records=[],
        command=list(command),
        version=__version__,
    )
    manifest.write(get_suffixed(prefix, ".json.tmp"))
    publish(prefix)
    return manifest


class ConversationCorpus:
    """A corpus with its mask; both are mapped.

    Args:
        prefix: Of its files.

    Raises:
        DataFormatError: A file is missing or damaged, or the mask is not of this corpus.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.dataset = IndexedDataset(prefix)
        file = get_suffixed(self.dataset.prefix, MASK_SUFFIX)
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            raise DataFormatError(
                f"{self.dataset.prefix} is a corpus of text: it has no {file.name}, which says what is trained",
                hint="give the JSONL file of the conversations",
            ) from None
        expected = self.dataset.num_tokens * _MASK_DTYPE.itemsize
        if size != expected:
            raise DataFormatError(
                f"{file} has {size:,} bytes, expected {expected:,}, two for each token",
                hint="write the corpus again",
            )
        self._mask = np.memmap(file, _MASK_DTYPE, "r") if size else np.empty(0, _MASK_DTYPE)
        self.lengths = self.dataset.document_lengths()
        self._starts = np.cumsum(self.lengths) - self.lengths

    def conversation(self, number: int, length: int) -> tuple[NDArray[np.integer], NDArray[np.float16]]:
        """Return the first tokens of a conversation and how much each counts, [length] each."""
        start = self._starts[number]
        return self.dataset.document(number)[:length], self._mask[start : start + length]

    def cut_lengths(self, longest: int) -> NDArray[np.int64]:
        """Return how many tokens of each conversation to keep, [conversations].

        Longer ones end with the last trained message that fits, so that no reply is learned without its end; if not
        even the first one fits, they are cut anywhere.

        Args:
            longest: Most tokens.
        """
        kept = np.minimum(self.lengths, longest)
        for number in np.flatnonzero(self.lengths > longest):
            _, mask = self.conversation(int(number), longest + 1)
            ends = np.flatnonzero((mask[:-1] != 0) & (mask[1:] == 0))
            if len(ends):
                kept[number] = ends[-1] + 1
        return kept
