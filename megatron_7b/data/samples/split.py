"""Shares of a corpus for training, validation and test, as ranges of documents."""

import math
from typing import Literal, get_args

from megatron_7b.errors import ConfigError

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def parse_split(split: str) -> tuple[float, float, float]:
    """Normalised shares of `train,valid,test`.

    Args:
        split: One to three non-negative numbers, such as `98,2,0` or `0.9,0.1`; missing ones are 0.

    Raises:
        ConfigError: They aren't.
    """
    problem = ConfigError(
        f"data.split is {split!r}, expected up to three shares of train, valid, test that don't add up to 0",
        hint='for example "98,2,0"',
    )
    try:
        shares = [float(part) for part in split.replace("/", ",").split(",")]
    except ValueError:
        raise problem from None
    total = sum(shares)
    if len(shares) > len(SPLITS) or not all(share >= 0 for share in shares) or not 0 < total < math.inf:
        raise problem
    train, valid, test = (share / total for share in shares + [0.0] * (len(SPLITS) - len(shares)))
    return train, valid, test


def document_range(num_documents: int, shares: tuple[float, float, float], split: Split) -> tuple[int, int]:
    """Return the documents `[first, end)` of one split. The three ranges follow one another and cover all documents.

    Args:
        num_documents: Documents of the corpus.
        shares: As `parse_split` returns them.
        split: Which of the three.
    """
    which = SPLITS.index(split)
    bounds = [round(sum(shares[:count]) * num_documents) for count in range(len(SPLITS))] + [num_documents]
    if not any(shares[which + 1 :]):
        bounds[which + 1] = num_documents
    return bounds[which], bounds[which + 1]
