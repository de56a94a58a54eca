"""Files of queries as records: the query, the text that belongs to it, and texts that do not.

A line is `{"query": …, "positive": …}`, with `"negatives": [text, …]` in all lines of a file or in none. Further
keys are left alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_7b.data.records.corpus import EncodedRecord
from megatron_7b.data.records.reading import RecordError, read_records, text_of
from megatron_7b.tokenizer import Tokenizer
from megatron_7b.tokenizer.surroundings import surrounding_ids

NAME = "queries"
_EXAMPLE = '{"query": …, "positive": …}'


@dataclass(frozen=True)
class Query:
    """A query with its texts.

    Attributes:
        query: What is looked for.
        positive: What shall be found.
        negatives: What shall not.
    """

    query: str
    positive: str
    negatives: tuple[str, ...] = ()


def read_query(record: Mapping[str, Any]) -> Query:
    """Turn a record into a query.

    Raises:
        RecordError: A key is missing, a text is empty, or a negative is the positive.
    """
    query, positive = text_of(dict(record), "query"), text_of(dict(record), "positive")
    given = record.get("negatives")
    if given is not None and not isinstance(given, list):
        raise RecordError("'negatives' is not a list of texts")
    negatives = tuple(text_of({"negatives": text}, "negatives") for text in given or ())
    if positive in negatives:
        raise RecordError("one of the negatives is the positive")
    return Query(query, positive, negatives)


def read_queries(file: Path) -> Iterator[Query]:
    """Yield the queries of a file, all with as many negatives.

    Raises:
        DataFormatError: Some of its records cannot be used; all of them are named.
    """
    known: int | None = None

    def of_one_form(record: dict[str, Any]) -> Query:
        nonlocal known
        query = read_query(record)
        if known is not None and len(query.negatives) != known:
            raise RecordError(f"it has {len(query.negatives)} negatives, those before it have {known}")
        known = len(query.negatives)
        return query

    return (query for _, query in read_records(file, of_one_form, name=NAME, example=_EXAMPLE))


class TextEncoder:
    """Encodes texts as transformers does, cut to a length.

    Args:
        tokenizer: Whose tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before, self._after = surrounding_ids(tokenizer)

    def encode(self, text: str, longest: int) -> NDArray[np.int32]:
        """Return the tokens of a text with those that transformers puts around it, at most `longest` of them."""
        room = max(1, longest - len(self._before) - len(self._after))
        ids = self._tokenizer.encode(text)[:room]
        return np.asarray([*self._before, *ids, *self._after], np.int32)


def encode_queries(file: Path, encoder: TextEncoder, *, seq_length: int) -> Iterator[EncodedRecord]:
    """Yield the records of a file; a text has room for an equal share of `seq_length`.

    Raises:
        DataFormatError: Some of its records cannot be used; all of them are named.
    """
    for query in read_queries(file):
        texts = (query.query, query.positive, *query.negatives)
        parts = [encoder.encode(text, seq_length // len(texts)) for text in texts]
        yield EncodedRecord(parts, np.zeros(sum(map(len, parts)), np.float32))
