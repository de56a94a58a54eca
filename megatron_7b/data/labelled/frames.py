"""The special tokens around a text, or a pair of texts, as transformers' tokenizers put them there."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_7b.errors import ConfigError
from megatron_7b.tokenizer import Tokenizer
from megatron_7b.tokenizer.hugging_face import HuggingFaceTokenizer


@dataclass(frozen=True)
class Framed:
    """A text, or two, within their frame.

    Attributes:
        ids: int64 [n].
        is_second: Which tokens are of the second text, or follow it, bool [n].
        begins: Where the tokens of each text begin in `ids`.
    """

    ids: NDArray[np.int64]
    is_second: NDArray[np.bool_]
    begins: tuple[int, ...]


@dataclass(frozen=True)
class Frame:
    """Tokens before the first text, between two, and after the last."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]

    def room(self, seq_length: int, *, is_pair: bool) -> int:
        """Return how many tokens of text a row of a length has room for.

        Raises:
            ConfigError: There is no room.
        """
        room = seq_length - len(self.before) - len(self.after) - (len(self.between) if is_pair else 0)
        if room < (2 if is_pair else 1):
            raise ConfigError(
                f"data.seq_length is {seq_length}, which leaves no room for text within its special tokens",
                hint="make it longer",
            )
        return room

    def around(self, first: Sequence[int], second: Sequence[int] | None = None) -> Framed:
        """Return texts within the frame."""
        pieces = [self.before, first] if second is None else [self.before, first, self.between, second]
        ids = np.array([token for piece in (*pieces, self.after) for token in piece], np.int64)
        begin, is_second = len(self.before), np.zeros(len(ids), np.bool_)
        if second is None:
            return Framed(ids, is_second, (begin,))
        begin_of_second = begin + len(first) + len(self.between)
        is_second[begin_of_second:] = True
        return Framed(ids, is_second, (begin, begin_of_second))


def find_frame(tokenizer: Tokenizer, *, is_encoder: bool) -> Frame:
    """Return the frame that a model's texts have.

    That of an encoder is [CLS] … [SEP] … [SEP], by whatever names; that of a decoder is what transformers adds to a
    text, often a token before it or nothing, with a line break between two texts.

    Args:
        tokenizer: The model's.
        is_encoder: Whether it is an encoder.

    Raises:
        ConfigError: An encoder's tokenizer lacks a token.
    """
    if is_encoder:
        begin, end = tokenizer.special_id("cls"), tokenizer.special_id("sep")
        if begin is None or end is None:
            raise ConfigError(
                f"the tokenizer ({tokenizer.path}) lacks [CLS] or [SEP], which are around the texts of an encoder"
            )
        return Frame((begin,), (end,), (end,))
    before, after = _added(tokenizer)
    return Frame(before, tuple(tokenizer.encode("\n")), after)


def _added(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return what transformers puts before and after a text."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return (), ()
    plain, whole = (tokenizer.backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    start = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
    return tuple(whole[:start]), tuple(whole[start + len(plain) :])


def shortened(first: Sequence[int], second: Sequence[int], room: int) -> tuple[Sequence[int], Sequence[int]]:
    """Return the beginnings of two texts that fit into a room together; the longer one gives up its end first."""
    excess = max(0, len(first) + len(second) - room)
    longer, shorter = max(len(first), len(second)), min(len(first), len(second))
    from_longer = min(excess, longer - shorter)
    rest = excess - from_longer
    cuts = [from_longer if len(text) == longer else 0 for text in (first, second)]
    if len(first) == len(second):
        cuts = [0, 0]
    cuts = [cuts[0] + (rest + 1) // 2, cuts[1] + rest // 2]
    return first[: len(first) - cuts[0]], second[: len(second) - cuts[1]]
