"""What has to be known of a checkpoint before it generates: everything is read and checked here, without torch."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_7b.checkpoint import Companions, tokenizer_path
from megatron_7b.config import RunConfig
from megatron_7b.errors import CheckpointError, ConfigError
from megatron_7b.generation.beams import check_vocabulary
from megatron_7b.generation.grammars import GrammarVocabulary
from megatron_7b.generation.options import BeamOptions, GenerationOptions
from megatron_7b.generation.prompts import Prompt, encode_prompt, encode_source
from megatron_7b.generation.requests import GenerationRequest
from megatron_7b.generation.settings import GenerationSettings, read_generation_settings
from megatron_7b.parallel import ParallelLayout
from megatron_7b.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from megatron_7b.tokenizer.chat_template import Conversation, Message

DEFAULT_MAX_NEW_TOKENS = 128
REQUIREMENTS: Mapping[str, object] = {"model.transformer_impl": "local", "precision.fp8": "none"}
"""The engine's cache and its positions per text need the torch-native layers, which compute in FP32 and BF16."""


@dataclass(frozen=True)
class GenerationSetup:
    """A checkpoint, and what its folder says about generation.

    Attributes:
        folder: The complete checkpoint.
        config: Its configuration for generation, made with `REQUIREMENTS`.
        tokenizer: What encodes prompts and decodes texts.
        settings: What an imported generation_config.json says.
    """

    folder: Path
    config: RunConfig
    tokenizer: Tokenizer
    settings: GenerationSettings

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether prompts are read by an encoder, and texts are no continuations of them."""
        return self.config.model.traits.kind == "encoder_decoder"

    def check_scores(self) -> None:
        """Refuse a model that cannot say how likely a given text is.

        Raises:
            ConfigError: It is an encoder-decoder.
        """
        if self.is_encoder_decoder:
            raise ConfigError(
                f"{self.folder} holds an encoder-decoder, which reads and writes apart; given texts are scored by "
                "decoders",
                hint="--data CORPUS measures its loss, --task sequence_to_sequence what it writes",
            )

    @property
    def context(self) -> int | None:
        """Tokens of the longest text, prompt included; None: there is no limit."""
        return None if self.is_encoder_decoder else self.config.model.max_position_embeddings

    @property
    def decoder_start_id(self) -> int | None:
        """Token that the decoder of an encoder-decoder begins with: as the settings say, or as in training."""
        if not self.is_encoder_decoder or self.settings.decoder_start_id is not None:
            return self.settings.decoder_start_id
        return self.tokenizer.special_id("pad")

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens of which each ends a text: what ends a document in training, and what the settings say."""
        eod = self.tokenizer.eod_id
        return self.settings.stop_ids if eod is None else self.settings.stop_ids | {eod}

    @functools.cached_property
    def grammar_vocabulary(self) -> GrammarVocabulary:
        """The model's tokens, for texts that must fit a grammar."""
        return GrammarVocabulary(self.tokenizer, self.stop_ids)

    def encode(self, text: str, *, add_bos: bool | None = None) -> Prompt:
        """Return a text as a prompt, as `encode_prompt` or, for an encoder, `encode_source` does.

        Raises:
            ConfigError: The tokenizer lacks a token that is needed.
        """
        if self.is_encoder_decoder:
            return encode_source(text, self.tokenizer, add_bos=add_bos)
        return encode_prompt(text, self.tokenizer, add_bos=add_bos)

    def encode_chat(self, conversation: "Conversation | Sequence[Message]") -> Prompt:
        """Spell a conversation out by the tokenizer's chat template, up to where the reply begins.

        Raises:
            ConfigError: The tokenizer has no template, or it refuses the conversation, or the model reads no chats.
        """
        if self.is_encoder_decoder:
            raise ConfigError(
                "an encoder-decoder reads a text, not a conversation", hint="give the whole input as one prompt"
            )
        from megatron_7b.generation.chat import encode_conversation
        from megatron_7b.tokenizer.chat_template import ChatTemplate, Conversation

        if not isinstance(conversation, Conversation):
            conversation = Conversation(conversation)
        return encode_conversation(conversation, ChatTemplate(self.tokenizer))

    def describe(self, options: GenerationOptions) -> str | None:
        """Say in one line which settings of the model's folder are applied and which are not; None: there are none.

        Raises:
            ConfigError: An option does not fit the settings.
        """
        return self.settings.describe(options.resolve(self.settings)[1])

    def requests(self, prompts: Iterable[Prompt], options: GenerationOptions) -> list[list[GenerationRequest]]:
        """Return what the engine is asked for each prompt: a request per sample, or a single one for a beam search.

        Raises:
            ConfigError: An option is out of range, or a text does not fit into the model's context.
        """
        decoding, _ = options.resolve(self.settings)
        wanted = int(self.settings.defaults.get("max_new_tokens", DEFAULT_MAX_NEW_TOKENS))
        num_requests = options.num_return_sequences
        if isinstance(decoding, BeamOptions):
            num_requests = 1
            num_stop_ids = 0 if options.ignore_eod else len(self.stop_ids)
            check_vocabulary(decoding, num_stop_ids, self.config.model.vocab_size or 0)
        grammar = None
        if options.response_format is not None:
            grammar = self.grammar_vocabulary, options.response_format
        requests = []
        for prompt in prompts:
            as_many_as_fit = wanted if self.context is None else max(1, min(wanted, self.context - len(prompt.ids)))
            requests.append(
                [
                    GenerationRequest(
                        prompt_ids=prompt.ids,
                        max_new_tokens=as_many_as_fit if options.max_new_tokens is None else options.max_new_tokens,
                        decoding=decoding,
                        sample_index=index,
                        ignore_eod=options.ignore_eod,
                        forced_last_id=self.settings.forced_last_id,
                        grammar=grammar,
                    )
                    for index in range(num_requests)
                ]
            )
            if self.context is not None:
                requests[-1][0].check_length(self.context)
        return requests


