"""How whoever reads files tells how far it is."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class ReadingProgress(Protocol):
    """Told after every block."""

    def update(self, bytes_read: int, documents: int, tokens: int) -> None:
        """Totals so far; bytes as they are on disk."""


type OpenProgress = Callable[[int], AbstractContextManager[ReadingProgress | None]]
"""From the bytes of the input to a context whose value is told how far it is."""


def tell_nobody(_total_bytes: int) -> AbstractContextManager[None]:
    """Be an `OpenProgress` that shows nothing."""
    return nullcontext()
