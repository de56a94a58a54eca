"""Generation from Python: a checkpoint that is open, and texts that it writes.

    from megatron_7b.generation import GenerationOptions, open_session

    with open_session("runs/a") as session:
        for sample in session.generate(["Once upon a time"], GenerationOptions(max_new_tokens=40, temperature=0.8)):
            print(sample.text, sample.token_ids, sample.finish_reason)
        for piece in session.stream("Once upon a time"):
            print(piece.text, end="")
        best, second = session.generate("Once upon a time", GenerationOptions(num_beams=4, num_return_sequences=2))

`submit`, `step` and `cancel` are what a server needs: texts come and go while others are being written.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from megatron_7b.checkpoint import resolve_checkpoint
from megatron_7b.checkpoint.inference_config import inference_config
from megatron_7b.errors import ConfigError
from megatron_7b.generation.options import BeamOptions, GenerationOptions
from megatron_7b.generation.prompts import Prompt
from megatron_7b.generation.requests import FinishedSearch
from megatron_7b.generation.samples import Piece, Sample
from megatron_7b.generation.score import Score, ScoreRequest
from megatron_7b.generation.setup import REQUIREMENTS, GenerationSetup, check_one_copy, read_setup

if TYPE_CHECKING:
    from megatron_7b.model.on_ranks import ModelOnRanks
    from megatron_7b.tokenizer.chat_template import Conversation, Message

DEFAULT_MAX_BATCH_SIZE = 32


def open_session(
    checkpoint: Path | str,
    *,
    tokenizer: Path | str | None = None,
    overrides: Mapping[str, object] | None = None,
    max_batch_size: int = DEFAULT_MAX_BATCH_SIZE,
    max_cache_bytes: int | None = None,
    prefix_cache: bool = False,
    several_copies: bool = False,
) -> "Session":
    """Load a checkpoint of any layout to generate with it.

    In a process of its own (a script, a notebook) the model is loaded here. Under a launcher such as torchrun every
    rank calls this, and then all methods of the session in the same order; all get the same texts.

    Args:
        checkpoint: Step folder, `RUN/checkpoints/latest`, or a run folder.
        tokenizer: Instead of the one that the checkpoint carries.
        overrides: Options of the configuration by dotted path, such as `{"parallel.tensor_model_parallel_size": 2}`.
        max_batch_size: Texts (beams, in a search) that share a forward pass.
        max_cache_bytes: Memory that the keys and values of texts may take on each rank, resizing included; texts wait
            until there is room, and one that never fits is refused. None: as much as is asked.
        prefix_cache: Keep what texts began with in memory that others leave free: a prompt that begins alike is read
            from there on. Of decoders, and within `max_cache_bytes`.
        several_copies: Ranks may hold more than one copy of the model, each of which is told what to do apart; see
            `copies.Copies`.

    Returns:
        An open session: use it in a with statement, or close it.

    Raises:
        CheckpointError: There is no complete checkpoint, or it is damaged.
        ConfigError: An option is impossible, the model cannot generate text, or the cache has no room for a token.
        DataFormatError: The tokenizer is damaged.

    Collective: all ranks.
    """
    folder = resolve_checkpoint(Path(checkpoint))
    config = inference_config(folder, overrides, requirements=REQUIREMENTS)
    setup = read_setup(folder, config, tokenizer)
    fp32_on_cpu = "precision.params_dtype" not in (overrides or {})
    return Session(
        setup,
        fp32_on_cpu=fp32_on_cpu,
        max_batch_size=max_batch_size,
        max_cache_bytes=max_cache_bytes,
        prefix_cache=prefix_cache,
        several_copies=several_copies,
    )


class Session:
    """A checkpoint that is open for generation; made by `open_session`.

    Collective: making it, and all methods but `encode`, `encode_chat` and `cancel`: all ranks.

    Args:
        setup: Of the checkpoint.
        fp32_on_cpu: Compute in FP32 on a CPU, whatever the configuration says.
        max_batch_size: Rows that share a forward pass.
        max_cache_bytes: As for `open_session`.
        prefix_cache: As for `open_session`.
        several_copies: As for `open_session`.
        beside: A session of the same layout, which stays open for longer: parameters that both have are held once.
        model: The model, if it is there already and stays with whoever made it.

    Attributes:
        setup: What is known of the checkpoint: configuration, tokenizer, settings.
        model: This rank's part of the model.
        layout: Position of this rank.
    """

    def __init__(
        self,
        setup: GenerationSetup,
        *,
        fp32_on_cpu: bool = True,
        max_batch_size: int = DEFAULT_MAX_BATCH_SIZE,
        max_cache_bytes: int | None = None,
        prefix_cache: bool = False,
        several_copies: bool = False,
        beside: "Session | None" = None,
        model: "ModelOnRanks | None" = None,
    ) -> None:
        from megatron_7b.checkpoint.open_model import open_beside, opened_model
        from megatron_7b.generation.engine import GenerationEngine

        if max_batch_size < 1:
            raise ConfigError(f"max_batch_size is {max_batch_size}, expected at least 1")
        self.setup = setup
        self._samples: dict[int, list[Sample]] = {}  # of a number of the engine
        with contextlib.ExitStack() as stack:
            if beside is not None:
                model = open_beside(beside.model, setup.folder, setup.config, fp32_on_cpu=fp32_on_cpu)
            elif model is None:
                model = stack.enter_context(opened_model(setup.folder, setup.config, fp32_on_cpu=fp32_on_cpu))
            if not several_copies:
                check_one_copy(model.layout, model.layout.world_size)
            self._engine = stack.enter_context(
                GenerationEngine(
                    model.only_chunk,
                    stop_ids=setup.stop_ids,
                    max_batch_size=max_batch_size,
                    max_length=setup.context,
                    max_cache_bytes=max_cache_bytes,
                    prefix_cache=prefix_cache,
                    decoder_start_id=setup.decoder_start_id,
                )
            )
            self.model: ModelOnRanks = model
            self.layout = model.layout
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        """Use the session for the duration of a with block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints."""
        return self.layout.is_main

    def limit_cache(self, max_bytes: int, *, prefix_cache: bool = False) -> None:
        """Bound the memory of keys and values, as `open_session` does, once the model is loaded; before the first text.

        Raises:
            ConfigError: There would be no room for a token, or prefixes are to be kept of an encoder-decoder.
        """
        self._engine.limit_cache(max_bytes, prefix_cache=prefix_cache)

    @property
    def max_cache_tokens(self) -> int | None:
        """Tokens, all texts together, that the cache has room for on every rank; None: as many as are asked."""
        return self._engine.max_cache_tokens

    def close(self) -> None:
        """Leave the process groups. Collective: all ranks."""
        self._open.close()

    def encode(self, text: str, *, add_bos: bool | None = None) -> Prompt:
        """Return a text as a prompt: None adds the tokens that transformers adds with this tokenizer."""
        return self.setup.encode(text, add_bos=add_bos)

    def encode_chat(self, conversation: "Conversation | Sequence[Message]") -> Prompt:
        """Return messages (`{"role": "user", "content": "…"}`) as a prompt, by the tokenizer's chat template."""
        return self.setup.encode_chat(conversation)

    def generate(
        self, prompts: str | Prompt | Sequence[str | Prompt], options: GenerationOptions | None = None
    ) -> list[Sample]:
        """Write texts and wait for them.

        Args:
            prompts: One or several.
            options: How; None: as the model's folder says.

        Returns:
            `num_return_sequences` samples of the first prompt, then those of the second, and so on.

        Raises:
            ConfigError: An option is impossible, or a text does not fit into the model's context or into the cache.
        """
        samples = self._submit_all(prompts, options or GenerationOptions())
        for _ in self._pieces(samples):
            pass
        return samples

    def stream(
        self, prompts: str | Prompt | Sequence[str | Prompt], options: GenerationOptions | None = None
    ) -> Iterator[Piece]:
        """Write texts and give each token's text as it comes; a text of which no more is wanted is dropped.

        Raises:
            ConfigError: As for `generate`, and if the options ask for a beam search.
        """
        options = options or GenerationOptions()
        if isinstance(options.resolve(self.setup.settings)[0], BeamOptions):
            raise ConfigError(
                "a beam search knows its texts only when it ends, so they cannot be streamed",
                hint="use generate, or num_beams 1",
            )
        return self._pieces(self._submit_all(prompts, options))

    def submit(self, prompt: str | Prompt, options: GenerationOptions | None = None) -> list[Sample]:
        """Let the texts of a prompt take part from the next step on.

        Returns:
            The samples, which grow with each `step` until they have a `finish_reason`.

        Raises:
            ConfigError: As for `generate`.
        """
        options = options or GenerationOptions()
        prompt = self.encode(prompt) if isinstance(prompt, str) else prompt
        samples: list[Sample] = []
        (requests,) = self.setup.requests([prompt], options)
        for request in requests:
            num_own = options.num_return_sequences // len(requests)
            own = [Sample(prompt, self.setup.tokenizer, options.stop) for _ in range(num_own)]
            self._samples[self._engine.submit(request)] = own
            samples += own
        return samples

    def step(self) -> list[Piece]:
        """Continue all texts by a token.

        Returns:
            What came; nothing from a beam search until it ends, and nothing at all if nothing is left to do.
        """
        pieces = []
        for event in self._engine.step():
            samples = self._samples[event.request]
            if isinstance(event, FinishedSearch):
                found = zip(samples, event.hypotheses, strict=True)
                pieces += [Piece(sample, sample.take(text), len(text.token_ids)) for sample, text in found]
            else:
                samples[0].num_reused = event.num_reused
                pieces.append(Piece(samples[0], samples[0].add(event.token_id, event.finish_reason, event.logprobs)))
            if event.is_last:
                del self._samples[event.request]
            elif samples[0].finish_reason == "stop":
                self.cancel(samples[0])
        return pieces

    def run(self) -> Iterator[Piece]:
        """Take steps until nothing is left to do, and give what comes."""
        while self._engine.num_unfinished:
            yield from self.step()

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """Return how likely the model finds given continuations; nothing may be being written meanwhile.

        Raises:
            ConfigError: A continuation does not fit into the context, or the model is no decoder.
        """
        found = dict(self._engine.score(requests))
        return [found[number] for number in range(len(requests))]

    def cancel(self, sample: Sample) -> None:
        """Drop a text, with those of the same beam search; nothing happens if it has ended. Collective: none."""
        for number in [number for number, samples in self._samples.items() if sample in samples]:
            self._engine.cancel(number)
            del self._samples[number]

    def _submit_all(self, prompts: str | Prompt | Sequence[str | Prompt], options: GenerationOptions) -> list[Sample]:
        """Submit all prompts, or none of them."""
        given = [prompts] if isinstance(prompts, str | Prompt) else prompts
        encoded = [self.encode(prompt) if isinstance(prompt, str) else prompt for prompt in given]
        samples: list[Sample] = []
        try:
            for prompt in encoded:
                samples += self.submit(prompt, options)
        except ConfigError:
            self._cancel_all(samples)
            raise
        return samples

    def _pieces(self, samples: Sequence[Sample]) -> Iterator[Piece]:
        """Take steps until these samples have ended; whoever takes no more of the pieces drops them."""
        try:
            while any(sample.finish_reason is None for sample in samples):
                yield from (piece for piece in self.step() if piece.sample in samples)
        finally:
            self._cancel_all(samples)

    def _cancel_all(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            self.cancel(sample)
