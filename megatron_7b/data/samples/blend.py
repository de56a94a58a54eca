"""Weighted blends of corpora: how they are written, and the integers that the schedule counts with.

The schedule itself is native (`csrc/include/megatron_7b/blend.h`, with its proof): after any number n of samples, a set
of share w has given floor(w n) or ceil(w n) of them. It is a function of the global sample number alone, so a run
resumes anywhere; finding one's place takes milliseconds, whatever the number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_7b.errors import ConfigError

MAX_TOTAL_WEIGHT = 2**40
"""Bound of the native schedule on the sum of weights. A share rounded to it is off by one sample in 2^40."""

MIN_SHARE = Fraction(1, 2**23)
"""Smallest share: a set read less often than once in eight million samples is a mistake in the weights."""


@dataclass(frozen=True)
class BlendPart:
    """One set of a blend."""

    prefix: str
    weight: Fraction
    """As written, exactly; not normalised."""


def parse_blend(entries: Sequence[str], *, name: str = "data.train") -> tuple[BlendPart, ...]:
    """The sets of `PREFIX` or `W1 PREFIX1 W2 PREFIX2 …`.

    Args:
        entries: A single prefix (or several, which then weigh the same), or weights and prefixes in turn. One string
            that holds them all, separated by blanks, is taken too.
        name: How messages call it.

    Raises:
        ConfigError: Nothing is given, a weight is not a positive number, or one is without a prefix.
    """
    words = list(entries[0].split()) if len(entries) == 1 else list(entries)
    if not words:
        raise ConfigError(f"{name} is empty, expected a corpus prefix or weights and prefixes in turn")
    weights = [_as_weight(word) for word in words]
    if not any(weight is not None for weight in weights):
        return tuple(BlendPart(prefix=word, weight=Fraction(1)) for word in words)
    parts = []
    for position in range(0, len(words), 2):
        weight = weights[position]
        if weight is None or weight <= 0 or position + 1 == len(words):
            given = " ".join(words[position : position + 2])
            raise ConfigError(
                f"{name}: {given!r} is not a positive weight followed by a prefix",
                hint=f"weights and prefixes take turns, for example: {name} 0.7 web_text_document 0.3 code",
            )
        parts.append(BlendPart(prefix=words[position + 1], weight=weight))
    return tuple(parts)


def _as_weight(word: str) -> Fraction | None:
    """The exact value of a decimal number, or None for anything else."""
    try:
        return Fraction(word)
    except (ValueError, ZeroDivisionError):
        return None


def integer_weights(weights: Sequence[Fraction]) -> list[int]:
    """Integers in the same proportion.

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
