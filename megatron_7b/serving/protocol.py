"""Requests as OpenAI's clients send them, checked field by field.

Fields that would change the answer and are not supported are refused rather than ignored; so are unknown ones, which
are most often misspelled.
"""

import functools
import json
from abc import abstractmethod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from megatron_7b.errors import ConfigError
from megatron_7b.generation.grammars import Grammar

MAX_CHOICES = 64
MAX_STOPS = 16
MAX_PROMPTS = 256
MAX_INPUTS = 2048
MAX_SCHEMA_BYTES = 524_288

# A type of its own does not hear that the models that use it are strict.
type Seed = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
type Tokens = list[Annotated[int, Field(strict=True, ge=0)]]


class Request(BaseModel):
    """What all requests have.

    Attributes:
        model: Name of a model; None takes the first one.
        user: Of whoever asks; ignored, like the two after it.
        metadata: Ignored.
        store: Ignored: nothing is stored.
        service_tier: Ignored.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None


class StreamOptions(BaseModel):
    """What a stream has beside its text.

    Attributes:
        include_usage: End with the numbers of tokens.
        include_obfuscation: Ignored.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(BaseModel):
    """What a text has to look like.

    Attributes:
        type: Any text, a JSON object, or JSON of a schema.
        json_schema: With `schema`.
    """

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None

    @model_validator(mode="after")
    def check_schema(self) -> "ResponseFormat":
        """Check that a schema is given where one is named.

        Raises:
            ValueError: It is not.
        """
        if self.type == "json_schema" and not isinstance((self.json_schema or {}).get("schema"), dict):
            raise ValueError('type json_schema needs {"json_schema": {"schema": {…}}}')
        return self


class TextRequest(Request):
    """What completions and chats have in common: how tokens are chosen, and how many.

    Attributes:
        stream: Send each piece of text as it comes.
        stream_options: See there.
        n: Texts per prompt.
        temperature: Divides the logits; 0 takes the most probable token. None: as the model's folder says.
        top_p: Draw from the most probable tokens that share this. None: as the model's folder says.
        top_k: Draw from this many tokens; 0 and -1 mean all. None: as the model's folder says.
        repetition_penalty: Above 1: tokens that the text has become less probable.
        presence_penalty: Taken off the logits of tokens that the answer has.
        frequency_penalty: The same, times how often.
        logit_bias: Added to the logits of tokens.
        seed: The same seed gives the same text. None: another text each time.
        stop: Texts that end a text, and are not part of it.
        ignore_eos: Continue after tokens that end a text.
        min_tokens: Tokens before one that ends the text may come.
        response_format: What the text has to look like.
    """

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    response_format: ResponseFormat | None = None

    @field_validator("stop")
    @classmethod
    def check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        """Check the stop texts.

        Raises:
            ValueError: One is empty, or there are too many.
        """
        stops = [stop] if isinstance(stop, str) else stop or []
        if "" in stops:
            raise ValueError("an empty text is everywhere; leave it out")
        if len(stops) > MAX_STOPS:
            raise ValueError(f"there are {len(stops)} texts, expected at most {MAX_STOPS}")
        return stop

    @model_validator(mode="after")
    def check_stream(self) -> "TextRequest":
        """Check that options of a stream come with a stream.

        Raises:
            ValueError: They do not.
        """
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """What is added to the logits of tokens.

        Raises:
            ConfigError: A key is no token.
        """
        given = self.logit_bias or {}
        wrong = next((key for key in given if not (key.isascii() and key.isdigit() and len(key) < 16)), None)
        if wrong is not None:
            raise ConfigError(f"logit_bias has a key {wrong[:40]!r}, expected the number of a token")
        return tuple((int(key), bias) for key, bias in given.items())

    @functools.cached_property
    def grammar(self) -> Grammar | None:
        """What the text has to fit.

        Raises:
            ConfigError: A schema cannot be followed.
        """
        asked = self.response_format
        if asked is None or asked.type == "text":
            return None
        if asked.type == "json_object":
            return Grammar("json_object")
        assert asked.json_schema is not None
        try:
            schema = json.dumps(asked.json_schema["schema"], ensure_ascii=False, separators=(",", ":"))
        except RecursionError:
            raise ConfigError("the JSON schema is nested too deeply") from None
        size = len(schema.encode())
        if size > MAX_SCHEMA_BYTES:
            raise ConfigError(
                f"the JSON schema has {size:,} bytes, expected at most {MAX_SCHEMA_BYTES:,}",
                hint="a pattern or a plain string in the place of long lists of values makes it shorter",
            )
        return Grammar("json_schema", schema)

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """How many of the most probable tokens are named at each place; None: not even the chosen one."""

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(TextRequest):
    """POST /v1/completions.

    Attributes:
        prompt: Texts to continue, or their tokens.
        max_tokens: The text ends here at the latest.
        echo: Begin with the prompt.
        logprobs: How many of the most probable tokens are named at each place.
        suffix: Not supported.
        best_of: Not supported, unless it is `n`.
    """

    prompt: str | list[str] | Tokens | list[Tokens]
    max_tokens: int | None = Field(16, ge=1)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    suffix: str | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def check_supported(self) -> "CompletionRequest":
        """Refuse what is not supported.

        Raises:
            ValueError: It is asked for.
        """
        if self.suffix:
            raise ValueError("suffix is not supported: models here continue texts")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo does not go with logprobs: those of prompts are not computed")
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of is not supported; ask for n texts")
        if self.prompt == []:
            raise ValueError("prompt is an empty list")
        if len(self.prompts) > MAX_PROMPTS:
            raise ValueError(f"prompt has {len(self.prompts)} texts, expected at most {MAX_PROMPTS}")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """As asked."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | Tokens]:
        """The prompts one by one."""
        given: Any = self.prompt
        is_one = isinstance(given, str) or isinstance(given[0], int)
        return [given] if is_one else list(given)


class TextPart(BaseModel):
    """A part of a message.

    Attributes:
        type: Always `text`: these models see nothing else.
        text: The text.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message of a conversation; further fields are handed to the chat template.

    Attributes:
        role: `system`, `user`, `assistant`, or what else the template knows; `developer` is `system`.
        content: The text.
    """

    model_config = ConfigDict(extra="allow", strict=True)

    role: str = Field(min_length=1, max_length=64)
    content: str | list[TextPart] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def check_parts(cls, content: object) -> object:
        """Refuse parts that are no text.

        Raises:
            ValueError: There are some.
        """
        parts = content if isinstance(content, list) else []
        kinds = {str(part.get("type"))[:40] for part in parts if isinstance(part, dict)} - {"text"}
        if kinds:
            raise ValueError(f"parts of type {', '.join(sorted(kinds))} are not supported: these models read text")
        return content

    def to_message(self) -> dict[str, Any]:
        """Return it as the chat template reads it."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return {**(self.model_extra or {}), "role": role, "content": content if content is not None else ""}


