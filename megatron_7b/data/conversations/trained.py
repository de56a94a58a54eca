"""Which tokens of a conversation are trained: those that the model would have to write itself.

The conversation is spelled out by the chat template, encoded once and as a whole; then the part of the text that each
message became is found, in this order of trust:

1. The template marks the assistant's words by `{% generation %}`.
2. Spelled out once more with another content in the message's place, the text before and after it stays the same: what
   is between is the message. To it belong the tokens that end the turn, and what comes between the text that
   generation starts from and the content.
3. What the conversation up to the message is spelled out as, is how the whole begins; the message is what it adds.

A template for which none of these holds cannot be trained with, and is refused.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_7b.data.conversations.formats import WeightedConversation
from megatron_7b.data.records.corpus import EncodedRecord
from megatron_7b.data.records.reading import RecordError
from megatron_7b.errors import ConfigError
from megatron_7b.tokenizer import Tokenizer
from megatron_7b.tokenizer.chat_template import START_MARK, STOP_MARK, ChatTemplate, Conversation, Message

type TrainOn = Literal["assistant", "last", "all"]
type Span = tuple[int, int]

_IN_ITS_PLACE = f"{START_MARK}x{STOP_MARK}"


@dataclass(frozen=True, eq=False)
class EncodedConversation:
    """A conversation as a model learns it.

    Attributes:
        text: As the template spells it out.
        ids: int32 [n], its tokens.
        loss_mask: float32 [n], how much each token counts as a prediction; 0: not at all.
        turn_ends: int64, after how many tokens each trained message ends; a long conversation may be cut there.
        offsets: Where each token starts and stops in the text, in characters.
    """

    text: str
    ids: NDArray[np.int32]
    loss_mask: NDArray[np.float32]
    turn_ends: NDArray[np.int64]
    offsets: list[Span]

    @property
    def record(self) -> EncodedRecord:
        """As a corpus keeps it."""
        return EncodedRecord([self.ids], self.loss_mask)


class ConversationEncoder:
    """Encodes conversations for training.

    Args:
        tokenizer: Whose tokens.
        template: How conversations are spelled out.
        train_on: Which messages count where a record gives no weight: the assistant's, its last one, or everything that
            the template writes.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, train_on: TrainOn = "assistant") -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._train_on = train_on

    @property
    def template(self) -> ChatTemplate:
        """How conversations are spelled out."""
        return self._template

    def encode(self, record: WeightedConversation) -> EncodedConversation:
        """Return the tokens of a conversation, and which of them are trained.

        Raises:
            RecordError: Nothing of it would be trained, the template cannot be applied to it, or does not let its
                messages be found.
        """
        weights = self._weights(record)
        try:
            text, spans = self._find(record.conversation, weights)
        except ConfigError as error:
            raise RecordError(str(error)) from error
        ids, offsets = self._template.encode_with_offsets(text)
        mask = np.full(len(ids), float(self._train_on == "all"), np.float32)
        starts = np.asarray([start for start, _ in offsets], np.int64)
        stops = np.maximum(np.asarray([stop for _, stop in offsets], np.int64), starts + 1)
        ends = []
        for number, (start, stop) in sorted(spans.items()):
            covered = (starts < stop) & (stops > start)
            mask[covered] = weights[number]
            if weights[number]:
                ends.append(int(np.flatnonzero(covered)[-1]) + 1 if covered.any() else 0)
        if not mask.any():
            raise RecordError("no token of it would be trained")
        return EncodedConversation(text, np.asarray(ids, np.int32), mask, np.asarray(ends, np.int64), offsets)

    def _weights(self, record: WeightedConversation) -> dict[int, float]:
        """Return the weight of each message that has to be found: all but those that count like the text around."""
        replies = [number for number, message in enumerate(record.conversation.messages) if _is_reply(message)]
        counted = replies[-1:] if self._train_on == "last" else replies
        weights: dict[int, float] = dict.fromkeys(counted, 1.0)
        given = {number: weight for number, weight in enumerate(record.weights) if weight is not None}
        is_silent = self._train_on != "all"
        weights |= {number: weight for number, weight in given.items() if weight or number in counted or not is_silent}
        return weights

    def _find(self, conversation: Conversation, wanted: Collection[int]) -> tuple[str, dict[int, Span]]:
        """Spell the conversation out, and find the parts of the text that some of its messages became."""
        replies = [number for number, message in enumerate(conversation.messages) if _is_reply(message)]
        if self._template.marks_replies:
            marked = self._template.render_marked(conversation)
            if marked is not None and len(marked[1]) == len(replies):
                text, found = marked
                spans = dict(zip(replies, found, strict=True))
                if all(number in spans for number in wanted):
                    return text, {number: spans[number] for number in wanted}
        text = self._template.render(conversation, add_generation_prompt=False)
        if START_MARK in text or STOP_MARK in text:
            raise RecordError("it contains U+E000 or U+E001, which are no characters")
        search = _Search(self._template, conversation, text, self._special_names)
        return text, {number: search.find(number) for number in wanted}

    @cached_property
    def _special_names(self) -> list[str]:
        names = {self._tokenizer.spell(token) for token in self._tokenizer.special_ids}
        return sorted((name for name in names if name), key=len, reverse=True)


