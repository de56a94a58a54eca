"""What `generate` prints: a single text as it grows, several texts each when complete, or one JSON object."""

import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from megatron_7b.generation.prompts import Prompt
from megatron_7b.tokenizer import Tokenizer

if TYPE_CHECKING:
    from megatron_7b.generation.requests import GeneratedToken


class _Sample:
    """One continuation of a prompt, as it grows."""

    def __init__(self, prompt: Prompt, tokenizer: Tokenizer) -> None:
        from megatron_7b.generation.text_stream import text_stream

        self.prompt = prompt
        self.shown_prompt = "" if prompt.is_chat else prompt.text
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self._stream = text_stream(tokenizer, prompt.ids)

    def add(self, token: "GeneratedToken") -> str:
        """Take a token and return the text that it completes; a token that ends the text has none."""
        self.ids.append(token.token_id)
        self.finish_reason = token.finish_reason
        piece = "" if token.finish_reason == "eod" else self._stream.add(token.token_id)
        if token.finish_reason is not None:
            piece += self._stream.finish()
        self.text += piece
        return piece

    def to_dict(self) -> dict[str, object]:
        """Return the sample as it stands in the JSON object."""
        return {
            "prompt": self.prompt.text,
            "text": self.text,
            "token_ids": self.ids,
            "finish_reason": self.finish_reason,
        }


def print_texts(
    tokens: "Iterable[GeneratedToken]",
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    num_samples: int,
    as_json: bool,
) -> None:
    """Print prompts with their continuations on stdout as tokens come, and the speed on stderr.

    Args:
        tokens: Of requests in the order of the prompts, `num_samples` of each.
        tokenizer: What decodes.
        prompts: What is continued.
        num_samples: Continuations of each prompt.
        as_json: Print nothing but one JSON object, at the end.
    """
    samples = [_Sample(prompt, tokenizer) for prompt in prompts for _ in range(num_samples)]
    is_streamed = len(samples) == 1 and not as_json
    clock = _Clock()
    num_printed = 0
    if is_streamed:
        _write(samples[0].shown_prompt)
    for token in tokens:
        clock.count()
        piece = samples[token.request].add(token)
        if is_streamed:
            _write(piece)
            continue
        # In order: a text waits for those before it.
        while not as_json and num_printed < len(samples) and samples[num_printed].finish_reason is not None:
            sample = samples[num_printed]
            num_printed += 1
            _write(f"--- text {num_printed} of {len(samples)}\n{sample.shown_prompt}{sample.text}\n")
    if is_streamed:
        _write("\n")
    if as_json:
        result = {
            "samples": [sample.to_dict() for sample in samples],
            "prompt_tokens": sum(len(prompt.ids) for prompt in prompts),
            **clock.figures(),
        }
        _write(json.dumps(result, ensure_ascii=False) + "\n")
    print(clock.describe(), file=sys.stderr)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class _Clock:
    """Times the first token, which waits for the prompt, apart from the others."""

    def __init__(self) -> None:
        self._start = self._now = time.perf_counter()
        self._first: float | None = None
        self._num_tokens = 0

    def count(self) -> None:
        """Count a token that just came."""
        self._now = time.perf_counter()
        if self._first is None:
            self._first = self._now
        self._num_tokens += 1

    def figures(self) -> dict[str, float]:
        """Return the figures of the JSON object."""
        return {
            "new_tokens": self._num_tokens,
            "first_token_seconds": round((self._first or self._now) - self._start, 4),
            "seconds": round(self._now - self._start, 4),
            "tokens_per_second": round(self._num_tokens / max(1e-9, self._now - self._start), 2),
        }

    def describe(self) -> str:
        """Return the figures in words."""
        figures = self.figures()
        return (
            f"{figures['new_tokens']} tokens in {figures['seconds']:.2f} s, the first after "
            f"{figures['first_token_seconds']:.2f} s ({figures['tokens_per_second']:.1f} tokens/s)"
        )
