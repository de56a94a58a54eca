"""Texts that must fit a JSON schema or a regular expression: which tokens may come next. Imports no torch.

llguidance knows which tokens continue a text that can still become one that fits; all others get no probability.
"""

import functools
import importlib.util
import json
import logging
import re
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_7b.errors import ConfigError
from megatron_7b.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

logger = logging.getLogger(__name__)

_MAX_READY = 64
"""Grammars that are kept ready: applications have a few schemas, and ask for them again and again."""

_MAX_READY_BYTES = 2 * 2**20
"""Of their texts, all together: what is made of one takes about 40 times its text's memory."""

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Grammar:
    """What a text must fit.

    Attributes:
        kind: `json_schema`, `json_object` (any object) or `regex`.
        text: The schema as JSON, or the pattern; empty for `json_object`.
    """

    kind: Literal["json_schema", "json_object", "regex"]
    text: str = ""

    def __post_init__(self) -> None:
        """Check the grammar.

        Raises:
            ConfigError: It is none, asks for something that cannot be followed, or llguidance is not installed.
        """
        if self.kind == "json_schema":
            try:
                json.loads(self.text)
            except json.JSONDecodeError as error:
                raise ConfigError(f"the JSON schema is no JSON: {error}") from None
        if problem := _llguidance().LLMatcher.validate_grammar(self.spelled):
            raise ConfigError(f"the {self.noun} cannot be followed: {problem}")

    @property
    def noun(self) -> str:
        """What messages call it."""
        return "pattern" if self.kind == "regex" else "JSON schema"

    @property
    def spelled(self) -> str:
        """The grammar as llguidance takes it."""
        matcher = _llguidance().LLMatcher
        if self.kind == "regex":
            return str(matcher.grammar_from_regex(self.text))
        return str(matcher.grammar_from_json_schema(self.text if self.kind == "json_schema" else '{"type": "object"}'))


