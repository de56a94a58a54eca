"""Files of preferences as records: replies with their prompts, and which tokens are the reply.

| learned with | parts of a record | its value |
|---|---|---|
| pairs | prompt and chosen reply, prompt and rejected reply | |
| labels | prompt and reply, prompt and the reply to another prompt | 1: wanted, 0: not |

The second part of a labelled record is what KTO estimates by how far the model has moved from where it started.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_7b.data.conversations.trained import ConversationEncoder
from megatron_7b.data.preferences.formats import Exchange, Form, Labelled, Pair, read_preference
from megatron_7b.data.records.corpus import EncodedRecord
from megatron_7b.data.records.reading import RecordError, read_records
from megatron_7b.errors import ConfigError
from megatron_7b.tokenizer import Tokenizer
from megatron_7b.tokenizer.surroundings import surrounding_ids

PAIRS, LABELLED = "pairs of replies", "labelled replies"
"""What records are called, in the plural."""

type EncodedReply = tuple[NDArray[np.int32], NDArray[np.float32]]
"""The tokens of prompt and reply, and 1 for those of the reply, [n] each."""


class PreferenceEncoder:
    """Encodes files of preferences.

    Args:
        tokenizer: Whose tokens.
        conversations: What spells messages out; texts are taken as they are.

    Raises:
        ConfigError: The tokenizer has no token that ends a text.
    """

    def __init__(self, tokenizer: Tokenizer, conversations: ConversationEncoder) -> None:
        if tokenizer.eod_id is None:
            raise ConfigError(
                "the tokenizer has no end-of-document token, so replies would have no end",
                hint="use a tokenizer with an eos token",
            )
        self._tokenizer, self._conversations, self._end = tokenizer, conversations, tokenizer.eod_id
        self._before = surrounding_ids(tokenizer)[0]

    def pairs(self, file: Path) -> Iterator[EncodedRecord]:
        """Yield the pairs of a file.

        Raises:
            DataFormatError: Some of its records cannot be used; all of them are named.
        """

        def encode(preference: Pair | Labelled) -> EncodedRecord:
            if isinstance(preference, Labelled):
                raise RecordError("it has a label instead of chosen and rejected: --finetune.preference-loss kto")
            return _record(self.reply(preference.chosen), self.reply(preference.rejected))

        return (record for _, record in _read(file, PAIRS, encode))

    def labelled(self, file: Path) -> Iterator[EncodedRecord]:
        """Yield the labelled replies of a file; of a pair, both.

        Raises:
            DataFormatError: Some of its records cannot be used; all of them are named.
        """
        partners = _Partners(last for _, replies in _read(file, LABELLED, _labelled) for last in replies)

        def encode(preference: Pair | Labelled) -> list[EncodedRecord]:
            return [self._labelled_record(one, partners) for one in _labelled(preference)]

        return (record for _, records in _read(file, LABELLED, encode) for record in records)

    def _labelled_record(self, one: Labelled, partners: "_Partners") -> EncodedRecord:
        exchange, partner = one.exchange, partners.next(one.exchange)
        own = self.reply(exchange)
        try:
            other = self.reply(Exchange(exchange.prompt, partner.reply, exchange.tools))
        except RecordError as error:
            raise RecordError(f"with the reply of another line: {error}") from None
        return _record(own, other, value=float(one.is_desirable))

    def reply(self, exchange: Exchange) -> EncodedReply:
        """Return the tokens of prompt and reply, and which of them are the reply's, its end included.

        Raises:
            RecordError: The chat template cannot be applied, or does not let the reply be found.
        """
        if exchange.form == "messages":
            encoded = self._conversations.encode(exchange.conversation())
            return encoded.ids, encoded.loss_mask
        text = f"{exchange.prompt}{exchange.reply}"
        ids, offsets = self._tokenizer.encode_with_offsets(text)
        is_reply = [stop > len(exchange.prompt) for _, stop in offsets]
        if ids[-1] != self._end:
            ids, is_reply = [*ids, self._end], [*is_reply, True]
        before = self._before
        mask = np.asarray([*(False for _ in before), *is_reply], np.float32)
        return np.asarray([*before, *ids], np.int32), mask


class _Partners:
    """Finds for each reply one to another prompt: that of the nearest line before it, as if the file were a ring.

    Args:
        all_replies: Those of the file.
    """

    def __init__(self, all_replies: Iterator[Labelled]) -> None:
        first, last, other = None, None, None
        for one in all_replies:
            first, last = first or one.exchange, one.exchange
            other = last if last.prompt != first.prompt else other
        self._latest = self._before = other or last

    def next(self, exchange: Exchange) -> Exchange:
        """Return the partner of the next reply."""
        latest, before = self._latest, self._before
        assert latest is not None
        assert before is not None
        is_other = exchange.prompt != latest.prompt
        self._latest, self._before = exchange, latest if is_other else before
        return latest if is_other else before


def _labelled(preference: Pair | Labelled) -> list[Labelled]:
    if isinstance(preference, Labelled):
        return [preference]
    return [Labelled(preference.chosen, True), Labelled(preference.rejected, False)]


def _read[T](file: Path, name: str, use: Callable[[Pair | Labelled], T]) -> Iterator[tuple[int, T]]:
    """Read a file whose records are all of one format."""
    known: tuple[type, Form] | None = None

    def of_one_format(record: dict[str, Any]) -> T:
        nonlocal known
        preference = read_preference(record)
        exchange = preference.exchange if isinstance(preference, Labelled) else preference.chosen
        found = (type(preference), exchange.form)
        if known is not None and found != known:
            raise RecordError(f"it has {_in_words(*found)}, those before it have {_in_words(*known)}")
        known = found
        return use(preference)

    example = (
        '{"prompt": …, "chosen": …, "rejected": …}'
        if name == PAIRS
        else '{"prompt": …, "completion": …, "label": true}'
    )
    yield from read_records(file, of_one_format, name=name, example=example)


def _in_words(kind: type, form: Form) -> str:
    return f"{'chosen and rejected' if kind is Pair else 'a label'}, as {form}"


def _record(*replies: EncodedReply, value: float | None = None) -> EncodedRecord:
    masks = np.concatenate([mask for _, mask in replies])
    return EncodedRecord([ids for ids, _ in replies], masks, None if value is None else np.asarray([value], np.float32))
