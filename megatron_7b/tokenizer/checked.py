"""A fast engine, checked against the reference.

There are three checks, from wide to narrow:

1. Before the first document, both engines encode probes: every special token, white space of all kinds, digits,
   contractions, control characters. A difference rejects the engine.
2. While running, texts evenly spread over the corpus are encoded by both. A difference rejects the engine, and the
   caller starts again with the reference.
3. A text with a character that no compared text has had yet is compared around each such character. A difference hands
   this text, and every later one with that character, to the reference: Unicode grows, and a library built with older
   tables goes wrong only there.

`all` compares every text and takes the reference's ids wherever they differ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_7b.tokenizer.base import Tokenizer
from megatron_7b.tokenizer.engines import Engine, FlatIds
from megatron_7b.tokenizer.probes import build_text_probes

type Verify = Literal["sample", "all"]

type FindUnknown = Callable[[str, NDArray[np.bool_]], Sequence[int]]
"""Where in a text there are characters that a table of all code points lacks, the first of each, ascending."""

_EXCERPT = 2048
"""Characters of one sampled excerpt."""
_CONTEXT = 32
"""Characters on either side of a character that is new."""
_LAST_CODE_POINT = 0x10FFFF


@dataclass(frozen=True)
class Disagreement:
    """Where two engines part."""

    text_index: int
    """Which text of the batch."""
    token_index: int
    """The first token that differs."""
    fast_token: int | None
    """None where the ids end."""
    reference_token: int | None
    excerpt: str
    """Text around the difference."""

    def __str__(self) -> str:
        return (
            f"token {self.token_index}: reference {self.reference_token}, fast engine {self.fast_token}, "
            f"near {self.excerpt!r}"
        )


@dataclass(frozen=True, slots=True)
class CheckedIds:
    """A batch encoded, and what was compared on the way.

    Which texts are compared follows from the texts alone, so that the counts are the same however often a run was
    interrupted; the comparison of new characters, which depends on who meets them first, is left out of them.
    """

    ids: NDArray[np.uint32]
    """Of all texts, one after another [total]."""
    lengths: NDArray[np.int64]
    """Ids of each text [number of texts]."""
    disagreements: list[Disagreement] = field(default_factory=list)
    """Texts with the reference's ids in place of the fast engine's."""
    compared_texts: int = 0
    compared_characters: int = 0


class EngineRejectedError(Exception):
    """The fast engine fails, or differs from the reference where it has no excuse: the caller does without it."""


class TrustedEngine:
    """The reference where a checked engine is expected: nothing to compare."""

    def __init__(self, reference: Engine) -> None:
        self.name = reference.name
        self._reference = reference

    def encode_checked(self, texts: Sequence[str], *, sample_characters: int = 0) -> CheckedIds:  # noqa: ARG002
        """Encode a batch; there is nothing to sample."""
        return CheckedIds(*self._reference.encode_flat(texts))


class CheckedEngine:
    """Encodes with the fast engine, compares by the rules above, and answers with ids that are right as far as seen."""

    def __init__(
        self, fast: Engine, reference: Engine, *, verify: Verify = "sample", find_unknown: FindUnknown | None = None
    ) -> None:
        """Put a fast engine under check.

        Args:
            fast: The engine.
            reference: What it must agree with.
            verify: Which texts are compared.
            find_unknown: Does what `find_unknown_slowly` does, and quicker.
        """
        self.name = fast.name
        self._find_unknown = find_unknown or find_unknown_slowly
        self._fast = fast
        self._reference = reference
        self._verify = verify
        self._proven = np.zeros(_LAST_CODE_POINT + 1, np.bool_)
        self._proven[:128] = True

    def probe(self, tokenizer: Tokenizer) -> None:
        """Compare on the probes.

        Raises:
            EngineRejectedError: A probe differs.
        """
        self._reject_unless_equal(build_probes(tokenizer))

    def encode_checked(self, texts: Sequence[str], *, sample_characters: int = 0) -> CheckedIds:
        """Encode a batch, comparing at least `sample_characters` of it.

        Raises:
            EngineRejectedError: A sampled excerpt differs.
        """
        encoded = self._encode_fast(texts)
        if self._verify == "all":
            return self._take_reference(texts, encoded, range(len(texts)), [])
        sample = self._compare_sample(texts, sample_characters)
        suspects = [index for index, text in enumerate(texts) if not text.isascii() and not self._prove(text)]
        return self._take_reference(texts, encoded, suspects, sample)

    def _compare_sample(self, texts: Sequence[str], characters: int) -> list[str]:
        """Return the excerpts that were compared."""
        if characters <= 0 or not texts:
            return []
        count = min(len(texts), -(-characters // _EXCERPT))
        picked = [texts[index * len(texts) // count] for index in range(count)]
        return self._reject_unless_equal([_excerpt(text) for text in picked])

    def _prove(self, text: str) -> bool:
        """Return whether all characters are proven, after comparing around those that were not."""
        new = self._find_unknown(text, self._proven)
        if len(new) == 0:
            return True
        windows = [text[start:end] for start, end in _merge_windows(np.asarray(new, np.int64), len(text))]
        if self._compare(windows) is not None:
            return False
        for window in windows:
            self._proven[np.frombuffer(window.encode("utf-32-le"), np.uint32)] = True
        return True

    def _reject_unless_equal(self, texts: Sequence[str]) -> list[str]:
        # Characters that are new are the third net's business: they must not reject the engine.
        texts = [text for text in texts if text.isascii() or self._prove(text)]
        disagreement = self._compare(texts)
        if disagreement is not None:
            raise EngineRejectedError(f"{self.name} differs from the reference at {disagreement}")
        return texts

    def _compare(self, texts: Sequence[str]) -> Disagreement | None:
        fast_ids, fast_lengths = self._encode_fast(texts)
        reference_ids, reference_lengths = self._reference.encode_flat(texts)
        if np.array_equal(fast_lengths, reference_lengths) and np.array_equal(fast_ids, reference_ids):
            return None
        fast, reference = _split(fast_ids, fast_lengths), _split(reference_ids, reference_lengths)
        return next(
            difference
            for index, text in enumerate(texts)
            if (difference := find_disagreement(index, text, fast[index], reference[index])) is not None
        )

    def _encode_fast(self, texts: Sequence[str]) -> FlatIds:
        try:
            return self._fast.encode_flat(texts)
        except Exception as error:  # a byte without a token, a text too long, …: the libraries raise several kinds
            raise EngineRejectedError(f"{self.name} cannot encode what the reference can: {error}") from error

    def _take_reference(
        self, texts: Sequence[str], encoded: FlatIds, suspects: Sequence[int], sample: Sequence[str]
    ) -> CheckedIds:
        """Encode the suspects again with the reference, and put its ids in place where they differ."""
        compared = len(suspects) + len(sample)
        characters = sum(len(texts[index]) for index in suspects) + sum(map(len, sample))
        if not suspects:
            return CheckedIds(*encoded, [], compared, characters)
        documents = _split(*encoded)
        reference = _split(*self._reference.encode_flat([texts[index] for index in suspects]))
        disagreements = []
        for index, ids in zip(suspects, reference, strict=True):
            difference = find_disagreement(index, texts[index], documents[index], ids)
            if difference is not None:
                disagreements.append(difference)
                documents[index] = ids
        if disagreements:
            lengths = np.fromiter(map(len, documents), np.int64, len(documents))
            encoded = np.concatenate(documents), lengths
        return CheckedIds(*encoded, disagreements, compared, characters)


def build_probes(tokenizer: Tokenizer) -> list[str]:
    """Short texts on which byte-pair libraries are known to part; characters beyond ASCII are the third check's."""
    special = [tokenizer.decode([token]) for token in sorted(tokenizer.special_ids)]
    return build_text_probes(special, scripts=False)


