"""What `generate` prints: a single text as it grows, several texts each when complete, or one JSON object."""

import json
import sys
import time
from collections.abc import Iterable, Sequence

from megatron_7b.generation.samples import Piece, Sample


def print_texts(pieces: Iterable[Piece], samples: Sequence[Sample], *, num_prompt_tokens: int, as_json: bool) -> None:
    """Print prompts with their continuations on stdout as they come, and the speed on stderr.

    Args:
        pieces: What a session gives until all samples have ended.
        samples: What is printed, in order.
        num_prompt_tokens: Of all prompts together.
        as_json: Print nothing but one JSON object, at the end.
    """
    is_streamed = len(samples) == 1 and not as_json
    clock = _Clock()
    num_printed = 0
    if is_streamed:
        _write(samples[0].shown_prompt)
    for piece in pieces:
        clock.count(piece.num_tokens)
        if is_streamed:
            _write(piece.text)
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
            "prompt_tokens": num_prompt_tokens,
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

    def count(self, num_tokens: int) -> None:
        """Count tokens that just came."""
        self._now = time.perf_counter()
        if self._first is None:
            self._first = self._now
        self._num_tokens += num_tokens

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
