"""Training documents made from others: rewritten, translated there and back, joined, or whatever a callable does.

What is made carries `augmentation` among its fields: how it was made, and from which documents. Answers are written
down as they come, so that a run that is killed asks for none of them again.
"""

import importlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO, Any, Protocol

import xxhash

from megatron_7b.errors import ConfigError
from megatron_7b.prepare.augmentation.chat_endpoint import AnswerError, ChatEndpoint
from megatron_7b.prepare.corpus_sections import AugmentationSection
from megatron_7b.prepare.document import BatchResult, Document, Removed

logger = logging.getLogger(__name__)

_SEED = 0xA06
_MANY = 5
"""Documents of which something should have been made, if anything can be: fewer may all be too long."""
_PARAGRAPH = "\n\n"
_TRANSLATION = "Translate the following text into {language}. Answer with the translation alone.\n\n{text}"


class Rewriter(Protocol):
    """What makes a new text of a document's."""

    identity: str
    """What its answers depend on besides the document: an answer is used again only under the same identity."""
    provenance: dict[str, object]
    """What is written beside a text that it made."""
    concurrency: int
    """Calls that may be under way at once."""

    def __call__(self, document: Document) -> str | None:
        """Return the new text, or None to make nothing of this document.

        Raises:
            AnswerError: Nothing could be made of it.
        """

    def stop(self) -> None:
        """Calls under way need not be finished."""


class Augmentation:
    """Rewrites or joins the documents of a shard, as its section says.

    Args:
        section: What to do with which share of the documents.
    """

    name = "augmentation"

    def __init__(self, section: AugmentationSection) -> None:
        self._section = section

    def run(self, documents: Sequence[Document], folder: Path) -> BatchResult:
        """Treat the documents of one shard.

        Args:
            documents: All of the shard, in input order.
            folder: Keeps the answers of a shard that is not finished.

        Raises:
            ConfigError: The endpoint is gone, or refuses every document.
        """
        section = self._section
        if section.method == "none":
            return BatchResult(list(documents), [])
        chosen = [document for document in documents if _is_chosen(document.text, section.share)]
        if section.method == "concatenation":
            return _join_documents(documents, chosen, section)
        made = _rewrite_all(chosen, _build_rewriter(section), folder)
        kept: list[Document] = []
        for document in documents:
            new = made.get(id(document))
            if new is None or section.keep_original:
                kept.append(document)
            if new is not None:
                kept.append(new)
        return BatchResult(kept, [], added=len(kept) - len(documents))


def check_augmentation(section: AugmentationSection) -> None:
    """Refuse before anything is written what cannot work.

    Raises:
        ConfigError: The callable is not there, or the endpoint does not answer.
    """
    if section.method == "callable":
        _import_callable(section.callable)
    if section.method in ("rewrite", "back_translation"):
        if not (section.endpoint or "").startswith(("http://", "https://")) or not section.model:
            raise ConfigError(
                f"augmentation.method {section.method} asks a model, but augmentation.endpoint is {section.endpoint} "
                f"and augmentation.model is {section.model}",
                hint="for example augmentation.endpoint http://localhost:8000/v1, and the model's name there",
            )
        _build_endpoint(section).check()


def _is_chosen(text: str, share: float) -> bool:
    return xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass"), seed=_SEED) < share * 2.0**64


# -------------------------------------------------------------------------------------------------------- rewriters


class _CallableRewriter:
    """A function of the user's, called with one document at a time."""

    concurrency = 1

    def __init__(self, name: str) -> None:
        self._function = _import_callable(name)
        self.identity = name
        self.provenance: dict[str, object] = {"method": "callable", "callable": name}

    def __call__(self, document: Document) -> str | None:
        text = self._function(document)
        if text is not None and not isinstance(text, str):
            raise ConfigError(
                f"augmentation.callable {self.identity} returned {type(text).__name__} for {document.source}:"
                f"{document.position}, expected a string, or None to make nothing of it"
            )
        return text

    def stop(self) -> None:
        """Nothing is under way."""


class _EndpointRewriter:
    """A chain of prompts, each asked with the answer to the one before."""

    def __init__(self, section: AugmentationSection) -> None:
        self._endpoint = _build_endpoint(section)
        self._language = section.language
        self.concurrency = section.concurrency
        self.provenance: dict[str, object] = {"method": section.method, "model": section.model}
        self._prompts = [section.prompt]
        if section.method == "back_translation":
            self._prompts = [_TRANSLATION.replace("{language}", section.pivot_language), _TRANSLATION]
            self.provenance["pivot_language"] = section.pivot_language
        settings = [self._prompts, section.endpoint, section.model, section.temperature, section.max_tokens]
        self.identity = json.dumps([*settings, self._language])

    def __call__(self, document: Document) -> str:
        text = document.text
        language = document.fields.get("language", self._language)
        for prompt in self._prompts:
            text = self._endpoint.ask(prompt.replace("{language}", str(language)).replace("{text}", text))
        return text

    def stop(self) -> None:
        """Let no thread wait for another try."""
        self._endpoint.stop()


def _build_rewriter(section: AugmentationSection) -> Rewriter:
    return _CallableRewriter(str(section.callable)) if section.method == "callable" else _EndpointRewriter(section)


