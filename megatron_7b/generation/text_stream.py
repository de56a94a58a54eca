"""Text of tokens as they come: never half a character."""

from collections.abc import Sequence

from megatron_7b.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 4  # bytes of UTF-8, so also tokens
_CONTEXT = 8


class TextStream:
    """Turns tokens into pieces of text whose concatenation is the text of all tokens.

    A tokenizer decodes a token differently at the start of a text than within it (SentencePiece drops a space there),
    and a character may be spread over several tokens. So each piece is the difference between the texts of a short
    window of tokens without and with the new ones, and it is held back while it ends within a character.

    Args:
        tokenizer: What decodes.
        context: Tokens before the first one of the stream, usually the prompt's; their text is not repeated.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(context[-_CONTEXT:])
        self._num_shown = len(self._window)

    def add(self, token_id: int) -> str:
        """Return the text that this token completes, often empty in scripts with several tokens per character."""
        self._window.append(token_id)
        pending = len(self._window) - self._num_shown
        return self._advance(even_if_incomplete=pending > _LONGEST_CHARACTER)

    def finish(self) -> str:
        """Return what was held back: the stream ends here."""
        return self._advance(even_if_incomplete=True)

    def _advance(self, *, even_if_incomplete: bool) -> str:
        if self._num_shown == len(self._window):
            return ""
        shown = self._tokenizer.decode(self._window[: self._num_shown])
        text = self._tokenizer.decode(self._window)
        if text.endswith(_REPLACEMENT) and not even_if_incomplete:
            return ""
        # What was new in this window is the context of the next: decoding costs the same at every length.
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        return text[len(shown) :]
