"""The corpora of classic tasks, made from files of labelled records; and the head that their labels ask for."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_7b.data.labelled import questions, tags, texts
from megatron_7b.data.labelled.frames import Frame, find_frame
from megatron_7b.data.records.corpus import EncodedRecord
from megatron_7b.data.records.reading import read_records
from megatron_7b.errors import ConfigError, DataFormatError
from megatron_7b.finetune.corpora import encoded_corpora, files_of
from megatron_7b.finetune.preparation import Preparation, PreparedData

_VERSION = "1"
"""Of how records are encoded; part of the name of what is made from them."""


def prepare_text_classification(wanted: Preparation) -> PreparedData:
    """Encode files of labelled texts; their labels become the classes of the model.

    Raises:
        ConfigError: The head of the weights does not have some of the labels.
        DataFormatError: Records cannot be used; all mistakes of a file are named.
        FileNotFoundError: Something is missing, and not to be made.
    """
    options, model = wanted.config.finetune, wanted.config.model
    known = model.labels if model.head == "sequence_classification" else ()
    problem = options.problem_type or (model.problem_type if model.head == "sequence_classification" else None)
    classes = texts.find_classes(_training_files(wanted), problem, options.labels)
    if classes.problem_type != "regression":
        classes = dataclasses.replace(classes, names=_with_known(classes.names, known, wanted))
    encoder = texts.TextEncoder(wanted.tokenizer, _frame(wanted), wanted.config.data.seq_length)

    def encode(file: Path) -> Iterable[EncodedRecord]:
        encoder.num_cut = 0
        yield from texts.read_texts(file, encoder, classes)
        _say(wanted, encoder.num_cut, f"texts of {file} are longer than data.seq_length, and cut at their end")

    num_labels = len(classes.names) or _numbers_of(wanted)
    head = {"num_labels": num_labels, "labels": list(classes.names), "problem_type": classes.problem_type}
    return _prepared(wanted, encode, texts.NAME, {"head": "sequence_classification", **head})


def prepare_token_classification(wanted: Preparation) -> PreparedData:
    """Encode files of tagged texts; their tags become the classes of the model.

    Raises:
        ConfigError: The head of the weights does not have some of the tags.
        DataFormatError: Records cannot be used; all mistakes of a file are named.
        FileNotFoundError: Something is missing, and not to be made.
    """
    options, model = wanted.config.finetune, wanted.config.model
    scheme, known = options.tag_scheme, model.labels if model.head == "token_classification" else ()
    names = options.labels or tags.find_tags(_training_files(wanted), scheme)
    names = _with_known(names, known, wanted)
    if len(names) > tags.MOST_TAGS:
        raise ConfigError(f"data.train has {len(names)} tags, expected at most {tags.MOST_TAGS}")
    encoder = tags.TagEncoder(wanted.tokenizer, _frame(wanted), wanted.config.data.seq_length)

    def encode(file: Path) -> Iterable[EncodedRecord]:
        encoder.num_divided = 0
        yield from tags.read_tagged(file, encoder, names, scheme)
        _say(wanted, encoder.num_divided, f"texts of {file} are longer than data.seq_length, and divided between words")

    head = {"head": "token_classification", "num_labels": len(names), "labels": list(names)}
    return _prepared(wanted, encode, tags.NAME, {**head, "problem_type": "single_label_classification"})


def prepare_question_answering(wanted: Preparation) -> PreparedData:
    """Encode files of questions, each text in windows that overlap.

    Raises:
        DataFormatError: Records cannot be used; all mistakes of a file are named.
        FileNotFoundError: Something is missing, and not to be made.
    """
    config = wanted.config
    may_lack = config.finetune.may_lack_answer or questions.has_unanswered(files_of(config.data.train, "data.train"))
    encoder = questions.QuestionEncoder(
        wanted.tokenizer, _frame(wanted), config.data.seq_length, config.finetune.doc_stride
    )

    def encode(file: Path) -> Iterable[EncodedRecord]:
        encoder.num_divided = 0
        yield from questions.read_windows(file, encoder)
        _say(wanted, encoder.num_divided, f"questions of {file} have texts that take several windows")

    head = {"head": "question_answering", "num_labels": 2, "labels": [], "problem_type": "single_label_classification"}
    prepared = _prepared(wanted, encode, questions.WINDOWS, head)
    settings = {**prepared.settings, "finetune.may_lack_answer": may_lack}
    return dataclasses.replace(prepared, settings=settings)


def _prepared(wanted: Preparation, encode: Any, kind: str, head: dict[str, object]) -> PreparedData:
    config = wanted.config
    frame, length, stride = _frame(wanted), config.data.seq_length, config.finetune.doc_stride
    decided = [_VERSION, wanted.tokenizer.identity, frame.before, frame.between, frame.after, length, stride]
    made_with = json.dumps([*decided, head])
    prepared = encoded_corpora(wanted, encode, kind=kind, made_with=made_with, options={"seq_length": length, **head})
    settings = {"model.add_binary_head": False, **{f"model.{name}": value for name, value in head.items()}}
    return dataclasses.replace(prepared, settings=settings)


def _frame(wanted: Preparation) -> Frame:
    return find_frame(wanted.tokenizer, is_encoder=wanted.config.model.traits.kind == "encoder")


def _training_files(wanted: Preparation) -> list[Path]:
    """Return the files that labels are found in.

    Raises:
        DataFormatError: There are none.
    """
    files = files_of(wanted.config.data.train, "data.train")
    if not files and not wanted.config.finetune.labels:
        named = " ".join(wanted.config.data.train)
        raise DataFormatError(
            f"data.train is {named}, which names no JSONL file, so its labels are not known",
            hint="name a file that exists, or the labels as finetune.labels",
        )
    return files


def _with_known(found: Sequence[str], known: Sequence[str], wanted: Preparation) -> tuple[str, ...]:
    """Return the labels of a model: those that its weights have a head for, if that has all that were found.

    Raises:
        ConfigError: It lacks some, and the user names none.
    """
    if wanted.config.finetune.labels or not known:
        return tuple(found)
    lacking = [name for name in found if name not in known]
    if lacking:
        raise ConfigError(
            f"the weights of {wanted.start} classify into {', '.join(known)}; data.train has also "
            f"{', '.join(lacking[:12])}",
            hint=f"--finetune.labels {' '.join(found)} starts with a fresh head for these",
        )
    return tuple(known)


def _numbers_of(wanted: Preparation) -> int:
    """Return how many numbers are predicted of each text."""
    for file in _training_files(wanted):
        for _, label in read_records(file, texts.label_of, name=texts.NAME, example=texts.EXAMPLE):
            return len(label) if isinstance(label, list) else 1
    return wanted.config.model.num_labels


def _say(wanted: Preparation, count: int, what: str) -> None:
    if count:
        wanted.report("note", f"{count:,} {what}")