def read_setup(folder: Path, config: RunConfig, tokenizer: Path | str | None = None) -> GenerationSetup:
    """Read what a checkpoint says about generation.

    Args:
        folder: The complete checkpoint.
        config: Its configuration, made with `REQUIREMENTS`.
        tokenizer: Instead of the one that the checkpoint carries.

    Raises:
        CheckpointError: It carries no tokenizer, or a damaged one.
        ConfigError: Its model cannot generate text, or no token is known to begin with, or generation_config.json is
            damaged.
        DataFormatError: The tokenizer is damaged.
    """
    check_kind(folder, config)
    path = tokenizer or tokenizer_path(folder)
    if path is None:
        raise CheckpointError(f"{folder} carries no tokenizer", hint="name one with --tokenizer DIR")
    settings = read_generation_settings(Companions.of(folder).hugging_face)
    setup = GenerationSetup(folder, config, load_tokenizer(path), settings)
    if setup.is_encoder_decoder and setup.decoder_start_id is None:
        raise ConfigError(
            f"{folder} does not say which token the decoder begins with, and the tokenizer has no <pad>",
            hint="an imported folder says it in generation_config.json, as decoder_start_token_id",
        )
    return setup


def check_kind(folder: Path, config: RunConfig) -> None:
    """Refuse a model that writes no text.

    Raises:
        ConfigError: It is one.
    """
    model = config.model
    if model.has_head:
        raise ConfigError(
            f"{folder} holds a model with a head for {model.head}, which writes no text",
            hint="`megatron-7b predict` labels new data with it",
        )
    if model.traits.kind not in ("decoder", "encoder_decoder"):
        raise ConfigError(
            f"{folder} holds a model of kind {model.traits.kind} ({model.architecture}), which cannot continue a text",
            hint="`megatron-7b evaluate` measures it; after `megatron-7b convert to-hf`, transformers' fill-mask fills "
            "gaps with it; generation takes a decoder such as gpt2 or llama, or an encoder-decoder such as t5",
        )


def check_one_copy(layout: ParallelLayout, world_size: int) -> None:
    """Refuse more ranks than one copy of the model has.

    Raises:
        ConfigError: There are.
    """
    if layout.dp_size > 1:
        raise ConfigError(
            f"{world_size} ranks hold more than one copy of the model",
            hint=f"generation takes --nproc {world_size // layout.dp_size}",
        )
