"""What the web server knows of each model: its name, and how requests are prepared for it. Imports no torch."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_7b.config import RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.generation.grammars import Grammar
from megatron_7b.generation.options import GenerationOptions
from megatron_7b.generation.prompts import Prompt
from megatron_7b.generation.setup import GenerationSetup
from megatron_7b.serving.errors import ApiError, refusal
from megatron_7b.serving.jobs import WritingJob
from megatron_7b.serving.probabilities import TokenTexts
from megatron_7b.serving.protocol import ChatMessage, TextRequest
from megatron_7b.tokenizer import Tokenizer

if TYPE_CHECKING:
    from megatron_7b.prediction.tasks import PredictedTask

MAX_CHAT_TOKENS = 1024
"""Where a reply ends whose request does not say it: text after text in the cache's room."""


@dataclass(frozen=True)
class ServedModel:
    """A model that clients can ask for.

    Attributes:
        number: Among those of the server.
        name: By which clients ask for it.
        config: Of its checkpoint.
        folder: The complete checkpoint.
        setup: Of a model that writes texts.
        task: Of a model with a head.
        tokenizer: Of a model that gives texts vectors.
        parent: Name of the model that an adapter belongs to.
        created: Unix time at which it was loaded.
    """

    number: int
    name: str
    config: RunConfig
    folder: Path
    setup: GenerationSetup | None = None
    task: "PredictedTask | None" = None
    tokenizer: Tokenizer | None = None
    parent: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Paths that it answers at."""
        if self.setup is not None:
            return ("/v1/completions", "/v1/chat/completions") if self.has_chat else ("/v1/completions",)
        return ("/v1/classify",) if self.task is not None else ("/v1/embeddings",)

    @property
    def has_chat(self) -> bool:
        """Whether it answers conversations."""
        from megatron_7b.tokenizer.chat_template import has_chat_template

        return self.setup is not None and not self.setup.is_encoder_decoder and has_chat_template(self.setup.tokenizer)

    @property
    def token_texts(self) -> TokenTexts:
        """The texts of its tokens one by one."""
        assert self.setup is not None
        return TokenTexts(self.setup.tokenizer)

    @property
    def max_length(self) -> int:
        """Tokens of its longest text, prompt included."""
        return self.config.model.max_position_embeddings if self.setup is not None else self.config.data.seq_length

    def encode(self, prompt: str | Sequence[int]) -> Prompt:
        """Return what is to be continued.

        Raises:
            ApiError: It cannot be.
        """
        assert self.setup is not None
        try:
            if isinstance(prompt, str):
                return self.setup.encode(prompt)
            size = self.config.model.vocab_size or 0
            if not prompt or max(prompt) >= size:
                what = "an empty list" if not prompt else f"token {max(prompt)}"
                raise ConfigError(f"prompt has {what}, but the model knows tokens 0 to {size - 1}")
            known = [token for token in prompt if token < self.setup.tokenizer.vocab_size]
            return Prompt(self.setup.tokenizer.decode(known), tuple(prompt), is_source=self.setup.is_encoder_decoder)
        except ConfigError as error:
            raise refusal(error, param="prompt") from None

    def encode_chat(self, messages: Sequence[ChatMessage]) -> Prompt:
        """Return a conversation up to where the reply begins.

        Raises:
            ApiError: The tokenizer has no template, or it refuses the conversation.
        """
        assert self.setup is not None
        if not self.has_chat:
            raise ApiError(
                400,
                f"the model {self.name!r} has no chat template, so it reads no conversations; "
                "POST /v1/completions continues texts",
                param="model",
                code="no_chat_template",
            )
        try:
            return self.setup.encode_chat([message.to_message() for message in messages])
        except ConfigError as error:
            raise refusal(error, param="messages") from None

    def options(self, prompt: Prompt, asked: TextRequest, max_tokens: int | None) -> GenerationOptions:
        """Return how a prompt is to be continued; the check of a grammar takes its time.

        Args:
            prompt: What is continued.
            asked: How.
            max_tokens: The text ends here at the latest; None: where the context does, or a little earlier.

        Raises:
            ApiError: An option is impossible, or the text does not fit into the model's context.
        """
        assert self.setup is not None
        if max_tokens is None:
            context = self.setup.context
            left = MAX_CHAT_TOKENS if context is None else max(1, context - len(prompt.ids))
            max_tokens = min(MAX_CHAT_TOKENS, left)
        try:
            options = _options(asked, max_tokens)
            self.setup.requests([prompt], options)
            if options.response_format is not None and not self.setup.stop_ids:
                raise ConfigError(f"the model {self.name!r} has no token that ends a text, so none can fit a format")
        except ConfigError as error:
            raise refusal(error) from None
        return options

    def prepare(self, grammar: Grammar) -> None:
        """Make a grammar ready, here rather than in the engine's thread, where others would wait for it.

        Raises:
            ApiError: It cannot be followed.
        """
        assert self.setup is not None
        try:
            self.setup.grammar_vocabulary.prepare(grammar)
        except ConfigError as error:
            raise refusal(error, param="response_format") from None

    def job(self, prompt: Prompt, options: GenerationOptions) -> WritingJob:
        """Return the job of a prompt, in the thread of the event loop."""
        start = 1 if prompt.is_source else 0  # what a decoder begins with, apart from the prompt
        assert options.max_new_tokens is not None
        return WritingJob(self.number, prompt, options, len(prompt.ids) + start + options.max_new_tokens)


def find_model(models: Sequence[ServedModel], name: str | None, path: str) -> ServedModel:
    """Return the model that a request asks for; None takes the first one that answers at a path.

    Raises:
        ApiError: There is none.
    """
    if name is None:
        found = next((one for one in models if path in one.endpoints), models[0])
    else:
        named = next((one for one in models if one.name == name), None)
        if named is None:
            names = ", ".join(one.name for one in models)
            raise ApiError(
                404, f"there is no model {name[:200]!r}; expected one of: {names}", param="model",
                code="model_not_found",
            )  # fmt: skip
        found = named
    # A model without a template gets a sentence of its own in `encode_chat`.
    if path not in found.endpoints and not (path == "/v1/chat/completions" and found.setup is not None):
        raise ApiError(
            400,
            f"the model {found.name!r} does not answer at {path}; it does at {', '.join(found.endpoints)}",
            param="model",
            code="wrong_endpoint",
        )
    return found


def _options(asked: TextRequest, max_tokens: int) -> GenerationOptions:
    """Return what is asked of the engine.

    Raises:
        ConfigError: An option is impossible.
    """
    if (asked.min_tokens or 0) > max_tokens:
        raise ConfigError(f"min_tokens is {asked.min_tokens}, expected at most {max_tokens}, where the text ends")
    return GenerationOptions(
        max_new_tokens=max_tokens,
        num_return_sequences=asked.n or 1,
        temperature=asked.temperature,
        top_k=None if asked.top_k in (0, -1) else asked.top_k,
        top_p=asked.top_p,
        repetition_penalty=asked.repetition_penalty,
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        logit_bias=asked.biases,
        min_new_tokens=asked.min_tokens or 0,
        logprobs=asked.num_logprobs,
        response_format=asked.grammar,
        seed=secrets.randbits(62) if asked.seed is None else asked.seed,
        num_beams=1,
        ignore_eod=bool(asked.ignore_eos),
        stop=asked.stops,
    )
