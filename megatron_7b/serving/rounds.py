"""What the ranks do together: rounds that the main rank announces, and what comes of them. Imports no torch."""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_7b.generation.grammars import Grammar
from megatron_7b.generation.options import GenerationOptions
from megatron_7b.generation.prompts import Prompt
from megatron_7b.generation.requests import TokenLogprobs

type Ticket = int
"""Number of what was asked, given by the main rank."""


@dataclass(frozen=True)
class Begin:
    """A prompt whose texts take part from this round on.

    Attributes:
        ticket: Its number.
        copy: Which copy of the model writes them.
        prompt: What is continued.
        options: How.
    """

    ticket: Ticket
    copy: int
    prompt: Prompt
    options: GenerationOptions


@dataclass(frozen=True)
class Round:
    """What all ranks do next.

    Attributes:
        task: Write on, label records, embed texts, show that all are still there, or end.
        model: Number of the model.
        begins: Prompts that join the texts being written.
        drops: Tickets whose texts nobody wants any more.
        grammars: What texts will have to fit that join soon.
        inputs: Records to label, or texts to embed.
    """

    task: Literal["write", "label", "embed", "rest", "end"]
    model: int = 0
    begins: tuple[Begin, ...] = ()
    drops: tuple[Ticket, ...] = ()
    grammars: tuple[Grammar, ...] = ()
    inputs: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Written:
    """What a round adds to a text.

    Attributes:
        ticket: Which prompt's.
        index: Which of its texts.
        text: What became complete, perhaps nothing.
        token_ids: The tokens that came.
        finish_reason: `eod`, `stop` or `length` if the text ends; None while it continues.
        logprobs: Of the tokens, if they were asked for.
        num_reused: Tokens of the prompt that were kept of an earlier text.
    """

    ticket: Ticket
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    num_reused: int = 0


@dataclass(frozen=True)
class Refused:
    """A prompt that the model does not take.

    Attributes:
        ticket: Its number.
        message: Why.
        hint: How to fix it.
    """

    ticket: Ticket
    message: str
    hint: str | None


type News = Written | Refused
