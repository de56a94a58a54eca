"""Texts with a class, several classes or a number: `{"text": …[, "text_pair": …], "label": …}` a line."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_7b.data.labelled.frames import Frame, Framed, shortened
from megatron_7b.data.labelled.labels import SameKind, sorted_labels
from megatron_7b.data.records.corpus import EncodedRecord
from megatron_7b.data.records.reading import RecordError, read_records, text_of
from megatron_7b.tokenizer import Tokenizer

NAME = "labelled texts"
EXAMPLE = '{"text": "How lovely!", "label": "positive"}'

type ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
type Label = str | int | float | list[Any]


@dataclass(frozen=True)
class Classes:
    """What labels mean to a model.

    Attributes:
        problem_type: Whether a text has one of them, any of them, or a number.
        names: In the order of the model's outputs; empty for a number.
    """

    problem_type: ProblemType
    names: tuple[str, ...]

    def values(self, label: Label) -> np.ndarray:
        """Return the numbers of a record, float32 [k].

        Raises:
            RecordError: It is of another type than those learned, or is none of them.
        """
        if self.problem_type == "regression":
            numbers = label if isinstance(label, list) else [label]
            for one in numbers:
                if isinstance(one, bool) or not isinstance(one, int | float) or not math.isfinite(one):
                    raise RecordError(f"'label' is {label!r}, expected a finite number")
            return np.array(numbers, np.float32)
        if self.problem_type == "single_label_classification":
            return np.array([self._number(label)], np.float32)
        if not isinstance(label, list):
            raise RecordError(f"'label' is {label!r}, expected a list of labels, as others have")
        values = np.zeros(len(self.names), np.float32)
        values[[self._number(one) for one in label]] = 1.0
        return values

    def _number(self, label: Label) -> int:
        if isinstance(label, list):
            raise RecordError(f"'label' is {label!r}, expected a single label, as others have")
        if str(label) not in self.names:
            shown = ", ".join(self.names[:12]) + (", …" if len(self.names) > 12 else "")
            raise RecordError(f"'label' is {label!r}, which is none of those learned: {shown}")
        return self.names.index(str(label))


def find_classes(files: Sequence[Path], problem_type: ProblemType | None, names: Sequence[str]) -> Classes:
    """Return the classes of the training files.

    Args:
        files: Of training.
        problem_type: As the user says it; None: lists are several labels, numbers with decimals are to be predicted as
            such, and everything else is a class.
        names: Of the classes, as the user gives them; empty: those of the files, sorted.

    Raises:
        DataFormatError: Records cannot be used, or have labels of several types; all are named.
    """
    if problem_type == "regression":
        return Classes(problem_type, ())
    found: set[Any] = set()
    kinds = SameKind()
    for file in files:

        def note(record: dict[str, Any]) -> None:
            texts_of(record)  # with the labels, so that all mistakes are told together
            label = label_of(record)
            kinds(label)
            found.update(label if isinstance(label, list) else [label])

        for _ in read_records(file, note, name=NAME, example=EXAMPLE):
            pass
    guessed: ProblemType = "single_label_classification"
    if kinds.kind == "list":
        guessed = "multi_label_classification"
    elif kinds.kind == "float":
        guessed = "regression"
    decided = problem_type or guessed
    if decided == "regression":
        return Classes(decided, ())
    return Classes(decided, tuple(names) or sorted_labels(found))


def texts_of(record: dict[str, Any]) -> tuple[str, str | None]:
    """Return the text of a record and the other one of its pair.

    Raises:
        RecordError: A text is missing, empty or no text.
    """
    return text_of(record, "text"), None if record.get("text_pair") is None else text_of(record, "text_pair")


def label_of(record: dict[str, Any]) -> Label:
    """Return the label of a record.

    Raises:
        RecordError: There is none, or it is of a type that no label has.
    """
    label = record.get("label")
    if label is None:
        raise RecordError(f"it has no 'label'; its keys are {sorted(record)}")
    for one in label if isinstance(label, list) else [label]:
        if not isinstance(one, str | int | float):
            raise RecordError(f"'label' has a JSON {type(one).__name__}, expected a text or a number")
        if isinstance(one, str) and not one.strip():
            raise RecordError("'label' is an empty text")
    if isinstance(label, list) and len(set(map(str, label))) < len(label):
        raise RecordError(f"'label' is {label!r}, which has a label twice")
    checked: Label = label
    return checked


@dataclass
class TextEncoder:
    """Encodes records as a model learns them.

    Attributes:
        tokenizer: The model's.
        frame: Its frame.
        seq_length: Longest sequence; longer texts are cut at their end.
        num_cut: How many were.
    """

    tokenizer: Tokenizer
    frame: Frame
    seq_length: int
    num_cut: int = field(default=0, init=False)

    def framed(self, record: dict[str, Any]) -> Framed:
        """Return the text of a record, or its pair, within its frame.

        Raises:
            RecordError: A text is missing, empty or no text.
        """
        first_text, second_text = texts_of(record)
        text = self.tokenizer.encode(first_text)
        if second_text is None:
            room = self.frame.room(self.seq_length, is_pair=False)
            self.num_cut += len(text) > room
            return self.frame.around(_some(text[:room], "text"))
        pair = self.tokenizer.encode(second_text)
        room = self.frame.room(self.seq_length, is_pair=True)
        self.num_cut += len(text) + len(pair) > room
        first, second = shortened(text, pair, room)
        return self.frame.around(_some(first, "text"), _some(second, "text_pair"))

    def encode(self, record: dict[str, Any], classes: Classes) -> EncodedRecord:
        """Return a record with its label.

        Raises:
            RecordError: It cannot be used.
        """
        values, framed = classes.values(label_of(record)), self.framed(record)
        return EncodedRecord([framed.ids], framed.is_second.astype(np.float32), values)


def read_texts(file: Path, encoder: TextEncoder, classes: Classes) -> Iterator[EncodedRecord]:
    """Read and encode a file of labelled texts.

    Raises:
        DataFormatError: Records cannot be used; all are named.
    """
    shapes: set[tuple[str, str]] = set()

    def use(record: dict[str, Any]) -> EncodedRecord:
        encoded = encoder.encode(record, classes)
        count = 0 if encoded.values is None else len(encoded.values)
        shape = ("a text_pair" if record.get("text_pair") is not None else "no text_pair", f"{count} numbers")
        if shapes and shape not in shapes:
            raise RecordError(f"it has {' and '.join(shape)}, those before it {' and '.join(next(iter(shapes)))}")
        shapes.add(shape)
        return encoded

    return (one for _, one in read_records(file, use, name=NAME, example=EXAMPLE))


def _some(ids: Iterable[int], key: str) -> Sequence[int]:
    tokens = list(ids)
    if not tokens:
        raise RecordError(f"{key!r} has no token in this vocabulary")
    return tokens
