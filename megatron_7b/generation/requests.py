"""What is asked of the engine, and what it answers. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_7b.errors import ConfigError
from megatron_7b.generation.grammars import Grammar, GrammarVocabulary
from megatron_7b.generation.options import BeamOptions, SamplingOptions

FinishReason = Literal["eod", "length"]


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One text to be continued.

    Attributes:
        prompt_ids: At least one token.
        max_new_tokens: The text ends here at the latest.
        decoding: How tokens are chosen.
        sample_index: Tells samples of one prompt and seed apart.
        ignore_eod: Continue after a token that ends texts.
        grammar: What the text must fit, with the tokens that it is made of.
        forced_last_id: Token that a text of `max_new_tokens` ends with; None: whichever is chosen.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    decoding: SamplingOptions | BeamOptions = field(default_factory=SamplingOptions)
    sample_index: int = 0
    ignore_eod: bool = False
    forced_last_id: int | None = None
    grammar: tuple[GrammarVocabulary, Grammar] | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: The prompt is empty, or no token is asked for.
        """
        if not self.prompt_ids:
            raise ConfigError(
                "the prompt has no tokens", hint="begin with the tokenizer's bos or end-of-document token"
            )
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")

    @property
    def num_rows(self) -> int:
        """Places that the text takes in a batch."""
        return self.decoding.num_beams if isinstance(self.decoding, BeamOptions) else 1

    def check_length(self, max_length: int) -> None:
        """Check that the text fits into a context.

        Raises:
            ConfigError: Prompt and new tokens together are more than `max_length`.
        """
        length = len(self.prompt_ids) + self.max_new_tokens
        if length > max_length:
            raise ConfigError(
                f"a prompt of {len(self.prompt_ids)} tokens and {self.max_new_tokens} new ones make {length}, "
                f"but the model's context is {max_length} tokens",
                hint="shorten the prompt, or ask for fewer tokens",
            )


@dataclass(frozen=True)
class TokenLogprobs:
    """How probable the model finds a token, before temperature and penalties.

    Attributes:
        logprob: Of the chosen token.
        top: The most probable tokens, each with its log probability, in falling order.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class GeneratedToken:
    """One new token.

    Attributes:
        request: Number that `GenerationEngine.submit` gave.
        token_id: The token; one that ends the text is reported too.
        finish_reason: Why the text ends with this token; None if it continues.
        logprobs: If they were asked for.
        num_reused: Tokens of the prompt that an earlier text has read.
    """

    request: int
    token_id: int
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None = None
    num_reused: int = 0

    @property
    def is_last(self) -> bool:
        """Whether nothing follows about this request."""
        return self.finish_reason is not None


@dataclass(frozen=True)
class Hypothesis:
    """A text that beam search has found.

    Attributes:
        token_ids: Its new tokens, one that ends it included.
        score: Sum of their log probabilities, divided as `BeamOptions.length_penalty` says.
        finish_reason: Why it ends.
    """

    token_ids: tuple[int, ...]
    score: float
    finish_reason: FinishReason


@dataclass(frozen=True)
class FinishedSearch:
    """A beam search has ended.

    Attributes:
        request: Number that `GenerationEngine.submit` gave.
        hypotheses: The texts that were asked for, the best first.
    """

    request: int
    hypotheses: tuple[Hypothesis, ...]

    @property
    def is_last(self) -> bool:
        """Nothing follows."""
        return True


type GenerationEvent = GeneratedToken | FinishedSearch
