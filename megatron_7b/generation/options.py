"""How tokens are chosen: what a caller asks for, over what generation_config.json says. Imports no torch."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from megatron_7b.errors import ConfigError
from megatron_7b.generation.grammars import Grammar
from megatron_7b.generation.settings import GenerationSettings

type EarlyStopping = bool | Literal["never"]

_MAX_LENGTH_PENALTY = 20
"""Within it a context of any length to this power is a number."""

MAX_LOGPROBS = 100
"""Tokens that can be reported at one place."""

_DRAWING = ("temperature", "top_k", "top_p")
_SAMPLING = (*_DRAWING, "repetition_penalty")
_OF_SAMPLES = ("presence_penalty", "frequency_penalty", "logit_bias", "min_new_tokens", "logprobs")
"""What a search has no use for; generation_config.json says nothing about it."""
_BEAMS = ("num_beams", "length_penalty", "early_stopping", "repetition_penalty")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is drawn.

    Attributes:
        temperature: Divides the logits; 0 always takes the most probable token (greedy).
        top_k: Keep this many tokens, the most probable ones; None keeps all.
        top_p: Then keep the fewest of the most probable ones whose share reaches this; None keeps all.
        repetition_penalty: Positive logits of tokens that the text has already are divided by this, negative ones
            multiplied, before anything else; 1 changes nothing.
        presence_penalty: Taken off the logits of tokens that the continuation has, as OpenAI defines it.
        frequency_penalty: Taken off them as often as it has them.
        logit_bias: Pairs of a token and what is added to its logit, none twice.
        min_new_tokens: Tokens before which none that ends the text is taken.
        logprobs: How many of the most probable tokens are reported at each place, with the log probability of the
            chosen one; None: nothing is reported. Probabilities are the model's own, before temperature and penalties.
        seed: The same seed gives the same text.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_new_tokens: int = 0
    logprobs: int | None = None
    seed: int = 1234

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: One is out of range; all of them in one message.
        """
        problems = []
        if not 0.0 <= self.temperature < math.inf:
            problems.append(f"temperature is {self.temperature}, expected a number of at least 0")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k is {self.top_k}, expected at least 1")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            problems.append(f"top_p is {self.top_p}, expected more than 0 and at most 1")
        problems += [
            f"{name} is {value}, expected a finite number"
            for name in ("presence_penalty", "frequency_penalty")
            if not math.isfinite(value := getattr(self, name))
        ]
        if self.min_new_tokens < 0:
            problems.append(f"min_new_tokens is {self.min_new_tokens}, expected at least 0")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            problems.append(f"logprobs is {self.logprobs}, expected 0 to {MAX_LOGPROBS}")
        problems += [
            f"logit_bias has {bias} for token {token}, expected a finite number"
            for token, bias in self.logit_bias
            if not math.isfinite(bias)
        ]
        _raise([*problems, *_wrong_penalty(self.repetition_penalty)])


