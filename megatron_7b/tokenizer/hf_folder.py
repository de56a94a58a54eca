"""Reading a Hugging Face folder so that its ids are those of transformers' AutoTokenizer.

If the files show that tokenizer.json alone decides, it is run as it is; else transformers is asked, and what it
builds from the folder is the tokenizer. Saved, either is a folder that decides by its tokenizer.json alone.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from megatron_7b.errors import DataFormatError
from megatron_7b.tokenizer.ask_transformers import Answer, ask_transformers
from megatron_7b.tokenizer.definition import (
    TEMPLATE_FILES,
    TOKENIZER_FILE,
    Definition,
    find_token,
    named_tokens,
    read_definition,
    token_content,
)
from megatron_7b.tokenizer.rebuilding_classes import REBUILDING_CLASSES
from megatron_7b.tokenizer.settled import (
    BACKEND,
    DECLARING_FILES,
    HARMLESS_SETTINGS,
    Declarations,
    find_class,
    read_declarations,
    why_not_settled,
)

SENTENCEPIECE_FILE = "tokenizer.model"
_RUN_AS_IT_STANDS = "PreTrainedTokenizerFast"
# For a lone tokenizer.json, which does not say what its tokens are for.
_USUAL_EOD = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>")
_ROLES = ("eos_token", "bos_token", "pad_token")
_DECIDING_PARTS = ("model", "normalizer", "pre_tokenizer", "added_tokens")


def is_hugging_face_folder(folder: Path) -> bool:
    """Return whether a folder without tokenizer.json has files that AutoTokenizer would build one by.

    Raises:
        DataFormatError: One of the files that say so is not a JSON object.
    """
    return not read_declarations(folder).is_empty


def open_tokenizer_json(path: Path) -> Definition:
    """Read a folder with a tokenizer.json, or such a file under any name.

    Raises:
        DataFormatError: A file is not what it should be, or transformers is needed and cannot load the folder.
    """
    file = path / TOKENIZER_FILE if path.is_dir() else path
    content = read_definition(file)
    declared = read_declarations(file.parent)
    byte_level = b'"ByteLevel"' in file.read_bytes()
    reason = why_not_settled(content, declared, byte_level=byte_level)
    if reason is None:
        return _settled(path, file, content, declared, byte_level=byte_level)
    if file.name != TOKENIZER_FILE:
        raise DataFormatError(
            f"{file} has settings beside it that may not be its own ({reason})",
            hint=f"call it {TOKENIZER_FILE} and name the folder, or move it into a folder of its own",
        )
    answer = _ask(file.parent, reason)
    if _is_alike(content, answer.definition):
        return Definition(
            path=path,
            content=content,
            original=file,
            settings=_settled_config(declared.settings, answer),
            companions=_templates(file.parent),
            named_tokens=named_tokens(declared.settings),
            origin=f"tokenizer.json, as transformers' {answer.class_name} has it",
            **_roles_of(answer),
        )
    return _from_answer(path, answer, declared, reason)


def open_other_files(folder: Path) -> Definition:
    """Read a folder of transformers' without a tokenizer.json: a SentencePiece model, vocab.json and merges.txt, ….

    Raises:
        DataFormatError: Transformers cannot load it.
    """
    reason = f"there is no {TOKENIZER_FILE}"
    return _from_answer(folder, _ask(folder, reason), read_declarations(folder), reason)


def _settled(
    path: Path, file: Path, content: Mapping[str, Any], declared: Declarations, *, byte_level: bool
) -> Definition:
    name = find_class(declared, byte_level=byte_level) or BACKEND
    tokens = _role_tokens(declared, name)
    if declared.is_empty:
        tokens["eos_token"] = next((token for token in _USUAL_EOD if find_token(content, token) is not None), None)
    ids = {role: None if token is None else find_token(content, token) for role, token in tokens.items()}
    companions = [file.parent / name for name in DECLARING_FILES if (file.parent / name).is_file()]
    return Definition(
        path=path,
        content=content,
        eod_id=ids["eos_token"],
        bos_id=ids["bos_token"],
        pad_id=ids["pad_token"],
        split_special_tokens=bool(declared.settings.get("split_special_tokens")),
        original=file,
        settings=_settings_without_model(declared, name, tokens, byte_level=byte_level),
        companions=(*companions, *_templates(file.parent)),
        named_tokens=named_tokens(declared.settings),
    )


def _role_tokens(declared: Declarations, name: str) -> dict[str, str | None]:
    rules = REBUILDING_CLASSES.get(name)
    defaults: Mapping[str, str | None] = {} if rules is None or declared.is_empty else rules.roles
    return {role: token_content(declared.settings.get(role, defaults.get(role))) for role in _ROLES}


def _settings_without_model(
    declared: Declarations, name: str, tokens: Mapping[str, str | None], *, byte_level: bool
) -> dict[str, Any] | None:
    """Return the tokenizer_config.json that says what config.json said; None if that said nothing new."""
    alone = replace(declared, model={})
    alone_name = find_class(alone, byte_level=byte_level) or BACKEND
    if alone.is_empty == declared.is_empty and alone_name == name and _role_tokens(alone, alone_name) == tokens:
        return None
    named = {role: token for role, token in tokens.items() if token is not None}
    return {**declared.settings, **named, "tokenizer_class": _RUN_AS_IT_STANDS if name == BACKEND else name}


def _ask(folder: Path, reason: str) -> Answer:
    try:
        return ask_transformers(folder.absolute())
    except DataFormatError as error:
        raise DataFormatError(
            f"which ids {folder} gives is for transformers to say, because {reason}; {error.args[0]}",
            hint=error.hint or _hint(folder),
        ) from error


def _hint(folder: Path) -> str:
    if (folder / SENTENCEPIECE_FILE).is_file() and not (folder / TOKENIZER_FILE).is_file():
        return f"name the file {folder / SENTENCEPIECE_FILE} to take it alone, without what is declared beside it"
    return "nothing is asked if tokenizer_class is PreTrainedTokenizerFast and tokenizer.json has all tokens"


def _from_answer(path: Path, answer: Answer, declared: Declarations, reason: str) -> Definition:
    folder = path if path.is_dir() else path.parent
    model = folder / SENTENCEPIECE_FILE
    return Definition(
        path=path,
        content=answer.definition,
        settings=_settled_config(declared.settings, answer),
        companions=(*_templates(folder), *((model,) if model.is_file() else ())),
        named_tokens=named_tokens(declared.settings),
        origin=f"transformers' {answer.class_name}, because {reason}",
        **_roles_of(answer),
    )


def _roles_of(answer: Answer) -> dict[str, Any]:
    return {
        "eod_id": answer.eod_id,
        "bos_id": answer.bos_id,
        "pad_id": answer.pad_id,
        "split_special_tokens": answer.split_special_tokens,
    }


def _settled_config(settings: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
    """Return a tokenizer_config.json with which tokenizer.json alone decides, and nothing else is lost."""
    named = {int(token["id"]): token["content"] for token in answer.definition["added_tokens"]}
    roles = {"eos_token": answer.eod_id, "bos_token": answer.bos_id, "pad_token": answer.pad_id}
    kept = {
        key: token_content(value) if key.endswith("_token") and key not in ("add_bos_token", "add_eos_token") else value
        for key, value in settings.items()
        if key in HARMLESS_SETTINGS or key.endswith("_token")
    }
    kept |= {role: None if token is None else named.get(token) for role, token in roles.items()}
    return {"tokenizer_class": _RUN_AS_IT_STANDS} | {
        key: value for key, value in kept.items() if value is not None and key != "tokenizer_class"
    }


def _is_alike(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Return whether two definitions give the same ids, told by their parts as the library writes them."""
    from tokenizers import Tokenizer as Backend

    try:
        written = json.loads(Backend.from_buffer(orjson.dumps(ours)).to_str())
    except Exception:  # noqa: BLE001  # the library raises bare Exception; transformers has just loaded something else
        return False
    return all(_in_order(part, written) == _in_order(part, theirs) for part in _DECIDING_PARTS)


def _in_order(part: str, definition: Mapping[str, Any]) -> object:
    if part != "added_tokens":
        return definition.get(part)
    return sorted(definition[part], key=lambda token: int(token["id"]))


def _templates(folder: Path) -> tuple[Path, ...]:
    return tuple(file for pattern in TEMPLATE_FILES for file in sorted(folder.glob(pattern)) if file.is_file())
