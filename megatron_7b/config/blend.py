"""How a corpus option is written: one prefix, or weights and prefixes in turn (`0.7 A 0.3 B`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class BlendPart:
    """One set of a blend."""

    prefix: str
    weight: Fraction
    """As written, exactly; not normalised."""


def split_blend(entries: Sequence[str]) -> tuple[BlendPart, ...]:
    """Return the sets of a corpus option.

    Raises:
        ValueError: The entries are neither one prefix nor weights and prefixes in turn; the message says how.
    """
    if len(entries) == 1 and entries[0]:
        return (BlendPart(entries[0], Fraction(1)),)
    if not entries or len(entries) % 2 or "" in entries:
        raise ValueError("expected one prefix, or weights and prefixes in turn: 0.7 A 0.3 B")
    return tuple(
        BlendPart(prefix, _read_weight(weight, prefix))
        for weight, prefix in zip(entries[::2], entries[1::2], strict=True)
    )


def _read_weight(text: str, prefix: str) -> Fraction:
    try:
        weight = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"expected a weight before each prefix (0.7 A 0.3 B), not {text!r}") from None
    if weight <= 0:
        raise ValueError(f"the weight of {prefix} must be above 0, not {text}")
    return weight
