"""Random numbers of one sample: a function of the run's seed and the sample's number, whatever was drawn before."""

import hashlib

import numpy as np


def sample_generator(seed: int, purpose: str, index: int) -> np.random.Generator:
    """Return a generator for one sample.

    Args:
        seed: The run's.
        purpose: Keeps apart what is drawn for different ends.
        index: Global sample number.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return np.random.Generator(np.random.Philox(key=[int.from_bytes(digest, "little"), index]))