def _build_endpoint(section: AugmentationSection) -> ChatEndpoint:
    return ChatEndpoint(
        str(section.endpoint),
        str(section.model),
        api_key=os.environ.get(section.api_key_variable),
        temperature=section.temperature,
        max_tokens=section.max_tokens,
        retries=section.retries,
        timeout_seconds=section.timeout_seconds,
    )


def _import_callable(name: str | None) -> Callable[[Document], Any]:
    module, _, attribute = (name or "").partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"augmentation.callable is {name}, which cannot be imported: {error}",
            hint="expected package.module:function; a module beside your data is found with PYTHONPATH=its folder",
        ) from error
    if not callable(found):
        raise ConfigError(f"augmentation.callable {name} is no function but {type(found).__name__}")
    function: Callable[[Document], Any] = found
    return function


# ---------------------------------------------------------------------------------------------------------- rewriting


class _Answers:
    """What a rewriter made so far, a line each, found again after a kill."""

    def __init__(self, path: Path, identity: str) -> None:
        self._identity = identity
        self._known: dict[str, str | None] = {}
        whole = 0
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):  # torn by a kill
                    break
                entry = json.loads(line)
                self._known[entry["key"]] = entry["answer"]
                whole += len(line)
            os.truncate(path, whole)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def key(self, document: Document) -> str:
        """Return the name of a question."""
        parts = [self._identity, document.text, document.fields.get("language")]
        return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())

    def find(self, documents: Sequence[Document]) -> Iterator[tuple[Document, str | None]]:
        """Yield the documents with an answer."""
        for document in documents:
            if (key := self.key(document)) in self._known:
                yield document, self._known[key]

    def lacks(self, document: Document) -> bool:
        """Return whether it must be asked for."""
        return self.key(document) not in self._known

    def add(self, document: Document, answer: str | None) -> None:
        """Write an answer down."""
        key = self.key(document)
        self._known[key] = answer
        self._file.write(json.dumps({"key": key, "answer": answer}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """No more come."""
        self._file.close()


def _rewrite_all(documents: Sequence[Document], rewriter: Rewriter, folder: Path) -> dict[int, Document]:
    """New documents by the identity of the old ones; those of which nothing can be made are left out and told."""
    answers = _Answers(folder / "answers.jsonl", rewriter.identity)
    failures: list[str] = []

    def rewrite(document: Document) -> tuple[Document, str | AnswerError | None]:
        try:
            return document, rewriter(document)
        except AnswerError as error:
            return document, error

    todo = [document for document in documents if answers.lacks(document)]
    pool = ThreadPoolExecutor(rewriter.concurrency, thread_name_prefix="augmentation")
    try:
        for finished in as_completed([pool.submit(rewrite, document) for document in todo]):
            document, answer = finished.result()
            if isinstance(answer, AnswerError):
                failures.append(f"{document.source}:{document.position}: {answer}")
            else:
                answers.add(document, answer)
    finally:
        rewriter.stop()
        pool.shutdown(cancel_futures=True)
        answers.close()
    if len(failures) == len(documents) >= _MANY:
        raise ConfigError(f"augmentation made nothing of any of {len(documents)} documents; the first: {failures[0]}")
    if failures:
        logger.warning(
            "augmentation left %d of %d documents as they are; the first: %s",
            len(failures),
            len(documents),
            failures[0],
        )
    return {id(old): _derive(old, text, rewriter.provenance, [old]) for old, text in answers.find(documents) if text}


# ------------------------------------------------------------------------------------------------------------ joining


def _join_documents(
    documents: Sequence[Document], chosen: Sequence[Document], section: AugmentationSection
) -> BatchResult:
    """Join consecutive documents of one language until `join_characters` are reached."""
    groups: list[list[Document]] = []
    sizes: dict[object, tuple[list[Document], int]] = {}
    for document in chosen:
        language = document.fields.get("language")
        group, size = sizes.get(language, ([], 0))
        if not group or size + len(document.text) > section.join_characters:
            group, size = [], 0
            groups.append(group)
        group.append(document)
        sizes[language] = group, size + len(document.text) + len(_PARAGRAPH)
    joined: dict[int, Document] = {}
    parts: dict[int, Document] = {}
    for group in groups:
        if len(group) > 1:
            text = _PARAGRAPH.join(part.text for part in group)
            joined[id(group[0])] = _derive(group[0], text, {"method": "concatenation"}, group)
            parts.update({id(part): group[0] for part in group})
    kept: list[Document] = []
    removed: list[tuple[Document, Removed]] = []
    for document in documents:
        first = parts.get(id(document))
        if first is None or section.keep_original:
            kept.append(document)
        elif first is not document:
            removed.append((document, Removed("augmentation:joined", f"joined to {first.source}:{first.position}")))
        if id(document) in joined:
            kept.append(joined[id(document)])
    return BatchResult(kept, removed, added=len(kept) + len(removed) - len(documents))


def _derive(first: Document, text: str, how: dict[str, object], parts: Sequence[Document]) -> Document:
    """Return a new document, with how it was made and of what."""
    originals = [
        {
            "source": part.source,
            "position": part.position,
            "xxh3_64": xxhash.xxh3_64_hexdigest(part.text.encode(errors="surrogatepass")),
        }
        for part in parts
    ]
    fields = {**first.fields, "augmentation": {**how, "originals": originals}}
    return Document(text, first.source, first.position, fields)