def find_disagreement(
    text_index: int, text: str, fast: NDArray[np.uint32], reference: NDArray[np.uint32]
) -> Disagreement | None:
    """Return the first token where two encodings of one text differ, or None."""
    common = min(len(fast), len(reference))
    differing = np.flatnonzero(fast[:common] != reference[:common])
    if differing.size == 0 and len(fast) == len(reference):
        return None
    at = int(differing[0]) if differing.size else common
    near = round(len(text) * at / max(1, len(reference)))
    return Disagreement(
        text_index,
        at,
        int(fast[at]) if at < len(fast) else None,
        int(reference[at]) if at < len(reference) else None,
        text[max(0, near - 20) : near + 20],
    )


def find_unknown_slowly(text: str, known: NDArray[np.bool_]) -> list[int]:
    """Return where the characters that are False in `known` [0x110000] are, the first of each, ascending."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    new = np.flatnonzero(~known[points])
    _, first = np.unique(points[new], return_index=True)
    return list(np.sort(new[first]).tolist())


def _excerpt(text: str) -> str:
    start = (len(text) - _EXCERPT) // 2
    return text if start <= 0 else text[start : start + _EXCERPT]


def _merge_windows(positions: NDArray[np.int64], length: int) -> list[tuple[int, int]]:
    """Return windows around sorted positions, overlapping ones joined."""
    borders = np.flatnonzero(np.diff(positions) > 2 * _CONTEXT)
    firsts = positions[np.concatenate(([0], borders + 1))]
    lasts = positions[np.concatenate((borders, [len(positions) - 1]))]
    return [
        (max(0, int(first) - _CONTEXT), min(length, int(last) + _CONTEXT + 1))
        for first, last in zip(firsts, lasts, strict=True)
    ]


def _split(ids: NDArray[np.uint32], lengths: NDArray[np.int64]) -> list[NDArray[np.uint32]]:
    return np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []
