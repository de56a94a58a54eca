#!/usr/bin/env python3
"""Print the unigram entropy of a tokenized corpus in nats per token: the loss of a model that knows only frequencies.

    tools/unigram_entropy.py PREFIX          # PREFIX.bin and PREFIX.idx, as tools/preprocess_data.py writes them

A language model that has learned anything about order has a validation loss below it.
"""

import argparse

import numpy as np

from megatron_7b.data import IndexedDataset


def unigram_entropy(counts: np.ndarray) -> float:
    """Return the entropy in nats of the distribution that is proportional to `counts` [v]."""
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


def main() -> int:
    """Count every token of the corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", help="corpus without .bin or .idx")
    corpus = IndexedDataset(parser.parse_args().prefix)
    print(f"{unigram_entropy(corpus.token_counts()):.4f}")
    return 0
