"""Text of tokens as they come: the pieces add up to the text of all tokens, and none ends within a character.

What text a token is depends on its neighbours, in a way that depends on the tokenizer:

- Of byte-level tokenizers each token is some bytes, and the text is that of all bytes.
- Of the others each token is a piece of text, apart from two things: the first tokens may lose a space, and characters
  that the vocabulary lacks are spelled in tokens of one byte, which count as characters only if the whole run of them
  is valid.
"""

import codecs
import re
from collections.abc import Callable, Sequence
from typing import Protocol

from megatron_7b.tokenizer import Tokenizer
from megatron_7b.tokenizer.byte_level import byte_characters
from megatron_7b.tokenizer.hugging_face import HuggingFaceTokenizer
from megatron_7b.tokenizer.sentence_piece import SentencePieceTokenizer
from megatron_7b.tokenizer.tiktoken_file import TiktokenTokenizer

_CONTEXT = 8
"""Tokens that are decoded again with new ones, so that these are not taken for the first of a text."""
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
_REPLACEMENT = "\ufffd"


class TextStream(Protocol):
    """Turns tokens into pieces of text."""

    def add(self, token_id: int) -> str:
        """Return the text that this token completes, often empty in scripts with several tokens per character."""

    def finish(self) -> str:
        """Return what was held back: the stream ends here."""


def text_stream(tokenizer: Tokenizer, context: Sequence[int] = ()) -> TextStream:
    """Build a stream of text.

    Args:
        tokenizer: What decodes.
        context: Tokens before the first one of the stream, usually the prompt's; their text is not repeated.

    Returns:
        A stream whose pieces add up to what `tokenizer.decode` makes of context and tokens, less the context's text.
        Ids that the tokenizer does not know give nothing.
    """
    token_bytes = bytes_of_tokens(tokenizer)
    if token_bytes is not None:
        return _ByteStream(token_bytes, context)
    known = [token for token in context if token < tokenizer.vocab_size]
    return _PieceStream(tokenizer, known, byte_ids(tokenizer), holds_replacement=_decodes_bytes_in_part(tokenizer))


class _ByteStream:
    """A stream of tokens that are bytes."""

    def __init__(self, token_bytes: Callable[[int], bytes], context: Sequence[int]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in context:
            self._decoder.decode(token_bytes(token))

    def add(self, token_id: int) -> str:
        """Return the characters that are complete."""
        return self._decoder.decode(self._token_bytes(token_id))

    def finish(self) -> str:
        """Return the replacement of a character that was begun."""
        return self._decoder.decode(b"", final=True)


class _PieceStream:
    """A stream of tokens that are pieces of text: each is the difference that its token makes to a short window.

    Args:
        tokenizer: What decodes.
        context: Tokens before the first.
        byte_ids: Tokens of one byte: what text a run of them is, is known when it ends.
        holds_replacement: Also hold text back while it ends with a replacement character.
    """

    def __init__(
        self, tokenizer: Tokenizer, context: Sequence[int], byte_ids: frozenset[int], *, holds_replacement: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._byte_ids = byte_ids
        self._holds_replacement = holds_replacement
        self._window = list(context)
        settled = len(self._window)
        while settled and self._window[settled - 1] in byte_ids:
            settled -= 1
        self._shown = tokenizer.decode(self._window[:settled])

    def add(self, token_id: int) -> str:
        """Return the text that is certain now."""
        if token_id >= self._tokenizer.vocab_size:
            return ""
        self._window.append(token_id)
        return "" if token_id in self._byte_ids else self._advance(is_end=False)

    def finish(self) -> str:
        """Return what was held back."""
        return self._advance(is_end=True)

    def _advance(self, *, is_end: bool) -> str:
        text = self._tokenizer.decode(self._window)
        if self._holds_replacement and text.endswith(_REPLACEMENT) and not is_end:
            return ""
        piece = text[len(self._shown) :]
        if not piece and self._shown and not is_end:
            self._window.pop()  # it has no text, like control tokens: a window of such must not grow for ever
            return ""
        self._shown = text
        self._shorten()
        return piece

    def _shorten(self) -> None:
        """Let decoding cost the same at every length: keep the last tokens, if they have a text that can go before."""
        if len(self._window) <= 2 * _CONTEXT:
            return
        text = self._tokenizer.decode(self._window[-_CONTEXT:])
        if text:
            self._window, self._shown = self._window[-_CONTEXT:], text


def byte_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that are one byte of a character that the vocabulary lacks."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.byte_ids
    if isinstance(tokenizer, HuggingFaceTokenizer) and b"ByteFallback" in _decoder_definition(tokenizer):
        vocabulary = tokenizer.backend.get_vocab(with_added_tokens=False)
        return frozenset(token for text, token in vocabulary.items() if _BYTE_TOKEN.fullmatch(text))
    return frozenset()


def bytes_of_tokens(tokenizer: Tokenizer) -> Callable[[int], bytes] | None:
    """Return what gives the bytes of a token, or None if tokens are not bytes."""
    if tokenizer.kind == "bytes":
        return lambda token: bytes([token]) if token < 256 else b""
    if isinstance(tokenizer, TiktokenTokenizer):
        return tokenizer.token_bytes
    if isinstance(tokenizer, HuggingFaceTokenizer) and _is_byte_level(tokenizer):
        return _byte_level_tokens(tokenizer)
    return None


def _byte_level_tokens(tokenizer: HuggingFaceTokenizer) -> Callable[[int], bytes]:
    spelling = tokenizer.backend.id_to_token
    byte_of = {character: byte for byte, character in byte_characters().items()}

    def token_bytes(token: int) -> bytes:
        text = spelling(token) or ""
        # An added token may have other characters: then all of them are themselves.
        return bytes(map(byte_of.__getitem__, text)) if byte_of.keys() >= set(text) else text.encode()

    return token_bytes


def _is_byte_level(tokenizer: HuggingFaceTokenizer) -> bool:
    from tokenizers import decoders

    return isinstance(tokenizer.backend.decoder, decoders.ByteLevel)


def _decodes_bytes_in_part(tokenizer: Tokenizer) -> bool:
    """Return whether bytes become characters in one of several steps of decoding."""
    return isinstance(tokenizer, HuggingFaceTokenizer) and b"ByteLevel" in _decoder_definition(tokenizer)


def _decoder_definition(tokenizer: HuggingFaceTokenizer) -> bytes:
    decoder = tokenizer.backend.decoder
    return b"" if decoder is None else bytes(decoder.__getstate__())