class _Search:
    """Looks for the messages of one conversation in what the template makes of it.

    Args:
        template: How it was spelled out.
        conversation: Its messages.
        text: What the template made of it.
        special_names: Of special tokens, the longest first.
    """

    def __init__(
        self, template: ChatTemplate, conversation: Conversation, text: str, special_names: Sequence[str]
    ) -> None:
        self._template, self._conversation, self._text = template, conversation, text
        self._special_names = special_names
        self._replaced: dict[int, Span | None] = {}

    def find(self, number: int) -> Span:
        """Return what one of the messages became.

        Raises:
            RecordError: It cannot be told.
        """
        span = self._by_replacement(number)
        if span is not None and _is_reply(self._conversation.messages[number]):
            span = self._widened(number, span)
        span = span or self._by_beginning(number)
        following = self._by_replacement(number + 1) if number + 1 < len(self._conversation.messages) else None
        if span is None or span[0] >= span[1] or (following is not None and following[0] < span[1]):
            role = self._conversation.messages[number]["role"]
            raise RecordError(
                f"message {number + 1} ({role}) cannot be found in what the chat template makes of the conversation, "
                "because it changes the text around it"
            )
        return span

    def _by_replacement(self, number: int) -> Span | None:
        """Put another content in its place, and see what stays the same before and after it; its neighbors ask, too."""
        if number not in self._replaced:
            self._replaced[number] = self._around(number)
        return self._replaced[number]

    def _around(self, number: int) -> Span | None:
        messages = [*self._conversation.messages]
        messages[number] = {"role": messages[number]["role"], "content": _IN_ITS_PLACE}
        other = self._render(messages)
        if other is None or other.count(START_MARK) != 1 or other.count(STOP_MARK) != 1:
            return None
        before, rest = other.split(START_MARK)
        after = rest.split(STOP_MARK)[1]
        start, stop = len(before), len(self._text) - len(after)
        is_whole = self._text.startswith(before) and self._text.endswith(after)
        return (start, stop) if start <= stop and is_whole else None

    def _widened(self, number: int, content: Span) -> Span:
        """Take in what the model has to write before the content, and the tokens by which it ends its turn.

        Before the content, that is what comes after the text that generation starts from: the name of a channel, or an
        empty thought.
        """
        messages = self._conversation.messages
        start, stop = content
        before = self._render(messages[:number])
        prompt = self._render(messages[:number], add_generation_prompt=True)
        earlier = self._by_replacement(number - 1) if number else None
        if before and prompt and earlier is not None and prompt.startswith(before) and prompt != before:
            header = prompt.removeprefix(before)
            place = self._text.rfind(header, earlier[1], start)
            start = place + len(header) if place >= 0 else start
        turn = self._text if number + 1 == len(messages) else self._render(messages[: number + 1])
        limit = len(turn) if turn and self._text.startswith(turn) else stop
        first = self._by_replacement(0)
        opening = self._text[: first[0] if first is not None else start]
        while name := self._special_name_at(stop):
            if stop > content[1] and (stop + len(name) > limit or name in opening):  # it begins the next turn
                break
            stop += len(name)
        return start, stop

    def _by_beginning(self, number: int) -> Span | None:
        """Spell out what comes before it, up to where it begins, and what ends with it."""
        if not _is_reply(self._conversation.messages[number]):
            return None
        before = self._render(self._conversation.messages[:number], add_generation_prompt=True)
        until = self._render(self._conversation.messages[: number + 1])
        if until is None or (before is None and number):
            return None
        before = before or ""
        if not self._text.startswith(until) or not until.startswith(before):
            return None
        said = self._conversation.messages[number]["content"].rsplit("</think>", 1)[-1].strip()
        if said not in until[len(before) :]:
            return None
        closed = max((until.rfind(name) + len(name) for name in self._special_names if name in until), default=0)
        ends_there = closed > len(before) and not until[closed:].strip()
        return len(before), closed if ends_there else len(until)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str | None:
        """Spell other messages out; None if the template refuses them, or if there are none."""
        try:
            return self._template.render(
                replace(self._conversation, messages=messages), add_generation_prompt=add_generation_prompt
            )
        except ConfigError:
            return None

    def _special_name_at(self, position: int) -> str:
        return next((name for name in self._special_names if self._text.startswith(name, position)), "")


def _is_reply(message: Mapping[str, Any]) -> bool:
    return bool(message["role"] == "assistant")
