"""The corpora of a chat run, made from JSONL files."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from megatron_7b.config import RunConfig
from megatron_7b.data.conversations.corpus import write_conversations
from megatron_7b.data.conversations.trained import ConversationEncoder
from megatron_7b.data.corpus.indexed_dataset import resolve_prefix
from megatron_7b.data.samples.blend import parse_blend
from megatron_7b.errors import ConfigError, PathError
from megatron_7b.tokenizer import Tokenizer
from megatron_7b.tokenizer.chat_template import ChatTemplate
from megatron_7b.tokenizer.default_chat_template import find_chat_template

_DATA_FOLDER = "data"
_TEMPLATE_FILE = "chat_template.jinja"
_VERSION = "1"
"""Of how conversations are encoded; part of the name of what is made from them."""


@dataclass(frozen=True)
class PreparedChat:
    """What a chat run reads.

    Attributes:
        train: The blend of corpora, as `data.train` has it.
        valid: The same for validation; empty: a share of `train`.
        tokenizer: Folder of the tokenizer with the template that the conversations were spelled out by; None: it
            is the one of the weights, as it is.
    """

    train: tuple[str, ...]
    valid: tuple[str, ...]
    tokenizer: Path | None


def prepare_chat(
    config: RunConfig, tokenizer: Tokenizer, run_dir: Path, report: Callable[[str, str], None], *, make: bool
) -> PreparedChat:
    """Encode the files of conversations that a configuration names, or find what they were encoded into.

    Args:
        config: The run.
        tokenizer: Of the weights.
        run_dir: The run folder; corpora are put into its `data`.
        report: Takes what is being done.
        make: Whether to make what is missing.

    Raises:
        DataFormatError: Conversations cannot be used; all mistakes of a file are named.
        FileNotFoundError: Something is missing, and not to be made.
    """
    options = config.finetune
    source = find_chat_template(tokenizer, None if options.chat_template is None else Path(options.chat_template))
    encoder = ConversationEncoder(tokenizer, ChatTemplate(tokenizer, source), options.train_on)
    made_with = f"{_VERSION}\n{tokenizer.identity}\n{encoder.template.identity}\n{options.train_on}"

    def corpus_of(name: str) -> str:
        file = Path(name)
        if not file.is_file() or file.suffix in (".bin", ".idx"):
            return _existing(name)
        prefix = run_dir / _DATA_FOLDER / f"{file.stem}-{_hash(file, made_with)}"
        if not Path(f"{prefix}.idx").is_file():
            if not make:
                raise FileNotFoundError(f"{prefix}.idx")
            manifest = write_conversations(
                file, str(prefix), encoder, tokenizer, options={"train_on": options.train_on}
            )
            report("encoded", f"{file}: {manifest.counts.documents:,} conversations, {manifest.counts.tokens:,} tokens")
        return str(prefix)

    blends = (
        (entries, name) for entries, name in ((config.data.train, "data.train"), (config.data.valid, "data.valid"))
    )
    train, valid = (_with_corpora(entries, name, corpus_of) for entries, name in blends)
    folder = None
    if source is not None or config.data.tokenizer is not None:
        folder = _keep_tokenizer(tokenizer, source, run_dir / _DATA_FOLDER, make=make)
    return PreparedChat(train, valid, folder)


def _with_corpora(entries: Sequence[str], name: str, corpus_of: Callable[[str], str]) -> tuple[str, ...]:
    if not entries:
        return ()
    parts = parse_blend(entries, name=name)
    if len(parts) == 1:
        return (corpus_of(parts[0].prefix),)
    return tuple(word for part in parts for word in (str(part.weight), corpus_of(part.prefix)))


def _existing(name: str) -> str:
    try:
        return resolve_prefix(name)
    except PathError as error:
        raise ConfigError(
            f"{name} is neither a file nor a corpus of conversations", hint="name a JSONL file, a conversation a line"
        ) from error


def _hash(file: Path, made_with: str) -> str:
    digest = xxhash.xxh3_64(made_with.encode())
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()[:8]


def _keep_tokenizer(tokenizer: Tokenizer, template: str | None, folder: Path, *, make: bool) -> Path:
    """Return a folder of the tokenizer with a template; None is its own."""
    digest = xxhash.xxh3_64(tokenizer.identity.encode())
    digest.update((template or ChatTemplate(tokenizer).identity).encode())
    target = folder / f"tokenizer-{digest.hexdigest()[:8]}"
    if not target.is_dir():
        if not make:
            raise FileNotFoundError(target)
        beside = target.with_name(target.name + ".tmp")
        shutil.rmtree(beside, ignore_errors=True)
        tokenizer.save(beside)
        if template is not None:
            (beside / _TEMPLATE_FILE).write_text(template, encoding="utf-8")
        beside.rename(target)
    return target