@dataclass(frozen=True, kw_only=True)
class BeamOptions:
    """How beam search looks for the most probable texts. Names and meanings are those of transformers.

    Attributes:
        num_beams: Texts that are continued side by side, at least 2.
        length_penalty: A complete text's score is the sum of its log probabilities, divided by its number of new tokens
            to this power: above 0 favors longer texts.
        early_stopping: Stop once `num_beams` texts are complete (True), once no better one seems likely (False), or
            once none is possible (`"never"`).
        repetition_penalty: As in sampling, on log probabilities.
        num_return_sequences: How many of the best texts are wanted, at most `num_beams`.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    repetition_penalty: float = 1.0
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: One is out of range; all of them in one message.
        """
        problems = []
        if self.num_beams < 2:
            problems.append(f"num_beams is {self.num_beams}, expected at least 2 for a beam search")
        if not abs(self.length_penalty) <= _MAX_LENGTH_PENALTY:
            limit = _MAX_LENGTH_PENALTY
            problems.append(f"length_penalty is {self.length_penalty}, expected a number from -{limit} to {limit}")
        if self.early_stopping not in (True, False, "never"):
            problems.append(f"early_stopping is {self.early_stopping!r}, expected true, false or never")
        if not 1 <= self.num_return_sequences <= self.num_beams:
            problems.append(
                f"num_return_sequences is {self.num_return_sequences}, expected 1 to {self.num_beams}, the beams"
            )
        _raise([*problems, *_wrong_penalty(self.repetition_penalty)])


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """What a caller asks for; None leaves a choice to the model's generation_config.json.

    Attributes:
        max_new_tokens: A text ends here at the latest; None: as the settings say, or `DEFAULT_MAX_NEW_TOKENS`, or what
            the context leaves.
        num_return_sequences: Texts per prompt: samples, or the best ones that a beam search finds.
        temperature: As in `SamplingOptions`, like the following three.
        top_k: See there.
        top_p: See there.
        repetition_penalty: See there; beam search knows it too.
        seed: See there.
        num_beams: As in `BeamOptions`, like the following two; 1 is no beam search.
        length_penalty: See there.
        early_stopping: See there.
        ignore_eod: Continue after a token that ends texts.
        stop: Texts of which the first that appears ends a text, and is not part of it; not for beam search.
        presence_penalty: As in `SamplingOptions`, like the following four.
        frequency_penalty: See there.
        logit_bias: See there.
        min_new_tokens: See there.
        logprobs: See there.
        response_format: What texts must fit; not for beam search.
    """

    max_new_tokens: int | None = None
    num_return_sequences: int = 1
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 1234
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: EarlyStopping | None = None
    ignore_eod: bool = False
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_new_tokens: int = 0
    logprobs: int | None = None
    response_format: Grammar | None = None

    def __post_init__(self) -> None:
        """Check the values that do not depend on a model.

        Raises:
            ConfigError: One is out of range, or two contradict each other; all of them in one message.
        """
        problems = [
            f"{name} is {value}, expected at least 1"
            for name in ("max_new_tokens", "num_return_sequences", "num_beams")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        drawing = self._given(_DRAWING)
        if (self.num_beams or 1) > 1 and drawing:
            problems.append(
                f"num_beams is {self.num_beams}, which looks for the most probable texts; it does not go with "
                + ", ".join(f"{name} {value:g}" for name, value in drawing.items())
            )
        if "" in self.stop:
            problems.append("stop has an empty text, which is everywhere")
        if self.response_format is not None and self.ignore_eod:
            problems.append("response_format asks for a text that ends, and ignore_eod for one that does not")
        SamplingOptions(**self._of_samples())
        if self.num_beams == 1 or drawing:
            problems += [f"{name} needs num_beams above 1" for name in self._given(_BEAMS[1:3])]
        _raise(problems)

    def resolve(self, settings: GenerationSettings) -> tuple[SamplingOptions | BeamOptions, frozenset[str]]:
        """Return how tokens are chosen, and the names of the settings that decide something of it.

        Args:
            settings: What the model's folder says: it fills in what this leaves open.

        Raises:
            ConfigError: A value is out of range.
        """
        defaults = settings.defaults
        num_beams = self.num_beams
        if num_beams is None:  # whoever says how to draw wants no beams
            num_beams = 1 if self._given(_DRAWING) else int(defaults.get("num_beams", 1))
        names = _BEAMS if num_beams > 1 else _SAMPLING
        values: dict[str, Any] = {name: defaults[name] for name in names if name in defaults} | self._given(names)
        applied = {name for name in names if name in defaults and getattr(self, name) is None}
        if self.max_new_tokens is None and "max_new_tokens" in defaults:
            applied.add("max_new_tokens")
        if num_beams > 1:
            unfit = [f"stop is {list(self.stop)}, which needs num_beams 1"] if self.stop else []
            unfit += [f"{name} needs num_beams 1" for name in self._needing_samples()]
            _raise(unfit)
            options = {**values, "num_beams": num_beams, "num_return_sequences": self.num_return_sequences}
            return BeamOptions(**options), frozenset(applied)
        _raise([f"{name} needs num_beams above 1" for name in self._given(_BEAMS[1:3])])
        return SamplingOptions(**values, **self._of_samples(), seed=self.seed), frozenset(applied)

    def _of_samples(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _OF_SAMPLES}

    def _needing_samples(self) -> list[str]:
        """Name what was asked for and is nothing for a search."""
        changed = [name for name, value in self._of_samples().items() if value != getattr(SamplingOptions(), name)]
        return [*changed, *(["response_format"] if self.response_format is not None else [])]

    def _given(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def _wrong_penalty(penalty: float) -> list[str]:
    if 0.0 < penalty < math.inf:
        return []
    return [f"repetition_penalty is {penalty}, expected a number above 0"]


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError("; ".join(problems))
