"""Weighted blends of corpora, and the integers that the schedule counts with.

The schedule itself is native (`csrc/include/megatron_7b/blend.h`, with its proof): after any number n of samples, a set
of share w has given floor(w n) or ceil(w n) of them. It is a function of the global sample number alone, so a run
resumes anywhere; finding its place takes milliseconds, whatever the number.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

from megatron_7b.config.blend import BlendPart, split_blend
from megatron_7b.errors import ConfigError

MAX_TOTAL_WEIGHT = 2**40
"""Bound of the native schedule on the sum of weights. A share rounded to it is off by one sample in 2^40."""

MIN_SHARE = Fraction(1, 2**23)
"""Smallest share: a set read less often than once in eight million samples is a mistake in the weights."""


def parse_blend(entries: Sequence[str], *, name: str = "data.train") -> tuple[BlendPart, ...]:
    """Return the sets of `PREFIX` or `W1 PREFIX1 W2 PREFIX2 …`.

    Args:
        entries: A single prefix, or weights and prefixes in turn.
        name: How messages call it.

    Raises:
        ConfigError: Nothing is given, a weight is not a positive number, or one is without a prefix.
    """
    try:
        return split_blend(entries)
    except ValueError as error:
        raise ConfigError(f"{name} is {' '.join(entries) or 'empty'}: {error}") from None


def integer_weights(weights: Sequence[Fraction]) -> list[int]:
    """Return integers in the same proportion as the weights.

    Exact wherever the smallest such integers add up to at most 2^40 (weights of a few decimals always do); rounded to
    shares of 2^40 otherwise, which shifts no set by a sample before 10^12 samples.

    Raises:
        ConfigError: A set's share is below 2^-23.
    """
    total = sum(weights, Fraction(0))
    rarest = min(weights)
    if rarest / total < MIN_SHARE:
        raise ConfigError(
            f"a blend weight of {float(rarest):g} among {float(total):g} is less than one sample in {1 / MIN_SHARE}",
            hint="leave the set out, or give it more weight",
        )
    denominator = math.lcm(*(weight.denominator for weight in weights))
    scaled = [weight.numerator * (denominator // weight.denominator) for weight in weights]
    divisor = math.gcd(*scaled)
    exact = [weight // divisor for weight in scaled]
    if sum(exact) <= MAX_TOTAL_WEIGHT:
        return exact
    # A little below the bound, so that rounding up cannot exceed it.
    room = MAX_TOTAL_WEIGHT - len(weights)
    return [max(1, round(weight / total * room)) for weight in weights]
