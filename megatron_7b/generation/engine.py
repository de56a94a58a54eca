"""The engine: continues many texts at once, token by token, on a model at any TP×PP.

Texts share forward passes (continuous batching): a finished text gives its place to a waiting one. Every text has its
own position, so the lengths of its neighbours do not matter. Samples of the same prompt share its prefill.
"""

import collections
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from megatron_7b.errors import ConfigError
from megatron_7b.generation.cache import CachedAttention, KeyValueCache, attention_layers
from megatron_7b.generation.requests import FinishReason, GeneratedToken, GenerationRequest
from megatron_7b.generation.sampling import TokenSampler
from megatron_7b.generation.stages import StageRunner
from megatron_7b.model.kinds.chunk import ModelChunk
from megatron_7b.model.kinds.decoder.network import LanguageModel


@dataclass
class _Text:
    """A text that is being continued.

    Attributes:
        number: What `submit` returned.
        request: What was asked.
        sampler: Chooses its tokens.
        length: Tokens in the cache.
        last_token: The newest token, not in the cache yet.
        num_new: Tokens generated so far.
    """

    number: int
    request: GenerationRequest
    sampler: TokenSampler
    length: int = 0
    last_token: int = -1
    num_new: int = 0


class GenerationEngine:
    """Continues texts with a model.

    While it is open, the model's attention works on the engine's cache, so the model cannot be trained; closing puts
    everything back.

    **Collective:** on several ranks each builds its own engine over its part of the model, and all of them make the
    same calls in the same order; all get the same answers.

    Args:
        model: This rank's only chunk, with torch-native layers and without sequence parallelism.
        stop_ids: Tokens of which each ends a text.
        max_batch_size: Texts that share a forward pass.
        max_length: Tokens of a text, prompt included; longer requests are refused.

    Raises:
        ConfigError: the model cannot be used for generation as it was built.
    """

    def __init__(
        self,
        model: ModelChunk,
        *,
        stop_ids: Collection[int] = (),
        max_batch_size: int = 32,
        max_length: int = 1 << 30,
    ) -> None:
        model = _checked(model)
        self.stop_ids = frozenset(stop_ids)
        self.max_batch_size = max_batch_size
        self.max_length = max_length
        self._model = model
        self._attentions = attention_layers(model.decoder.layers)
        self._original_attentions = [attention.core_attention for attention in self._attentions]
        parameter = next(model.parameters())
        self._cache = KeyValueCache(
            len(self._attentions),
            self._attentions[0].num_query_groups_per_partition,
            self._attentions[0].hidden_size_per_attention_head,
            dtype=parameter.dtype,
            device=parameter.device,
        )
        for layer, attention in enumerate(self._attentions):
            attention.core_attention = CachedAttention(self._cache, layer, model.config.softmax_scale)
        self._was_training = model.training
        model.eval()
        self._stage = StageRunner(model, self._cache)
        self._waiting: collections.deque[_Text] = collections.deque()
        self._running: list[_Text] = []  # text i has row i of the cache
        self._num_submitted = 0

    def __enter__(self) -> Self:
        """Use the engine for the duration of a with block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Restore the model. Collective: none."""
        for attention, original in zip(self._attentions, self._original_attentions, strict=True):
            attention.core_attention = original
        self._model.train(self._was_training)

    @property
    def num_unfinished(self) -> int:
        """Texts that run or wait."""
        return len(self._waiting) + len(self._running)

    def submit(self, request: GenerationRequest) -> int:
        """Let a text take part from the next step with a free place on.

        Returns:
            The number under which its tokens are reported.

        Raises:
            ConfigError: the text would be longer than `max_length`, or has tokens that the model does not know.
        """
        request.check_length(self.max_length)
        vocab_size = self._model.true_vocab_size
        unknown = [token_id for token_id in request.prompt_ids if not 0 <= token_id < vocab_size]
        if unknown:
            raise ConfigError(
                f"the prompt has token {unknown[0]}, but the model knows {vocab_size} tokens",
                hint="the tokenizer is not the one that the model was trained with",
            )
        number = self._num_submitted
        self._num_submitted += 1
        self._waiting.append(
            _Text(number, request, TokenSampler(request.sampling, request.sample_index, request.prompt_ids))
        )
        return number

    @torch.inference_mode()
    def cancel(self, number: int) -> None:
        """Drop a text; nothing happens if it has ended already."""
        self._waiting = collections.deque(text for text in self._waiting if text.number != number)
        self._remove({number})

    @torch.inference_mode()
    def step(self) -> list[GeneratedToken]:
        """Continue by one token: the texts that wait, as far as there are places, or else all that run.

        Returns:
            The new tokens; none where nothing is left to do.

        **Collective:** all ranks that hold the model.
        """
        admitted = self._admit()
        if admitted:
            tokens = self._draw(self._prefill(admitted), admitted)
        elif self._running:
            tokens = self._draw(self._decode(), self._running)
        else:
            return []
        self._remove({token.request for token in tokens if token.finish_reason is not None})
        return tokens

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[GeneratedToken]:
        """Continue texts until all have ended, and give tokens as they come.

        Tokens carry the position of their request among `requests`.

        Raises:
            ConfigError: a request is impossible, as for `submit`.

        **Collective:** all ranks that hold the model, which also take all tokens from the iterator.
        """
        # All are checked here and now, before the first token is asked for.
        return self._run({self.submit(request): position for position, request in enumerate(requests)})

    def _run(self, positions: dict[int, int]) -> Iterator[GeneratedToken]:
        """Take steps until the texts of these numbers have ended; `positions` gives what they are reported as."""
        while positions:
            for token in self.step():
                if token.request not in positions:
                    continue
                yield GeneratedToken(positions[token.request], token.token_id, token.finish_reason)
                if token.finish_reason is not None:
                    del positions[token.request]

    def _admit(self) -> list[_Text]:
        """Take texts from the queue, those with a prompt of their own first."""
        num_free = self.max_batch_size - len(self._running)
        admitted = [self._waiting.popleft() for _ in range(min(num_free, len(self._waiting)))]
        first_of_prompt: dict[tuple[int, ...], _Text] = {}
        for text in admitted:
            first_of_prompt.setdefault(text.request.prompt_ids, text)
        return sorted(admitted, key=lambda text: first_of_prompt[text.request.prompt_ids] is not text)

    def _prefill(self, texts: Sequence[_Text]) -> Tensor | None:
        """Read the prompts of new texts and give each a row behind those that run; equal prompts are read once.

        Args:
            texts: As `_admit` orders them: the distinct prompts take neighbouring rows.

        Returns:
            Logits of the first new token [b, v] on the last stage, else None.
        """
        prompts = list(dict.fromkeys(text.request.prompt_ids for text in texts))
        sources = [prompts.index(text.request.prompt_ids) for text in texts]
        first_row = len(self._running)
        self._cache.reserve(
            first_row + len(texts), max(len(text.request.prompt_ids) + text.request.max_new_tokens for text in texts)
        )
        longest = max(map(len, prompts))
        padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        logits = self._stage.forward(
            padded, first_row, [0] * len(prompts), last=[len(prompt) - 1 for prompt in prompts]
        )
        for row, (text, source) in enumerate(zip(texts, sources, strict=True)):
            text.length = len(text.request.prompt_ids)
            if row != source:
                self._cache.copy_row(first_row + source, first_row + row, text.length)
        self._running += texts
        return None if logits is None else logits[sources]

    def _decode(self) -> Tensor | None:
        """Feed every running text its newest token; returns [b, v] on the last stage, else None."""
        tokens = [[text.last_token] for text in self._running]
        starts = [text.length for text in self._running]
        logits = self._stage.forward(tokens, 0, starts, last=[0] * len(tokens))
        for text in self._running:
            text.length += 1
        return logits

    def _draw(self, logits: Tensor | None, texts: Sequence[_Text]) -> list[GeneratedToken]:
        """Choose each text's next token on one rank and tell the others.

        Args:
            logits: [b, v] on the last stage, else None.
            texts: b texts.

        **Collective:** all ranks that hold the model.
        """
        chosen = None
        if logits is not None and self._stage.draws_tokens:
            chosen = [text.sampler.choose(row) for text, row in zip(texts, logits, strict=True)]
        tokens = []
        for text, token_id in zip(texts, self._stage.share_tokens(chosen, len(texts)), strict=True):
            text.last_token = token_id
            text.num_new += 1
            reason: FinishReason | None = None
            if token_id in self.stop_ids and not text.request.ignore_eod:
                reason = "eod"
            elif text.num_new == text.request.max_new_tokens:
                reason = "length"
            tokens.append(GeneratedToken(text.number, token_id, reason))
        return tokens

    def _remove(self, numbers: set[int]) -> None:
        """End running texts; the last rows move into the places that become free."""
        for row in reversed([row for row, text in enumerate(self._running) if text.number in numbers]):
            last = self._running.pop()
            if row < len(self._running):
                self._cache.copy_row(len(self._running), row, last.length)
                self._running[row] = last


def _checked(model: ModelChunk) -> LanguageModel:
    if not isinstance(model, LanguageModel):
        raise ConfigError(f"text is generated by decoders only; this model is a {type(model).__name__}")
    config = model.config
    problems = []
    if config.sequence_parallel:
        problems.append("with sequence parallelism: one token cannot be shared among ranks")
    if config.virtual_pipeline_model_parallel_size is not None:
        problems.append("in several chunks per pipeline rank")
    if config.context_parallel_size > 1:
        problems.append("with context parallelism")
    if config.apply_rope_fusion:
        problems.append("with fused rotary embeddings, which put all texts at one position")
    if problems:
        raise ConfigError(
            f"the model was built {'; '.join(problems)}",
            hint="build it with transformer_impl 'local', and parallel sizes for tensor and pipeline only",
        )
    return model
