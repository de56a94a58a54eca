"""Options whose text is a key of a table."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class OneOf:
    """In an annotation: the text is a key of a table, to which more may be added while the program runs."""

    table: Mapping[str, object]

    def __hash__(self) -> int:
        return id(self.table)
