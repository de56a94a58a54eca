"""Questions with a text that answers them: `{"question", "context", "answers"}` a line, or SQuAD's JSON."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_7b.data.labelled.frames import Frame
from megatron_7b.data.records.corpus import EncodedRecord
from megatron_7b.data.records.reading import RecordError, read_records, text_of
from megatron_7b.errors import DataFormatError
from megatron_7b.tokenizer import Tokenizer

NAME = "questions"
WINDOWS = "windows with questions"
EXAMPLE = '{"question": "Who came?", "context": "Ada came.", "answers": [{"text": "Ada", "answer_start": 0}]}'
_PROBLEMS_SHOWN = 8
_FEWEST_TOKENS = 8
"""Of text in a window."""


@dataclass(frozen=True)
class Answer:
    """A span of a text, in characters.

    Attributes:
        text: What it says.
        start: Its first character.
    """

    text: str
    start: int

    @property
    def stop(self) -> int:
        """One past its last character."""
        return self.start + len(self.text)


@dataclass(frozen=True)
class Window:
    """A question with a part of its text.

    Attributes:
        ids: int64 [n].
        is_text: Which tokens are of the text, or follow it, bool [n].
        begin: Where the tokens of the text begin in `ids`.
        spans: Characters of the text that each of them covers, int64 [tokens of text, 2].
    """

    ids: np.ndarray
    is_text: np.ndarray
    begin: int
    spans: np.ndarray


def answers_of(record: dict[str, Any]) -> list[Answer]:
    """Return the answers to a question, each as it is in the text; none: the text does not answer it.

    Raises:
        RecordError: They are malformed, or not where they are said to be.
    """
    given = record.get("answers")
    if isinstance(given, dict):  # as in the column files of data sets: lists of texts and of places
        texts, starts = given.get("text"), given.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise RecordError("'answers' is an object, expected equally long lists 'text' and 'answer_start' in it")
        given = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if not isinstance(given, list):
        raise RecordError(f"'answers' is {given!r:.60}, expected a list; its keys are {sorted(record)}")
    context = text_of(record, "context")
    return [_answer(one, context) for one in given]


def _answer(one: Any, context: str) -> Answer:
    text, start = (one.get("text"), one.get("answer_start")) if isinstance(one, dict) else (None, None)
    if not isinstance(text, str) or not text or isinstance(start, bool) or not isinstance(start, int):
        raise RecordError(f"'answers' has {one!r:.80}, expected {{'text': …, 'answer_start': …}}")
    if not 0 <= start < len(context) or start + len(text) > len(context):
        raise RecordError(f"the answer {text!r:.40} at {start} is outside of the context of {len(context)} characters")
    if context[start : start + len(text)] != text:
        place = context.find(text)
        hint = f"; it is at {place}" if place >= 0 else "; it is nowhere in the context"
        raise RecordError(f"the answer {text!r:.40} is not at {start}, where {context[start : start + 20]!r} is{hint}")
    return Answer(text, start)


@dataclass
class QuestionEncoder:
    """Encodes questions with windows of their texts.

    Attributes:
        tokenizer: The model's.
        frame: Its frame.
        seq_length: Longest window, with its question.
        doc_stride: Tokens of text that neighbouring windows share; None: a quarter of `seq_length`.
        num_divided: How many texts took several windows.
    """

    tokenizer: Tokenizer
    frame: Frame
    seq_length: int
    doc_stride: int | None = None
    num_divided: int = field(default=0, init=False)

    def windows(self, question: str, context: str) -> list[Window]:
        """Return the windows of a text.

        Raises:
            RecordError: The question leaves no room, or the text has no token.
        """
        asked = self.tokenizer.encode(question)
        ids, spans = self.tokenizer.encode_with_offsets(context)
        room = self.frame.room(self.seq_length, is_pair=True) - len(asked)
        shared = self.seq_length // 4 if self.doc_stride is None else self.doc_stride
        step = room - shared
        if room < _FEWEST_TOKENS or step < 1:
            raise RecordError(
                f"its question has {len(asked)} tokens, which leaves {max(0, room)} of the {self.seq_length} of a "
                f"window for text, with {shared} (finetune.doc_stride) shared"
            )
        if not ids:
            raise RecordError("'context' has no token in this vocabulary")
        num_windows = 1 + max(0, -(-(len(ids) - room) // step))
        self.num_divided += num_windows > 1
        windows = []
        for first in range(0, num_windows * step, step):
            part = slice(first, first + room)
            framed = self.frame.around(asked, ids[part])
            covered = np.array(spans[part], np.int64).reshape(-1, 2)
            windows.append(Window(framed.ids, framed.is_second, framed.begins[1], covered))
        return windows

    def encode(self, record: dict[str, Any]) -> list[EncodedRecord]:
        """Return the windows of a record, each with the first of its answers if all of that is in it.

        Raises:
            RecordError: It cannot be used.
        """
        answers = answers_of(record)
        records = []
        for window in self.windows(text_of(record, "question"), text_of(record, "context")):
            borders = _borders(window, answers[0]) if answers else (0, 0)
            values = np.array(borders, np.float32)
            records.append(EncodedRecord([window.ids], window.is_text.astype(np.float32), values))
        return records


def _borders(window: Window, answer: Answer) -> tuple[int, int]:
    """Return the places of the first and the last token of an answer; (0, 0) if it is not all in the window."""
    starts, stops = window.spans[:, 0], window.spans[:, 1]
    if answer.start < starts[0] or answer.stop > stops[-1]:
        return 0, 0
    (touched,) = np.nonzero((stops > answer.start) & (starts < answer.stop))
    if not len(touched):
        return 0, 0
    return window.begin + int(touched[0]), window.begin + int(touched[-1])


def read_questions[T](file: Path, use: Callable[[dict[str, Any]], T]) -> Iterator[tuple[str, T]]:
    """Read a file of questions, whichever of the two formats it has.

    Args:
        file: JSONL, or SQuAD's JSON.
        use: What to make of each; its RecordErrors are mistakes of the record.

    Yields:
        The place in the file, and what `use` made of the question there; nothing any more after the first mistake.

    Raises:
        DataFormatError: The file cannot be read or holds nothing; or some questions cannot be used; all are named.
    """
    squad = _squad(file)
    if squad is None:
        for number, made in read_records(file, use, name=NAME, example=EXAMPLE):
            yield str(number), made
        return
    problems: list[str] = []
    count = 0
    for place, record in _questions_of(squad, file):
        count += 1
        try:
            made = use(record)
        except RecordError as error:
            problems.append(f"  {file}: {place}: {error}")
            continue
        if not problems:
            yield place, made
    if problems:
        more = [f"  … and {len(problems) - _PROBLEMS_SHOWN} more"] if len(problems) > _PROBLEMS_SHOWN else []
        raise DataFormatError(
            "\n".join([f"{len(problems)} of {count} questions cannot be used:", *problems[:_PROBLEMS_SHOWN], *more]),
            hint="correct them, or remove them from the file",
        )
    if not count:
        raise DataFormatError(f"{file} holds no questions")


def _squad(file: Path) -> Any:
    """Return the content of a file in SQuAD's format; None if it is not."""
    try:
        content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
        head = content[:200].lstrip()
        if not head.startswith(b"{") or b'"data"' not in content:
            return None
        parsed = json.loads(content)
    except OSError as error:
        raise DataFormatError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed.get("data"), list) else None


def _questions_of(squad: Any, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        for number, article in enumerate(squad["data"]):
            for second, paragraph in enumerate(article["paragraphs"]):
                for third, asked in enumerate(paragraph["qas"]):
                    place = f"data[{number}].paragraphs[{second}].qas[{third}]"
                    yield place, {"context": paragraph.get("context"), **asked}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataFormatError(f"{file} has SQuAD's key 'data', but not its structure: {error!r}") from error


def read_windows(file: Path, encoder: QuestionEncoder) -> Iterator[EncodedRecord]:
    """Read and encode a file of questions.

    Raises:
        DataFormatError: Records cannot be used; all are named.
    """
    return (window for _, windows in read_questions(file, encoder.encode) for window in windows)


def has_unanswered(files: Sequence[Path]) -> bool:
    """Return whether some questions have no answer.

    Raises:
        DataFormatError: Records cannot be used; all are named.
    """
    found = False
    for file in files:
        for _, answers in read_questions(file, _checked_answers):
            found = found or not answers
    return found


def _checked_answers(record: dict[str, Any]) -> list[Answer]:
    """Return the answers, once the question is one too: all mistakes are told together."""
    text_of(record, "question")
    return answers_of(record)
