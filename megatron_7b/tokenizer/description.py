"""What a tokenizer is, for people: kind, vocabulary, special tokens, and what transformers makes of its folder."""

from dataclasses import dataclass
from pathlib import Path

from megatron_7b.errors import DataFormatError
from megatron_7b.tokenizer.base import Tokenizer

_MOST_SPECIAL = 40
"""Special tokens that are listed; some vocabularies reserve thousands."""
_SAMPLE = "Hello world, it's 2024: naïve 東京 🙂\n"


@dataclass(frozen=True)
class NamedToken:
    """A token with its text."""

    id: int
    text: str | None


@dataclass(frozen=True)
class EncodedSample:
    """A text, its tokens, and what they give back."""

    text: str
    ids: list[int]
    tokens: list[str | None]
    decoded: str


@dataclass(frozen=True)
class TokenizerDescription:
    """What `megatron-7b tokenizer info` prints."""

    kind: str
    path: str | None
    identity: str
    """Hash of what decides the ids: corpora and checkpoints name it."""
    ids_decided_by: str
    vocab_size: int
    eod: NamedToken | None
    bos: NamedToken | None
    pad: NamedToken | None
    num_special: int
    special: dict[str, str | None]
    """The first special tokens by their ids."""
    chat_template: bool
    sample: EncodedSample


def describe_for_people(tokenizer: Tokenizer) -> TokenizerDescription:
    """Return what a tokenizer is."""
    special, ids = sorted(tokenizer.special_ids), tokenizer.encode(_SAMPLE)
    return TokenizerDescription(
        kind=tokenizer.kind,
        path=None if tokenizer.path is None else str(tokenizer.path),
        identity=tokenizer.identity,
        ids_decided_by=tokenizer.origin,
        vocab_size=tokenizer.vocab_size,
        eod=_name(tokenizer, tokenizer.eod_id),
        bos=_name(tokenizer, tokenizer.bos_id),
        pad=_name(tokenizer, tokenizer.pad_id),
        num_special=len(special),
        special={str(token): tokenizer.spell(token) for token in special[:_MOST_SPECIAL]},
        chat_template=_has_template(tokenizer),
        sample=EncodedSample(_SAMPLE, ids, [tokenizer.spell(token) for token in ids], tokenizer.decode(ids)),
    )


def compare_with_transformers(tokenizer: Tokenizer) -> str:
    """Return in words whether transformers' AutoTokenizer gives a folder the same ids; takes seconds."""
    from megatron_7b.tokenizer.agreement import why_ids_differ

    folder = _folder(tokenizer)
    if folder is None:
        return "not compared: no files of transformers' make it up"
    try:
        difference = why_ids_differ(tokenizer, folder)
    except DataFormatError as error:
        return f"not compared: {error.args[0]}"
    return "AutoTokenizer gives the same ids for all probes" if difference is None else f"other ids: {difference}"


def _name(tokenizer: Tokenizer, token: int | None) -> NamedToken | None:
    return None if token is None else NamedToken(token, tokenizer.spell(token))


def _has_template(tokenizer: Tokenizer) -> bool:
    """Return whether the folder brings a chat template, in a file of its own or in its settings."""
    from megatron_7b.tokenizer.definition import CONFIG_FILE, TEMPLATE_FILES, read_object_if_there

    folder = _folder(tokenizer)
    if folder is None:
        return False
    files = (file for pattern in TEMPLATE_FILES for file in folder.glob(pattern))
    return next(files, None) is not None or bool(read_object_if_there(folder / CONFIG_FILE).get("chat_template"))


def _folder(tokenizer: Tokenizer) -> Path | None:
    """Return the folder of the tokenizer's files, None if it has no files."""
    path: Path | None = tokenizer.path
    if path is None or tokenizer.kind == "bytes":
        return None
    return path if path.is_dir() else path.parent
