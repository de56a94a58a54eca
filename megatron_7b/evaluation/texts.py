"""How well a model predicts texts, each by itself, in figures that compare models with different tokenizers.

Every token of a text is predicted once: the first after the token that begins texts, the others after all before them
that fit into a window. The first window of a long text predicts all its tokens; each one after it moves on by `stride`
tokens, predicts these, and keeps as many before them as there is room for. A small stride gives long contexts, and
takes longer.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_7b.data.reading.progress import OpenProgress, tell_nobody
from megatron_7b.data.reading.records import BadRecord
from megatron_7b.data.reading.sources import find_sources
from megatron_7b.data.reading.spread import SpreadReader
from megatron_7b.errors import ConfigError, DataFormatError
from megatron_7b.generation.score import ScoreRequest
from megatron_7b.generation.session import Session
from megatron_7b.generation.setup import GenerationSetup
from megatron_7b.prepare.rules.words import split_words
from megatron_7b.runtime.rescue import write_or_rescue

if TYPE_CHECKING:
    from megatron_7b.generation.copies import Copies

_TOKENS_AT_ONCE = 1 << 16
"""Tokens of the texts that are scored together."""


@dataclass(slots=True)
class TextLoss:
    """What predicting texts costs a model.

    Attributes:
        nats: Sum of -ln p over all tokens.
        documents: Texts.
        tokens: Of the model's tokenizer.
        words: Separated by whitespace; in scripts without spaces each character is one.
        bytes: As UTF-8.
    """

    nats: float = 0.0
    documents: int = 0
    tokens: int = 0
    words: int = 0
    bytes: int = 0

    def add(self, other: "TextLoss") -> None:
        """Count other texts in."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """Per token."""
        return _exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Independent of the tokenizer."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def word_perplexity(self) -> float:
        """Independent of the tokenizer too; as lm-evaluation-harness has it where words are separated by spaces."""
        return _exp(self.nats / self.words) if self.words else math.nan

    def to_dict(self) -> dict[str, float | int | None]:
        """Return all figures as JSON has them; None where there is none."""
        figures = {name: getattr(self, name) for name in (*self.__slots__, *_FIGURES)}
        return {name: value if math.isfinite(value) else None for name, value in figures.items()}


_FIGURES = ("loss", "perplexity", "bits_per_byte", "word_perplexity")


@dataclass(frozen=True, slots=True)
class DocumentLoss:
    """What predicting one text costs a model.

    Attributes:
        file: Its file.
        record: Line or row of the file, from 1.
        loss: Its figures.
    """

    file: str
    record: int
    loss: TextLoss


@dataclass
class TextLosses:
    """What predicting the texts of some files costs a model.

    Attributes:
        by_file: Of each file, by its path.
        by_document: Of each text, in their order, if that was asked for.
        bad: Records that were left out.
    """

    by_file: dict[str, TextLoss] = field(default_factory=dict)
    by_document: list[DocumentLoss] = field(default_factory=list)
    bad: list[BadRecord] = field(default_factory=list)

    @property
    def total(self) -> TextLoss:
        """Of all files together."""
        whole = TextLoss()
        for one in self.by_file.values():
            whole.add(one)
        return whole

    def rows(self) -> dict[str, TextLoss]:
        """Return what a table has: each file by its path, and "all" where there is not one alone."""
        return dict(self.by_file) if len(self.by_file) == 1 else {**self.by_file, "all": self.total}

    def write_documents(self, file: Path) -> None:
        """Write a JSON line for each text; raises as `write_or_rescue`."""

        def lines() -> Iterator[str]:
            for one in self.by_document:
                where = {"file": one.file, "record": one.record}
                yield json.dumps({**where, **one.loss.to_dict()}, ensure_ascii=False) + "\n"

        write_or_rescue(file, lambda stream: stream.writelines(lines()))


@dataclass(frozen=True)
class _Document:
    file: str
    record: int
    text: str
    ids: tuple[int, ...]


def measure_texts(
    setup: GenerationSetup,
    inputs: Sequence[str | Path],
    *,
    key: str = "text",
    stride: int | None = None,
    per_document: bool = False,
    batch_size: int = 16,
    fp32_on_cpu: bool = True,
    open_progress: OpenProgress = tell_nobody,
) -> TextLosses | None:
    """Measure a checkpoint on the texts of files.

    Args:
        setup: The checkpoint, from `generation.setup.read_setup`.
        inputs: Files, globs or folders of text, as `preprocess` reads them.
        key: Key of a record that holds the text.
        stride: Tokens that a window of a long text moves on by; None: all that fit.
        per_document: Keep the figures of each text, about 300 bytes.
        batch_size: Texts that share a forward pass.
        fp32_on_cpu: Compute in FP32 on a CPU, whatever the configuration says.
        open_progress: Shows how far it is, on the main rank.

    Returns:
        The figures on the main rank, None on the others.

    Collective: all ranks.

    Raises:
        ConfigError: There is no such input, the stride is out of range, or the model is no decoder.
        DataFormatError: A file is damaged as a whole, or none of them holds a text.
    """
    reader = SpreadReader(find_sources([str(one) for one in inputs]))
    longest = setup.config.model.max_position_embeddings
    if stride is not None and not 1 <= stride <= longest:
        raise ConfigError(f"stride is {stride}, expected 1 to {longest}, the model's context")
    from megatron_7b.generation.copies import Copies

    with Session(setup, fp32_on_cpu=fp32_on_cpu, max_batch_size=batch_size, several_copies=True) as session:
        copies = Copies(session)
        if not session.is_main:
            copies.follow()
            return None
        with copies.led(), open_progress(max(1, reader.total_bytes)) as progress:
            found = TextLosses()
            for documents in _portions(reader, key, setup, found.bad):
                for document, one in zip(documents, _measure(copies, documents, stride or longest), strict=True):
                    found.by_file.setdefault(document.file, TextLoss()).add(one)
                    if per_document:
                        found.by_document.append(DocumentLoss(document.file, document.record, one))
                if progress is not None:
                    so_far = found.total
                    progress.update(reader.bytes_read, so_far.documents, so_far.tokens)
            if not found.by_file:
                raise _no_text(found.bad)
            return found


def _no_text(bad: Sequence[BadRecord]) -> DataFormatError:
    if not bad:
        return DataFormatError("there is no text to measure: the files are empty, or all their texts are")
    return DataFormatError(
        f"there is no text to measure, but {len(bad):,} bad records, the first: {bad[0]}",
        hint="--json-key names the key of a record that holds the text",
    )


def _portions(
    reader: SpreadReader, key: str, setup: GenerationSetup, bad: list[BadRecord]
) -> Iterator[list[_Document]]:
    """Yield texts in their order, some at a time; those without a token have nothing to predict."""
    waiting: list[_Document] = []
    for source, block in reader.read_blocks([key]):
        bad += block.bad
        for record, text in zip(block.numbers, block.texts[0], strict=True):
            ids = tuple(setup.tokenizer.encode(text))
            if ids:
                waiting.append(_Document(str(source.path), record, text, ids))
            if sum(len(one.ids) for one in waiting) >= _TOKENS_AT_ONCE:
                yield waiting
                waiting = []
    if waiting:
        yield waiting


def _measure(copies: "Copies", documents: Sequence[_Document], stride: int) -> list[TextLoss]:
    setup = copies.session.setup
    begin = setup.tokenizer.bos_id if setup.tokenizer.bos_id is not None else setup.tokenizer.eod_id
    if begin is None:
        raise ConfigError("the tokenizer has neither a bos nor an end-of-document token, after which a text begins")
    longest = setup.config.model.max_position_embeddings
    windows = [
        (number, window)
        for number, document in enumerate(documents)
        for window in windows_of(document.ids, begin, longest=longest, stride=stride)
    ]
    losses = [TextLoss(0.0, 1, len(one.ids), len(split_words(one.text)), len(one.text.encode())) for one in documents]
    for (number, _), score in zip(windows, copies.score([window for _, window in windows]), strict=True):
        losses[number].nats -= score.log_likelihood
    return losses


def windows_of(ids: Sequence[int], begin: int, *, longest: int, stride: int) -> Iterator[ScoreRequest]:
    """Cut a text into windows that predict each of its tokens once.

    Args:
        ids: The text, [n].
        begin: Token that it begins after.
        longest: Tokens that a window may read.
        stride: Tokens that windows after the first predict.
    """
    yield ScoreRequest((begin,), tuple(ids[:longest]))
    for first in range(longest, len(ids), stride):
        end = min(first + stride, len(ids))
        yield ScoreRequest(tuple(ids[max(0, end - longest - 1) : first]), tuple(ids[first:end]))


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
