"""Labels of a file: of one type, and in an order."""

from collections.abc import Iterable
from typing import Any

from megatron_7b.data.records.reading import RecordError


class SameKind:
    """Refuses labels of another type than those before; integers do not count as numbers with decimals.

    Attributes:
        kind: Type of the labels so far; None: there were none.
    """

    def __init__(self) -> None:
        self.kind: str | None = None

    def __call__(self, label: Any) -> None:
        """Take note of a label.

        Raises:
            RecordError: It is of another type.
        """
        kind = type(label).__name__
        if self.kind in (None, kind):
            self.kind = kind
        elif {self.kind, kind} == {"int", "float"}:
            self.kind = "float"  # 1 among 0.5 and 1.5
        else:
            raise RecordError(f"'label' is {label!r}, a JSON {kind}; those before it are of the type {self.kind}")


def sorted_labels(found: Iterable[Any]) -> tuple[str, ...]:
    """Return the names of labels in their order: that of numbers, if all are such."""
    labels = list(found)
    if all(isinstance(label, int) for label in labels):
        return tuple(map(str, sorted(labels)))
    return tuple(sorted(set(map(str, labels))))
