"""Log probabilities of tokens, in the two shapes that OpenAI has for them."""

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_7b.serving.rounds import Written
from megatron_7b.tokenizer import Tokenizer


class TokenTexts:
    """The texts of tokens one by one.

    Args:
        tokenizer: What decodes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def of(self, token: int) -> str:
        """Return a token's text; of one that has none, or only a part of a character, its name."""
        text = self._tokenizer.decode([token]) if token < self._tokenizer.vocab_size else ""
        return text if text and "\ufffd" not in text else (self._tokenizer.spell(token) or "")

    def chat(self, written: Sequence[Written]) -> dict[str, Any] | None:
        """Return the log probabilities of a chat's tokens; None if they were not asked for."""
        if not any(one.logprobs for one in written):
            return None
        content = [
            {
                **self._entry(token, probability.logprob),
                "top_logprobs": [self._entry(other, value) for other, value in probability.top],
            }
            for token, probability in _pairs(written)
        ]
        return {"content": content, "refusal": None}

    def completion(self, written: Sequence[Written], offset: int = 0) -> dict[str, Any] | None:
        """Return the log probabilities of a completion's tokens; None if they were not asked for.

        Args:
            written: What has come.
            offset: Characters of the text before it.
        """
        if not any(one.logprobs for one in written):
            return None
        pairs = list(_pairs(written))
        offsets = []
        for one in written:
            offsets += [offset] * len(one.logprobs)
            offset += len(one.text)
        return {
            "tokens": [self.of(token) for token, _ in pairs],
            "token_logprobs": [probability.logprob for _, probability in pairs],
            "top_logprobs": [{self.of(other): value for other, value in one.top} for _, one in pairs],
            "text_offset": offsets,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.of(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _pairs(written: Sequence[Written]) -> Iterator[tuple[int, Any]]:
    for one in written:
        yield from zip(one.token_ids, one.logprobs, strict=True)
