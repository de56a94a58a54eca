#!/usr/bin/env python3
"""Print the unigram entropy of a tokenized corpus in nats per token: the loss of a model that knows only frequencies.

    tools/unigram_entropy.py PREFIX          # PREFIX.bin and PREFIX.idx, as tools/preprocess_data.py writes them

A language model that has learned anything about the order of tokens has a validation loss below it.
"""

import argparse
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from megatron_7b.data import IndexedDataset


def token_counts(sequences: Iterable[NDArray[np.integer]]) -> NDArray[np.int64]:
    """Return how often each id occurs, [largest id + 1]."""
    counts = np.zeros(0, dtype=np.int64)
    for ids in sequences:
        found = np.bincount(ids)
        if len(found) > len(counts):
            counts = np.pad(counts, (0, len(found) - len(counts)))
        counts[: len(found)] += found
    return counts


def unigram_entropy(counts: NDArray[np.int64]) -> float:
    """Return the entropy, in nats, of the distribution that is proportional to `counts` [v]."""
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


def main() -> None:
    """Count every token of the corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", help="the files' path without extension")
    print(f"{unigram_entropy(token_counts(IndexedDataset(parser.parse_args().prefix))):.4f}")


if __name__ == "__main__":
    main()
