"""`megatron-7b data chat`: what a model would learn from a file of conversations."""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_7b.errors import ConfigError

if TYPE_CHECKING:
    from megatron_7b.data.conversations.statistics import ConversationStatistics
    from megatron_7b.data.conversations.trained import EncodedConversation

type Actions = "argparse._SubParsersAction[argparse.ArgumentParser]"

_GREEN, _DIM, _PLAIN = "\x1b[42;30m", "\x1b[2m", "\x1b[0m"


def add_chat(actions: "Actions") -> None:
    """Declare `data chat`."""
    chat = actions.add_parser(
        "chat",
        help="show conversations as a model learns them, with the trained tokens marked",
        description="Spell the conversations of a JSONL file out by the tokenizer's chat template, and mark the tokens "
        "that are trained. Formats: messages (role, content), ShareGPT's conversations, Alpaca's instruction, input "
        "and output, prompt and completion.",
    )
    chat.set_defaults(run=_run)
    chat.add_argument("--input", required=True, type=Path, metavar="FILE", help="JSONL, one conversation a line")
    chat.add_argument("--tokenizer-model", required=True, metavar="PATH", help="tokenizer folder or file")
    chat.add_argument("--chat-template", type=Path, metavar="FILE", help="instead of the tokenizer's own template")
    chat.add_argument(
        "--train-on",
        choices=("assistant", "last", "all"),
        default="assistant",
        help="which messages are trained: the assistant's (default), its last one, or everything",
    )
    chat.add_argument(
        "--seq-length", type=int, default=2048, metavar="N", help="length of a row, for the padding (default 2048)"
    )
    chat.add_argument("--show", type=int, default=3, metavar="N", help="conversations to print (default 3)")
    chat.add_argument("--json", action="store_true", help="a line per conversation: its ids and their loss mask")


def _run(arguments: argparse.Namespace) -> int:
    """Print.

    Raises:
        MegatronError: A mistake that the user can fix.
    """
    if arguments.seq_length < 1 or arguments.show < 0:
        name, value = ("seq-length", arguments.seq_length) if arguments.seq_length < 1 else ("show", arguments.show)
        raise ConfigError(f"--{name} is {value}, expected at least {1 if name == 'seq-length' else 0}")
    conversations = _read(arguments)
    if arguments.json:
        for line, conversation in conversations:
            print(json.dumps({"line": line, **_as_json(conversation)}))
        return 0
    shown = list(itertools.islice(conversations, arguments.show))
    mark = _colored if sys.stdout.isatty() else _bracketed
    for line, conversation in shown:
        trained = int((conversation.loss_mask > 0).sum())
        print(f"── line {line}: {len(conversation.ids):,} tokens, {trained:,} of them trained")
        print(mark(conversation))
    print(_in_words(_count(itertools.chain(shown, conversations), arguments.seq_length), arguments.seq_length))
    return 0


def _read(arguments: argparse.Namespace) -> "Iterator[tuple[int, EncodedConversation]]":
    from megatron_7b.data.conversations.reading import read_conversations
    from megatron_7b.data.conversations.trained import ConversationEncoder
    from megatron_7b.tokenizer import load_tokenizer
    from megatron_7b.tokenizer.chat_template import ChatTemplate
    from megatron_7b.tokenizer.default_chat_template import find_chat_template

    tokenizer = load_tokenizer(arguments.tokenizer_model)
    template = find_chat_template(tokenizer, arguments.chat_template)
    encoder = ConversationEncoder(tokenizer, ChatTemplate(tokenizer, template), arguments.train_on)
    return read_conversations(arguments.input, encoder.encode)


def _as_json(conversation: "EncodedConversation") -> dict[str, list[int] | list[float]]:
    mask = conversation.loss_mask.tolist()
    whole = all(weight.is_integer() for weight in mask)
    return {"ids": conversation.ids.tolist(), "loss_mask": [int(weight) for weight in mask] if whole else mask}


def _count(conversations: "Iterator[tuple[int, EncodedConversation]]", seq_length: int) -> "ConversationStatistics":
    import numpy as np

    from megatron_7b.data.conversations.statistics import describe_conversations

    counts = [(len(conversation.ids), int((conversation.loss_mask > 0).sum())) for _, conversation in conversations]
    lengths, trained = np.asarray(counts, np.int64).T
    return describe_conversations(lengths, trained, seq_length)


def _colored(conversation: "EncodedConversation") -> str:
    return "".join(f"{_GREEN if trained else _DIM}{text}{_PLAIN}" for text, trained in _runs(conversation))


def _bracketed(conversation: "EncodedConversation") -> str:
    return "".join(f"⟦{text}⟧" if trained else text for text, trained in _runs(conversation))


def _runs(conversation: "EncodedConversation") -> Iterator[tuple[str, bool]]:
    """Cut the text where trained tokens begin or end."""
    covered = bytearray(len(conversation.text))
    for (start, stop), weight in zip(conversation.offsets, conversation.loss_mask, strict=True):
        if weight:
            covered[start:stop] = b"\x01" * (stop - start)
    for trained, characters in itertools.groupby(range(len(covered)), key=covered.__getitem__):
        positions = list(characters)
        yield conversation.text[positions[0] : positions[-1] + 1], bool(trained)


def _in_words(found: "ConversationStatistics", seq_length: int) -> str:
    trained = found.trained_tokens / found.tokens
    lines = [
        f"{found.conversations:,} conversations, {found.tokens:,} tokens, {trained:.0%} of them trained",
        f"length: median {found.median_length:,}, 95 of 100 up to {found.length_95:,}, longest {found.max_length:,}",
        f"padding in rows of {seq_length:,}: {found.padded_share:.0%} one by one, {found.packed_share:.1%} packed",
    ]
    if found.too_long:
        lines.append(f"{found.too_long:,} conversations are longer than a row, and would be cut after a turn")
    return "\n".join(lines)
