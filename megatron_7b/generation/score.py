"""What is asked of scoring, and what it answers. Imports no torch."""

from dataclasses import dataclass

from megatron_7b.errors import ConfigError


@dataclass(frozen=True)
class ScoreRequest:
    """A continuation whose likelihood is wanted.

    Attributes:
        context_ids: What comes before; at least one token.
        continuation_ids: What is scored; at least one token.
    """

    context_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: One of them is empty.
        """
        if not self.context_ids or not self.continuation_ids:
            empty = "continuation" if self.context_ids else "context"
            raise ConfigError(
                f"the {empty} has no tokens", hint="a text by itself is scored after the token that begins texts"
            )


@dataclass(frozen=True)
class Score:
    """How likely a continuation is.

    Attributes:
        log_likelihood: Sum of the log probabilities of its tokens [nats].
        is_greedy: Whether each of its tokens is the likeliest one after those before it.
    """

    log_likelihood: float
    is_greedy: bool