class ChatRequest(TextRequest):
    """POST /v1/chat/completions.

    Attributes:
        messages: The conversation, the oldest first.
        max_tokens: The reply ends here at the latest. None: where the context does.
        max_completion_tokens: The same by its newer name.
        logprobs: Say how probable each token was.
        top_logprobs: And how many of the most probable ones.
        tools: Not supported; neither are the two after it.
        tool_choice: See there.
        functions: See there.
        modalities: Only `["text"]`.
        reasoning_effort: Ignored, like the one after it.
        parallel_tool_calls: Ignored.
    """

    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    modalities: list[str] | None = None
    reasoning_effort: str | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def check_supported(self) -> "ChatRequest":
        """Refuse what is not supported.

        Raises:
            ValueError: It is asked for, or two fields contradict each other.
        """
        if (self.tools and self.tool_choice != "none") or self.functions:
            raise ValueError("tools and functions are not supported: replies are texts")
        if self.modalities not in (None, ["text"]):
            raise ValueError(f'modalities is {json.dumps(self.modalities)}, expected ["text"]')
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only for logprobs true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """As asked, in two fields."""
        return (self.top_logprobs or 0) if self.logprobs else None


class EmbeddingRequest(Request):
    """POST /v1/embeddings.

    Attributes:
        input: Texts.
        encoding_format: Numbers, or base64 of their FP32 bytes (the client's default).
        dimensions: Keep this many numbers of each vector, made of length 1 again.
    """

    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)

    @property
    def texts(self) -> list[str]:
        """The texts."""
        return [self.input] if isinstance(self.input, str) else self.input


class ClassifyRequest(Request):
    """POST /v1/classify.

    Attributes:
        input: Texts, or records as `megatron-7b predict` reads them.
    """

    input: str | dict[str, Any] | list[str | dict[str, Any]]

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records."""
        given = self.input if isinstance(self.input, list) else [self.input]
        return [{"text": one} if isinstance(one, str) else one for one in given]
