"""Words with tags: `{"tokens": ["Ada", "came"], "tags": ["B-PER", "O"]}` a line, names in the scheme BIO."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_7b.data.labelled.frames import Frame
from megatron_7b.data.records.corpus import EncodedRecord
from megatron_7b.data.records.reading import RecordError, has_half_pair, read_records
from megatron_7b.tokenizer import Tokenizer

NAME = "tagged texts"
EXAMPLE = '{"tokens": ["Ada", "came"], "tags": ["B-PER", "O"]}'
OUTSIDE = "O"
MOST_TAGS = 2047
"""As many as the numbers beside tokens tell apart."""

type Scheme = Literal["bio", "plain"]


@dataclass(frozen=True)
class Piece:
    """Some words of a text within their frame.

    Attributes:
        ids: int64 [n].
        first_word: Number in the text of the first word.
        places: Where the first token of each word is in `ids`; -1 for a word without a token.
    """

    ids: NDArray[np.int64]
    first_word: int
    places: NDArray[np.int64]


def find_tags(files: Sequence[Path], scheme: Scheme) -> tuple[str, ...]:
    """Return the tags of the training files: O first, the others sorted, each name's B- before its I-.

    Raises:
        DataFormatError: Records cannot be used; all are named.
    """
    found: set[str] = set()
    for file in files:
        for _ in read_records(file, lambda record: found.update(tags_of(record, scheme)), name=NAME, example=EXAMPLE):
            pass
    if scheme == "bio":
        names = {tag.partition("-")[2] for tag in found} - {""}
        return (OUTSIDE, *(f"{position}-{name}" for name in sorted(names) for position in "BI"))
    return tuple(sorted(found))


def words_of(record: dict[str, Any]) -> list[str]:
    """Return the words of a record.

    Raises:
        RecordError: There are none, or one of them is no text, empty or has whitespace at an end.
    """
    words = record.get("tokens")
    if not isinstance(words, list) or not words:
        raise RecordError(f"'tokens' is {_shown(words)}, expected a list of words; its keys are {sorted(record)}")
    for number, word in enumerate(words):
        if not isinstance(word, str) or not word.strip():
            raise RecordError(f"'tokens' has {word!r} at {number}, expected a word")
        if has_half_pair(word):
            raise RecordError(f"'tokens' has half of a surrogate pair at {number}, which is no character")
    return words


def tags_of(record: dict[str, Any], scheme: Scheme) -> list[str]:
    """Return the tags of a record, one for each word.

    Raises:
        RecordError: There are others, or they are not of the scheme.
    """
    words, tags = words_of(record), record.get("tags")
    if not isinstance(tags, list):
        raise RecordError(f"'tags' is {_shown(tags)}, expected a list; its keys are {sorted(record)}")
    if len(tags) != len(words):
        raise RecordError(f"it has {len(tags)} tags for {len(words)} tokens")
    before = OUTSIDE
    for number, tag in enumerate(tags):
        if not isinstance(tag, str) or not tag:
            raise RecordError(f"'tags' has {tag!r} at {number}, expected a text")
        if scheme == "bio":
            _check_bio(tag, before, number)
        before = tag
    return tags


def _check_bio(tag: str, before: str, number: int) -> None:
    if tag != OUTSIDE and not re.fullmatch(r"[BI]-.+", tag):
        raise RecordError(
            f"'tags' has {tag!r} at {number}, expected O, B-NAME or I-NAME (--finetune.tag-scheme plain takes any)"
        )
    if tag.startswith("I-") and before[:1] not in ("B", "I"):
        raise RecordError(f"'tags' has {tag!r} at {number} after {before!r}: a name begins with {'B' + tag[1:]!r}")
    if tag.startswith("I-") and before[2:] != tag[2:]:
        raise RecordError(f"'tags' has {tag!r} at {number} after {before!r}, which is another name")


@dataclass
class TagEncoder:
    """Encodes records as a model learns them.

    Attributes:
        tokenizer: The model's.
        frame: Its frame.
        seq_length: Longest sequence; longer texts are divided between words.
        num_divided: How many were.
    """

    tokenizer: Tokenizer
    frame: Frame
    seq_length: int
    num_divided: int = field(default=0, init=False)

    def pieces(self, words: Sequence[str]) -> list[Piece]:
        """Return a text in as many pieces as it takes.

        Raises:
            RecordError: No word has a token, or one has more than a piece has room for.
        """
        ids, spans = self.tokenizer.encode_with_offsets(" ".join(words))
        ends = np.cumsum([len(word) + 1 for word in words]) - 1
        # A token is of the word that its last character is of: some begin with the space before it.
        last = np.array([max(start, stop - 1) for start, stop in spans], np.int64)
        of_word = np.searchsorted(ends, last, side="right")
        room = self.frame.room(self.seq_length, is_pair=False)
        pieces: list[Piece] = []
        first_token = first_word = 0
        while first_word < len(words):
            end_word, end_token = self._end(of_word, first_word, first_token, room, words)
            of_piece = of_word[first_token:end_token]
            places = np.full(end_word - first_word, -1, np.int64)
            numbers, begins = np.unique(of_piece, return_index=True)
            places[numbers - first_word] = begins + len(self.frame.before)
            pieces.append(Piece(self.frame.around(ids[first_token:end_token]).ids, first_word, places))
            first_word, first_token = end_word, end_token
        if all((piece.places < 0).all() for piece in pieces):
            raise RecordError("none of its words has a token in this vocabulary")
        self.num_divided += len(pieces) > 1
        return pieces

    def _end(
        self, of_word: NDArray[np.int64], first_word: int, first_token: int, room: int, words: Sequence[str]
    ) -> tuple[int, int]:
        """Return the word and the token that a piece ends before."""
        if len(of_word) - first_token <= room:
            return len(words), len(of_word)
        end_word = int(of_word[first_token + room])
        if end_word == first_word:
            raise RecordError(f"its word {words[first_word][:40]!r} has more tokens than a row has room for, {room}")
        return end_word, int(np.searchsorted(of_word, end_word))

    def encode(self, record: dict[str, Any], tags: Sequence[str], scheme: Scheme) -> list[EncodedRecord]:
        """Return the pieces of a record with its tags.

        Raises:
            RecordError: It cannot be used.
        """
        given = tags_of(record, scheme)
        unknown = next((tag for tag in given if tag not in tags), None)
        if unknown is not None:
            raise RecordError(f"'tags' has {unknown!r}, which is none of those learned: {', '.join(tags[:12])}")
        numbers, records = np.array([tags.index(tag) for tag in given]), []
        for piece in self.pieces(words_of(record)):
            values, has_token = np.zeros(len(piece.ids), np.float32), piece.places >= 0
            own = numbers[piece.first_word : piece.first_word + len(piece.places)]
            values[piece.places[has_token]] = own[has_token] + 1
            records.append(EncodedRecord([piece.ids], values))
        return records


def read_tagged(file: Path, encoder: TagEncoder, tags: Sequence[str], scheme: Scheme) -> Iterator[EncodedRecord]:
    """Read and encode a file of tagged texts.

    Raises:
        DataFormatError: Records cannot be used; all are named.
    """
    read = read_records(file, lambda record: encoder.encode(record, tags, scheme), name=NAME, example=EXAMPLE)
    return (piece for _, pieces in read for piece in pieces)


def entities_of(words: Sequence[str], tags: Sequence[str]) -> list[dict[str, object]]:
    """Return the names that BIO tags mark, each with its type, its words from start to before end, and its text.

    A name that a model lets begin with I- begins there.
    """
    found: list[dict[str, Any]] = []
    before = OUTSIDE
    for number, tag in enumerate(tags):
        position, _, name = tag.partition("-")
        if position in ("B", "I") and name:
            if position == "I" and before.partition("-")[2] == name and before != OUTSIDE:
                found[-1]["end"] = number + 1
            else:
                found.append({"type": name, "start": number, "end": number + 1})
        before = tag
    return [{**one, "text": " ".join(words[one["start"] : one["end"]])} for one in found]


def _shown(value: object) -> str:
    return "missing" if value is None else f"{value!r}"[:60]
