"""A document on its way through the steps, and what a step may say of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class Document:
    """One text with where it came from.

    Steps may change `text` and add to `fields`; `source` and `position` stay, so that any document that comes out can
    be traced to its record.
    """

    text: str
    source: str
    """The file, as the user named it."""
    position: int
    """Line or row in that file, from 1; of a WARC file, the byte at which the record begins."""
    fields: dict[str, Any] = field(default_factory=dict)
    """The record's other fields, carried through, and what the steps found out, under stable names: `url`, `language`,
    `language_score`, `augmentation`."""
    is_html: bool = False
    """Whether `text` is still markup."""


@dataclass(frozen=True, slots=True)
class Removed:
    """What a step returns in place of a document that it drops."""

    reason: str
    """Stable and short, the step first: `quality:gopher:too_few_words`, `language:de`, `duplicate:near`."""
    detail: str = ""
    """For a person who reads the sample: the measured value and its limit, or which document this one repeats."""


class DocumentStep(Protocol):
    """Looks at one document at a time, with no memory of the others.

    Made in the worker process, from the recipe: it need not be picklable, and may load what it needs when it is made.
    A step that changes texts may have an attribute `changes`, a Counter of what it changed, for the accounts.
    """

    @property
    def name(self) -> str:
        """Names the stage in the accounts and the file of its samples: letters, digits and `_`."""

    def __call__(self, document: Document) -> Document | Removed:
        """Return the document, changed in place or not, or why it goes."""


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What became of the documents that a batch step was given: given + added = documents + removed."""

    documents: list[Document]
    """Those that continue, in order."""
    removed: list[tuple[Document, Removed]]
    added: int = 0
    """Documents among `documents` or `removed` that were not given but made here."""


class BatchStep(Protocol):
    """Looks at many documents together: rewriting them at an endpoint with many requests under way, joining them."""

    @property
    def name(self) -> str:
        """As for a DocumentStep."""

    def run(self, documents: Sequence[Document], folder: Path) -> BatchResult:
        """Treat the documents of one shard.

        Args:
            documents: All of the shard, in input order.
            folder: Belongs to this step and shard alone, and survives a kill: finished answers kept there need not be
                asked for again. Removed once the shard is published.
        """


class DuplicateFinder(Protocol):
    """Finds documents that repeat another one, in two phases: a signature each, then a decision over all of them."""

    @property
    def name(self) -> str:
        """`exact` or `near`; the reason is `duplicate:` and this name."""

    def sign(self, texts: Sequence[str]) -> NDArray[np.generic]:
        """Signatures of some texts, [texts, columns] in a fixed dtype; a function of each text alone.

        Called in worker processes on batches of a few thousand; the rows of a shard are written to one `.npy` file.
        """

    def find_keepers(self, signatures: Sequence[Path], present: NDArray[np.bool_], folder: Path) -> NDArray[np.int64]:
        """Return which document stays in place of each.

        Args:
            signatures: One `.npy` file per shard, in input order; documents are numbered through all of them from 0.
            present: [documents] False for those that an earlier finder dropped: they neither stay nor count.
            folder: For files on the way; empty at the start, removed after.

        Returns:
            [documents] number of the first document, in input order, that this one repeats; its own number where it
            stays, and for absent ones.
        """
