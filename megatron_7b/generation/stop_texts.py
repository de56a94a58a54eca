"""Ending a text at words that a caller names, however its tokens divide them."""

from collections.abc import Sequence


class StopTexts:
    """Passes text on up to the first of some stop texts; what may turn out to begin one is held back.

    Args:
        texts: What ends the text; none of them is empty.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)
        self._held = ""
        self.is_found = False

    def add(self, piece: str) -> str:
        """Take a piece of text and return what is certain to come before any stop text."""
        if not self._texts:
            return piece
        if self.is_found:
            return ""
        text = self._held + piece
        places = [place for stop in self._texts if (place := text.find(stop)) >= 0]
        if places:
            self.is_found, self._held = True, ""
            return text[: min(places)]
        held = max(_overlap(text, stop) for stop in self._texts)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return what was held back: the text ends here."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return how many of the last characters of a text are the first ones of a stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
