"""The engine: continues many texts at once, token by token, on a model at any TP×PP.

Texts share forward passes (continuous batching): a finished text gives its place to a waiting one. Every text has its
own position, so the lengths of its neighbors do not matter. Samples of the same prompt share its reading. A beam search
is a text with several rows.
"""

import collections
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from megatron_7b.errors import ConfigError
from megatron_7b.generation.beams import check_vocabulary
from megatron_7b.generation.cache_room import CacheRoom
from megatron_7b.generation.decoder_runner import DecoderRunner
from megatron_7b.generation.encoder_decoder_runner import EncoderDecoderRunner
from megatron_7b.generation.options import BeamOptions
from megatron_7b.generation.requests import GenerationEvent, GenerationRequest
from megatron_7b.generation.runner import ModelRunner
from megatron_7b.generation.sampling import most_probable
from megatron_7b.generation.score import Score, ScoreRequest
from megatron_7b.generation.scoring import Scorer
from megatron_7b.generation.texts import RunningText, SampledText, SearchedText
from megatron_7b.model.kinds.chunk import ModelChunk
from megatron_7b.model.kinds.decoder.network import LanguageModel
from megatron_7b.model.kinds.encoder_decoder.network import EncoderDecoderModel


class GenerationEngine:
    """Continues texts with a model.

    While it is open, the model's attention works on the engine's cache, so the model cannot be trained; closing puts
    everything back.

    **Collective:** on several ranks each builds its own engine over its part of the model, and all of them make the
    same calls in the same order; all get the same answers.

    Args:
        model: This rank's only chunk, with torch-native layers and without sequence parallelism.
        stop_ids: Tokens of which each ends a text.
        max_batch_size: Rows that share a forward pass: a text has one, a beam search `num_beams`.
        max_length: Tokens of a text, prompt included; longer requests are refused. An encoder-decoder, whose texts are
            apart from their prompts, has no limit.
        max_cache_bytes: As for `limit_cache`; None: the cache grows with what is asked.
        prefix_cache: As for `limit_cache`.
        decoder_start_id: Token that the decoder of an encoder-decoder begins with; needed there only.
        cuda_graphs: On one GPU, append tokens in steps that are started as one, as `fixed_steps` says.

    Raises:
        ConfigError: the model cannot be used for generation as it was built.
    """

    def __init__(
        self,
        model: ModelChunk,
        *,
        stop_ids: Collection[int] = (),
        max_batch_size: int = 32,
        max_length: int | None = None,
        max_cache_bytes: int | None = None,
        prefix_cache: bool = False,
        decoder_start_id: int | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        self.stop_ids = frozenset(stop_ids)
        self.max_batch_size = max_batch_size
        self.max_length = max_length
        self._runner = _build_runner(model, decoder_start_id, cuda_graphs=cuda_graphs)
        self._model = model
        self._was_training = model.training
        model.eval()
        self._waiting: collections.deque[RunningText] = collections.deque()
        self._running: list[RunningText] = []  # together they have rows [0, n) of the cache
        self._num_submitted = 0
        self._room: CacheRoom | None = None
        if max_cache_bytes is not None:
            self.limit_cache(max_cache_bytes, prefix_cache=prefix_cache)
        elif prefix_cache:
            raise ConfigError("prefix_cache needs max_cache_bytes: what is kept would grow without end")

    def __enter__(self) -> Self:
        """Use the engine for the duration of a with block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Restore the model. Collective: none."""
        self._runner.close()
        self._model.train(self._was_training)

    def limit_cache(self, max_bytes: int, *, prefix_cache: bool = False) -> None:
        """Bound the memory of keys and values on each rank, before the first text; texts wait until there is room.

        Args:
            max_bytes: Memory, what a resize takes for a moment included.
            prefix_cache: Keep what texts began with where others leave room: who begins alike is read from there on.

        Raises:
            ConfigError: There would be no room for a token, or the model reads prompts as a whole.

        **Collective:** all ranks.
        """
        assert self._runner.num_cached == 0, "texts were submitted already"
        self._room = CacheRoom(self._runner, max_bytes, keeps_prefixes=prefix_cache)

    @property
    def max_cache_tokens(self) -> int | None:
        """Tokens, all rows together, that the cache has room for; None: as many as are asked."""
        return None if self._room is None else self._room.max_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Tokens that memory is allocated for now, beside kept prefixes."""
        return self._runner.num_cached

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens of texts' beginnings that are kept."""
        return 0 if self._room is None else self._room.num_prefix_tokens

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[int, Score]]:
        """Yield the position of each request and how likely its continuation is, as they come.

        Raises:
            ConfigError: A text does not fit, texts are running, or the model is no decoder.

        **Collective:** all ranks that hold the model, which take everything from the iterator.
        """
        if not isinstance(self._runner, DecoderRunner):
            raise ConfigError("continuations are scored by decoders; this model reads and writes apart")
        if self.num_unfinished:
            raise ConfigError(f"{self.num_unfinished} texts are running, whose cache scoring would overwrite")
        scorer = Scorer(self._runner, max_batch_size=self.max_batch_size, max_length=self.max_length, room=self._room)
        return scorer.score(requests)

    @property
    def num_unfinished(self) -> int:
        """Texts that run or wait."""
        return len(self._waiting) + len(self._running)

    def submit(self, request: GenerationRequest) -> int:
        """Let a text take part from the next step with enough free places on.

        Returns:
            The number under which its tokens are reported.

        Raises:
            ConfigError: the text would be longer than `max_length`, has tokens that the model does not know, or asks
                for more beams than there are places or tokens, or there is never room for it.
        """
        if self.max_length is not None:
            request.check_length(self.max_length)
        vocab_size = self._runner.vocab_size
        unknown = [token_id for token_id in request.prompt_ids if not 0 <= token_id < vocab_size]
        if unknown:
            raise ConfigError(
                f"the prompt has token {unknown[0]}, but the model knows {vocab_size} tokens",
                hint="the tokenizer is not the one that the model was trained with",
            )
        if request.forced_last_id is not None and not 0 <= request.forced_last_id < vocab_size:
            raise ConfigError(
                f"texts are to end with token {request.forced_last_id}, but the model knows {vocab_size} tokens",
                hint="forced_eos_token_id of generation_config.json is of another model",
            )
        biased = [token for token, _ in getattr(request.decoding, "logit_bias", ()) if not 0 <= token < vocab_size]
        if biased:
            raise ConfigError(f"logit_bias names token {biased[0]}, but the model knows {vocab_size} tokens")
        if request.num_rows > self.max_batch_size:
            raise ConfigError(
                f"num_beams is {request.num_rows}, but a forward pass has room for {self.max_batch_size} texts",
                hint="ask for fewer beams, or open with a larger max_batch_size",
            )
        if self._room is not None:
            self._room.check(request)
        text = self._begin(self._num_submitted, request)
        self._num_submitted += 1
        self._waiting.append(text)
        return text.number

    def _begin(self, number: int, request: GenerationRequest) -> RunningText:
        context = self._runner.context_of(request.prompt_ids)
        stop_ids: frozenset[int] = frozenset() if request.ignore_eod else self.stop_ids
        if not isinstance(request.decoding, BeamOptions):
            return SampledText(number, request, context, stop_ids)
        check_vocabulary(request.decoding, len(stop_ids), self._runner.vocab_size)
        return SearchedText(number, request, context, stop_ids, self._runner.vocab_size)

    @torch.inference_mode()
    def cancel(self, number: int) -> None:
        """Drop a text; nothing happens if it has ended already."""
        self._waiting = collections.deque(text for text in self._waiting if text.number != number)
        self._remove([text for text in self._running if text.number == number])

    @torch.inference_mode()
    def step(self) -> list[GenerationEvent]:
        """Continue by one token: the texts that wait, as far as there are places, or else all that run.

        Returns:
            The new tokens and the results of searches that have ended; none if nothing is left to do.

        **Collective:** all ranks that hold the model.
        """
        texts = self._admit()
        if texts:
            logits = self._read(texts)
        elif self._running:
            texts = self._running
            logits = self._advance()
        else:
            return []
        events = self._accept(texts, self._choose(texts, logits))
        self._remove([text for text in texts if text.is_done])
        return events

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[GenerationEvent]:
        """Continue texts until all have ended, and give tokens as they come, of searches their results.

        These carry the position of their request among `requests`.

        Raises:
            ConfigError: a request is impossible, as for `submit`.

        **Collective:** all ranks that hold the model, which also take everything from the iterator.
        """
        # All are checked here and now, before the first token is asked for.
        return self._run({self.submit(request): position for position, request in enumerate(requests)})

    def _run(self, positions: dict[int, int]) -> Iterator[GenerationEvent]:
        """Take steps until the texts of these numbers have ended; `positions` gives what they are reported as."""
        while positions:
            for event in self.step():
                if event.request not in positions:
                    continue
                yield replace(event, request=positions[event.request])
                if event.is_last:
                    del positions[event.request]

    def _admit(self) -> list[RunningText]:
        """Take texts from the queue, the oldest first, as many as there are places and room for."""
        num_free = self.max_batch_size - self._num_rows
        admitted: list[RunningText] = []
        together = [text.request for text in self._running]
        while self._waiting and (request := self._waiting[0].request).num_rows <= num_free:
            together.append(request)
            if self._room is not None and not self._room.fits(together):
                break
            num_free -= request.num_rows
            admitted.append(self._waiting.popleft())
        return admitted

    @property
    def _num_rows(self) -> int:
        """Rows of the cache that texts have."""
        return sum(len(text.rows) for text in self._running)

    def _read(self, texts: Sequence[RunningText]) -> list[Tensor | None]:
        """Read the prompts of new texts and give each its rows after those in use; equal prompts are read once.

        Returns:
            For each text the logits of its first new token [1, v], on the last stage, else None.
        """
        first_row = self._num_rows
        together = [(text.request, text.length) for text in (*self._running, *texts)]
        prompts = list(dict.fromkeys(text.request.prompt_ids for text in texts))
        if self._room is None:
            self._runner.reserve(sum(request.num_rows for request, _ in together), together)
            known = dict.fromkeys(prompts, 0)
        else:
            known = self._room.reserve(together, prompts)
        prompts.sort(key=lambda prompt: len(prompt) - known[prompt])
        for row, prompt in enumerate(prompts, first_row):
            if self._room is not None:
                self._room.restore(prompt, known[prompt], row)
        logits = self._runner.read(prompts, first_row, [known[prompt] for prompt in prompts])
        row_of_prompt = {prompt: first_row + index for index, prompt in enumerate(prompts)}
        untaken = dict(row_of_prompt)
        free_rows = itertools.count(first_row + len(prompts))
        for text in texts:
            prompt, num_rows = text.request.prompt_ids, text.request.num_rows
            text.length = text.num_shared_tokens = len(self._runner.context_of(prompt))
            text.num_reused = known[prompt]
            source = row_of_prompt[prompt]
            own = [untaken.pop(prompt)] if prompt in untaken else []
            text.rows = [*own, *itertools.islice(free_rows, num_rows - len(own))]
            copies = [(source, row) for row in text.rows if row != source]
            if copies:
                self._runner.copy_rows(copies, slice(0, text.length))
        self._running += texts
        for text in texts:
            self._keep(text)
        if logits is None:
            return [None] * len(texts)
        return [logits[prompts.index(text.request.prompt_ids)][None] for text in texts]

    def _advance(self) -> list[Tensor | None]:
        """Feed every row its newest token.

        Returns:
            For each running text the logits of its rows [b, v] on the last stage, else None.
        """
        tokens, positions = [0] * self._num_rows, [0] * self._num_rows
        for text in self._running:
            for row, token in zip(text.rows, text.last_tokens, strict=True):
                tokens[row], positions[row] = token, text.length
            text.length += 1
        logits = self._runner.advance(tokens, positions)
        if logits is None:
            return [None] * len(self._running)
        # One row is a view, several are a copy.
        return [logits[text.rows[0]][None] if len(text.rows) == 1 else logits[text.rows] for text in self._running]

    def _choose(self, texts: Sequence[RunningText], logits: Sequence[Tensor | None]) -> list[int]:
        """Choose what follows on one rank and tell the others. Collective: all ranks that hold the model."""
        chosen = None
        if self._runner.chooses:
            of_texts = [(text, rows) for text, rows in zip(texts, logits, strict=True) if rows is not None]
            plain = [rows for text, rows in of_texts if text.takes_most_probable]
            # All at once: on a GPU, the host waits for each answer.
            tokens = iter(most_probable(torch.cat(plain)) if plain else ())
            chosen = []
            for text, rows in of_texts:
                chosen += [next(tokens)] if text.takes_most_probable else text.choose(rows)
        return self._runner.share(chosen, sum(text.num_values for text in texts))

    def _accept(self, texts: Sequence[RunningText], values: Sequence[int]) -> list[GenerationEvent]:
        """Continue every text by its part of the values."""
        events = []
        remaining = iter(values)
        for text in texts:
            event, copies = text.accept(list(itertools.islice(remaining, text.num_values)))
            if copies and text.num_shared_tokens < text.length:  # a text's rows have the same prompt
                self._runner.copy_rows(copies, slice(text.num_shared_tokens, text.length))
            if event is not None:
                events.append(event)
        return events

    def _remove(self, texts: Sequence[RunningText]) -> None:
        """End running texts; the last rows move into the places that become free."""
        if not texts:
            return
        for text in texts:
            self._keep(text)
        self._running = [text for text in self._running if text not in texts]
        num_rows = self._num_rows
        free = [row for text in texts for row in text.rows if row < num_rows]
        for text in self._running:
            moved = {row: free.pop() for row in text.rows if row >= num_rows}
            if moved:
                self._runner.copy_rows(list(moved.items()), slice(0, text.length))
                text.rows = [moved.get(row, row) for row in text.rows]

    def _keep(self, text: RunningText) -> None:
        """Keep what a running text begins with, if prefixes are kept."""
        if self._room is not None:
            self._room.keep(text.shared_ids, text.rows[0], [running.request for running in self._running])


def _build_runner(model: ModelChunk, decoder_start_id: int | None, *, cuda_graphs: bool) -> ModelRunner:
    if isinstance(model, LanguageModel):
        return DecoderRunner(model, cuda_graphs=cuda_graphs)
    if isinstance(model, EncoderDecoderModel):
        return EncoderDecoderRunner(model, decoder_start_id)
    raise ConfigError(f"text is generated by decoders and encoder-decoders; this model is a {type(model).__name__}")