class GrammarVocabulary:
    """The tokens of a model as bytes, and grammars ready to be followed: made when first needed, or by `prepare`.

    May be used by several threads.

    Args:
        tokenizer: What the model writes with.
        stop_ids: Tokens of which each ends a text.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self.stop_ids = sorted(stop_ids)
        self._ready = ReadyGrammars(self._make_ready)

    def prepare(self, grammar: Grammar | None = None) -> None:
        """Do ahead what takes its time: the tables of the tokens, and what is made of a grammar.

        Nothing happens if llguidance is not installed, or no token ends a text.

        Raises:
            ConfigError: The grammar allows no text, or is too large to be followed.
        """
        if not self.stop_ids or importlib.util.find_spec("llguidance") is None:
            return
        if grammar is None:
            _ = self._tokens
            return
        ready = self._ready(grammar)
        if ready.is_error():
            problem = _first_line(ready.get_error())
            raise ConfigError(
                f"the {grammar.noun} cannot be followed: no text fits it, or it allows too many at once ({problem})"
            )

    def follow(self, grammar: Grammar) -> "GrammarState":
        """Begin a text that must fit a grammar.

        Raises:
            ConfigError: No token ends a text of this model.
        """
        if not self.stop_ids:
            raise ConfigError("no token ends a text of this model, so none can fit a grammar")
        return GrammarState(self._ready(grammar).deep_copy(), self.stop_ids)

    def _make_ready(self, grammar: Grammar) -> Any:
        matcher = _llguidance().LLMatcher(self._tokens, grammar.spelled)
        matcher.compute_bitmask()  # which tokens a text begins with takes the longest of all; its copies know it
        return matcher

    @functools.cached_property
    def _tokens(self) -> "LLTokenizer":
        tokens = token_bytes_of(self._tokenizer)
        special = sorted(self._tokenizer.special_ids | set(self.stop_ids))
        vocabulary = _Vocabulary(self._tokenizer, tokens, special, self.stop_ids[0])
        module = _llguidance()
        return module.LLTokenizer(module.TokenizerWrapper(vocabulary), n_vocab=len(tokens), eos_token=self.stop_ids)


class ReadyGrammars:
    """What is made of grammars: of those that were asked for last, and once of each, whichever threads ask.

    Args:
        make: Makes it.
    """

    def __init__(self, make: Callable[[Grammar], Any]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._found: dict[Grammar, Future[Any]] = {}  # in the order of their last use

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._found)

    def __call__(self, grammar: Grammar) -> Any:
        """Return what is made of a grammar; waits for a thread that is making it."""
        with self._lock:
            known = self._found.pop(grammar, None)
            found: Future[Any] = known or Future()
            self._found[grammar] = found
            self._drop_oldest()
        if known is None:
            try:
                found.set_result(self._make(grammar))
            except BaseException as error:
                found.set_exception(error)
                with self._lock:
                    self._found.pop(grammar, None)
                raise
        return found.result()

    def _drop_oldest(self) -> None:
        num_bytes = sum(len(grammar.text) for grammar in self._found)
        while len(self._found) > _MAX_READY or (num_bytes > _MAX_READY_BYTES and len(self._found) > 1):
            oldest = next(iter(self._found))
            num_bytes -= len(oldest.text)
            del self._found[oldest]


class _Vocabulary:
    """A tokenizer as llguidance asks for one."""

    def __init__(
        self, tokenizer: Tokenizer, tokens: list[bytes], special_token_ids: list[int], eos_token_id: int
    ) -> None:
        self._tokenizer, self._special = tokenizer, frozenset(special_token_ids)
        self.tokens = [token or b"\xff<%d>" % number for number, token in enumerate(tokens)]  # 0xFF is in no UTF-8 text
        self.special_token_ids = special_token_ids
        self.eos_token_id = eos_token_id
        self.bos_token_id = None

    def __call__(self, text: str) -> list[int]:
        """Encode a text, without tokens that begin or end one."""
        if not isinstance(text, str):
            raise TypeError(f"texts are str, this is {type(text).__name__}")  # which llguidance tries first
        return [token for token in self._tokenizer.encode(text) if token not in self._special]


class GrammarState:
    """How far a text has come.

    Args:
        matcher: llguidance's.
        stop_ids: Tokens of which each ends it.
    """

    def __init__(self, matcher: Any, stop_ids: Collection[int]) -> None:
        self._matcher = matcher
        self._stop_ids = list(stop_ids)

    def allowed(self, vocab_size: int) -> NDArray[np.bool_]:
        """Return which tokens may come next, [v].

        A text whose grammar fits nothing, or has become too large to be followed, ends there: an error would end
        the others that share its forward passes.
        """
        mask = np.zeros(vocab_size, dtype=np.bool_)
        if self._matcher.is_stopped() and not self._matcher.is_error():
            mask[self._stop_ids] = True
            return mask
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            problem = _first_line(self._matcher.get_error())
            logger.warning("a text ends early: its grammar cannot be followed any further: %s", problem)
            mask[self._stop_ids] = True
            return mask
        found = np.unpackbits(bits, bitorder="little")[:vocab_size].astype(np.bool_)
        mask[: len(found)] = found
        return mask

    def accept(self, token: int) -> None:
        """Continue by a token."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


def token_bytes_of(tokenizer: Tokenizer) -> list[bytes]:
    """Return what each token adds to a text, as bytes; nothing for tokens that are no text."""
    from megatron_7b.generation.text_stream import bytes_of_tokens

    of_token = bytes_of_tokens(tokenizer)
    if of_token is None:
        of_token = functools.partial(_bytes_after_another, tokenizer)
    return [b"" if token in tokenizer.special_ids else of_token(token) for token in range(tokenizer.vocab_size)]


def _bytes_after_another(tokenizer: Tokenizer, token: int) -> bytes:
    """Return what a token adds to a text that has begun: at its beginning, spaces may be left out."""
    if match := _BYTE.fullmatch(tokenizer.spell(token) or ""):
        return bytes([int(match.group(1), 16)])
    before = tokenizer.encode("a")
    return tokenizer.decode([*before, token])[len(tokenizer.decode(before)) :].encode()


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ConfigError(
            "texts that fit a grammar need llguidance, which is not installed", hint="pip install 'megatron_7b[serve]'"
        ) from None
    return llguidance
