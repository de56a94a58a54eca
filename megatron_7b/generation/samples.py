"""What a session gives: texts that grow with their tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_7b.generation.prompts import Prompt
from megatron_7b.generation.requests import FinishReason, Hypothesis, TokenLogprobs
from megatron_7b.generation.stop_texts import StopTexts
from megatron_7b.generation.text_stream import text_stream
from megatron_7b.tokenizer import Tokenizer


class Sample:
    """One continuation of a prompt, as it grows.

    Args:
        prompt: What it continues.
        tokenizer: What decodes.
        stop: Texts of which the first that appears ends it.

    Attributes:
        prompt: What it continues.
        token_ids: Its new tokens so far, one that ends the text included.
        text: Their text, without what ends it.
        finish_reason: Why it ended: `eod` (a token that ends texts), `stop` (a text that does) or `length`; None while
            it grows.
        logprobs: Of its new tokens, if they were asked for.
        score: What beam search ranks it by; None if its tokens are drawn.
        num_reused: Tokens of its prompt that were kept of an earlier text, and not read again.
    """

    def __init__(self, prompt: Prompt, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.prompt = prompt
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | Literal["stop"] | None = None
        self.score: float | None = None
        self.num_reused = 0
        self.logprobs: list[TokenLogprobs] = []
        self._stream = text_stream(tokenizer, () if prompt.is_source else prompt.ids)
        self._stop = StopTexts(stop)

    @property
    def shown_prompt(self) -> str:
        """The text that this one continues for a reader; empty for a reply to a conversation or a source."""
        return "" if self.prompt.is_chat or self.prompt.is_source else self.prompt.text

    def add(self, token_id: int, finish_reason: FinishReason | None, logprobs: TokenLogprobs | None = None) -> str:
        """Take a token and return the text that it completes, often none."""
        self.token_ids.append(token_id)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        self.finish_reason = finish_reason
        piece = "" if finish_reason == "eod" else self._stream.add(token_id)
        if finish_reason is not None:
            piece += self._stream.finish()
        piece = self._stop.add(piece)
        if self._stop.is_found:
            self.finish_reason = "stop"
        elif finish_reason is not None:
            piece += self._stop.finish()
        self.text += piece
        return piece

    def take(self, found: Hypothesis) -> str:
        """Become a text that beam search has found, and return it."""
        self.score = found.score
        for token_id in found.token_ids[:-1]:
            self.add(token_id, None)
        self.add(found.token_ids[-1], found.finish_reason)
        return self.text

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON has it."""
        fields: dict[str, object] = {
            "prompt": self.prompt.text,
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
        }
        if self.logprobs:
            fields["logprobs"] = [
                {"logprob": one.logprob, "top": [list(pair) for pair in one.top]} for one in self.logprobs
            ]
        return fields if self.score is None else {**fields, "score": self.score}


@dataclass(frozen=True)
class Piece:
    """What a step adds to a sample.

    Attributes:
        sample: Which one; it has the piece already.
        text: The text that became complete, perhaps none.
        num_tokens: How many tokens came.
    """

    sample: Sample
    text: str
    num_tokens: int = 1
