"""Which documents are held out: a function of each text alone."""

from typing import Literal, get_args

import xxhash

from megatron_7b.prepare.corpus_sections import SplitSection

SplitName = Literal["train", "validation", "test"]
SPLIT_NAMES: tuple[SplitName, ...] = get_args(SplitName)

_SEED = 0x5EED


def choose_split(text: str, section: SplitSection) -> SplitName:
    """Return the split of a document, whatever other documents there are, in whatever order.

    Each text has a fixed place between 0 and 1. Validation takes the lower end and test the upper one: when shares
    grow, documents leave only train, and none moves between the other two.
    """
    place = xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass"), seed=_SEED) / 2.0**64
    if place < section.validation:
        return "validation"
    return "test" if place >= 1.0 - section.test else "train"
