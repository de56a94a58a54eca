"""The chance that one of k programs is right, from n programs of which c are.

Source: Chen et al., "Evaluating Large Language Models Trained on Code" (2021), section 2.1.
"""

from math import comb


def estimate_pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the unbiased estimate 1 - C(n - c, k) / C(n, k) for one problem.

    Args:
        num_samples: n, programs that were written.
        num_correct: c, how many of them are right.
        k: How many of them somebody may try, at most n.

    Raises:
        ValueError: The three do not fit together.
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} cannot be estimated from {num_correct} right programs of {num_samples}")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)
