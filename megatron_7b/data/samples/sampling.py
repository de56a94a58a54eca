"""The order in which a corpus is read: arithmetic instead of an index.

Megatron shuffles with tables of epochs × samples entries, built before the first step and cached next to the corpus.
Here sample i is computed from (seed, i) alone, so nothing has to be built or waited for, and no cache can be stale.
 `csrc/include/megatron_7b/token_stream.h` describes it exactly; in short:

- The T tokens of the split are a ring of whole documents. Each epoch reads the ring once, from the beginning of a
  document drawn for that epoch, and the epochs follow one another without a gap in one endless stream.
- Sample i, before shuffling, is inputs `[i s, (i + 1) s)` of that stream, and the same shifted by one as labels. **Each
  epoch therefore reads every token exactly once as an input**: nothing is dropped at an epoch's end, the last sample
  continues into the next epoch. As T is hardly ever a multiple of s, and the ring's beginning moves, cuts fall
  differently in each epoch.
- The samples that begin in an epoch are shuffled among themselves by a keyed bijection (a Feistel network with cycle
  walking), which needs no table.

Documents that are neighbours in the file stay neighbours within a sample; shuffle them when preprocessing if their
order carries meaning.
"""

import hashlib

from megatron_7b.data._index import TokenStream
from megatron_7b.data.corpus.indexed_dataset import IndexedDataset
from megatron_7b.data.samples.split import Split, document_range

MASK64 = 2**64 - 1


def stream_key(seed: int, split: Split, number: int, *, pass_begin: int = 0) -> int:
    """64-bit key of one set's order.

    Args:
        seed: The run's.
        split: Which part of the corpora.
        number: The set's within the blend.
        pass_begin: Sample at which the pass over the data began, so that a restart has an order of its own.
    """
    name = f"{seed}/{split}/{number}" + (f"/{pass_begin}" if pass_begin else "")
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def open_stream(
    dataset: IndexedDataset,
    *,
    seq_length: int,
    shares: tuple[float, float, float] = (1.0, 0.0, 0.0),
    split: Split = "train",
    key: int = 0,
    shuffle: bool = True,
) -> TokenStream:
    """Return the samples of one split of one corpus.

    Args:
        dataset: The corpus.
        seq_length: Input tokens per sample.
        shares: Of train, valid and test, adding up to 1.
        split: Which of them.
        key: What the order is drawn from.
        shuffle: False reads the split once, in the order of the file; labels after its end are masked.

    Raises:
        DataFormatError: The sequences don't follow one another in the .bin, or the split holds less than one sample.
    """
    first, end = document_range(dataset.num_documents, shares, split)
    return TokenStream(dataset.corpus, first, end, seq_length, key & MASK64, shuffle)
