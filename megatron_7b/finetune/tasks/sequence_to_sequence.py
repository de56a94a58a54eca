"""The corpora of a run that learns targets from sources, made from files of such pairs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_7b.checkpoint import Companions
from megatron_7b.data.records.corpus import EncodedRecord
from megatron_7b.data.records.reading import read_records
from megatron_7b.data.records.source_target import EXAMPLE, NAME, PromptTemplate, SourceTarget, read_template
from megatron_7b.errors import ConfigError, DataFormatError
from megatron_7b.finetune.base import is_hugging_face_folder
from megatron_7b.finetune.corpora import encoded_corpora
from megatron_7b.finetune.preparation import Preparation, PreparedData
from megatron_7b.generation.prompts import encode_prompt, encode_source
from megatron_7b.generation.settings import read_generation_settings
from megatron_7b.objective.sequence_to_sequence import SourceContinuation, SourceToTarget, longest_target
from megatron_7b.tokenizer import Tokenizer

_VERSION = "1"
"""Of how records are encoded; part of the name of what is made from them."""


def prepare_sequence_to_sequence(wanted: Preparation) -> PreparedData:
    """Encode the files of sources and targets that a configuration names, or find what they were encoded into.

    Raises:
        ConfigError: The template is impossible, or the tokenizer lacks a token.
        DataFormatError: Records cannot be used; all mistakes of a file are named.
        FileNotFoundError: Something is missing, and not to be made.
    """
    config = wanted.config
    kind, options = config.model.traits.kind, config.finetune
    if kind not in ("decoder", "encoder_decoder"):
        raise ConfigError(
            f"finetune.task sequence_to_sequence needs a model that writes text, but {wanted.start} holds one of kind "
            f"{kind}",
            hint="start from a decoder such as llama, or an encoder-decoder such as t5",
        )
    template = read_template(options.prompt_template, options.target_key, kind)
    start_id, end_id = _special_ids(wanted)
    encoder = _Encoder(
        tokenizer=wanted.tokenizer,
        template=template,
        start_id=start_id,
        end_id=end_id,
        seq_length=config.data.seq_length,
        longest_target=longest_target(config),
    )

    def encode(file: Path) -> Iterator[EncodedRecord]:
        return _records_of(file, encoder, wanted)

    shown = {
        "prompt_template": template.text, "target_key": template.target_key, "seq_length": encoder.seq_length,
        "max_target_length": encoder.longest_target,
    }  # fmt: skip
    made_with = "\n".join(map(str, (_VERSION, wanted.tokenizer.identity, start_id, end_id, *shown.values())))
    name = (SourceContinuation if start_id is None else SourceToTarget).kind
    return encoded_corpora(wanted, encode, kind=name, made_with=made_with, options=shown)


@dataclass(frozen=True, kw_only=True)
class _Encoder:
    """Makes tokens of records.

    Attributes:
        tokenizer: Of the weights.
        template: What prompts are made by.
        start_id: What the decoder of an encoder-decoder begins with; None: the model is a decoder.
        end_id: What ends a target.
        seq_length: Most tokens of a prompt, or for a decoder of prompt and target together.
        longest_target: Most tokens of a target, its end included.
    """

    tokenizer: Tokenizer
    template: PromptTemplate
    start_id: int | None
    end_id: int
    seq_length: int
    longest_target: int

    def encode(self, record: SourceTarget) -> tuple[EncodedRecord | None, bool]:
        """Return a record as a model learns it, None if its target is too long; and whether its source was cut."""
        assert record.target is not None
        target = (*self.tokenizer.encode(record.target), self.end_id)
        room = self.seq_length if self.start_id is not None else self.seq_length - len(target)
        text = self.template.fitted(record.fields, self._prompt, room)
        if text is None or len(target) > self.longest_target:
            return None, False
        prompt = self._prompt(text)
        is_cut = text != self.template.fill(record.fields)
        if self.start_id is not None:
            return _encoded([prompt, (self.start_id, *target)], len(target)), is_cut
        whole = (*self._prompt(text + record.target), self.end_id)
        if whole[: len(prompt)] != prompt or len(whole) > self.seq_length:
            whole = (*prompt, *target)  # the target would not begin with a token of its own
        return _encoded([whole], len(whole) - len(prompt)), is_cut

    def _prompt(self, text: str) -> tuple[int, ...]:
        """Return the tokens that generation makes of a prompt."""
        make = encode_prompt if self.start_id is None else encode_source
        return make(text, self.tokenizer).ids


def _encoded(parts: Sequence[Sequence[int]], num_trained: int) -> EncodedRecord:
    """Return parts of which the last tokens are trained."""
    weights = np.zeros(sum(map(len, parts)), np.float32)
    weights[-num_trained:] = 1
    return EncodedRecord([np.asarray(part, np.int32) for part in parts], weights)


def _records_of(file: Path, encoder: _Encoder, wanted: Preparation) -> Iterator[EncodedRecord]:
    """Yield the records of a file; say how many were cut or left out.

    Raises:
        DataFormatError: Records cannot be used, or all are left out.
    """
    num_cut = num_left_out = num_kept = 0
    read = read_records(file, lambda record: encoder.encode(encoder.template.read(record)), name=NAME, example=EXAMPLE)
    for _, (record, is_cut) in read:
        num_cut += is_cut
        if record is None:
            num_left_out += 1
            continue
        num_kept += 1
        yield record
    longest, room = f"finetune.max_target_length = {encoder.longest_target}", f"data.seq_length = {encoder.seq_length}"
    if not num_kept:
        raise DataFormatError(
            f"none of the {num_left_out:,} {NAME} of {file} fits into {room} and {longest}",
            hint="raise them, as far as memory allows",
        )
    if num_cut:
        wanted.report("cut", f"{file}: {num_cut:,} sources, to fit into {room}")
    if num_left_out:
        wanted.report("left out", f"{file}: {num_left_out:,} {NAME}, whose targets exceed {longest} or {room}")


def _special_ids(wanted: Preparation) -> tuple[int | None, int]:
    """Return what the decoder of an encoder-decoder begins with, and what ends a target.

    Raises:
        ConfigError: There is none.
    """
    start, tokenizer = wanted.start, wanted.tokenizer
    folder = start if is_hugging_face_folder(start) else Companions.of(start).hugging_face
    settings = read_generation_settings(folder)
    end_id = min(settings.stop_ids, default=None) if tokenizer.eod_id is None else tokenizer.eod_id
    if end_id is None:
        raise ConfigError(
            f"no token is known that ends a text: the tokenizer {tokenizer.path or tokenizer.kind} has none",
            hint="the folder of the weights may name it as eos_token_id in generation_config.json",
        )
    if wanted.config.model.traits.kind != "encoder_decoder":
        return None, end_id
    start_id = tokenizer.special_id("pad") if settings.decoder_start_id is None else settings.decoder_start_id
    if start_id is None:
        raise ConfigError(
            f"{start} does not say which token the decoder begins with, and the tokenizer has no <pad>",
            hint="an imported folder says it in generation_config.json, as decoder_start_token_id",
        )
    return start_id, end_id
