"""Copies a tokenizer between folders unchanged, and makes sure that transformers gives the ids that it gives."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_7b.conversion.folder_reader import CONFIG_FILE
from megatron_7b.conversion.json_files import read_json, write_json
from megatron_7b.conversion.reference import reported
from megatron_7b.conversion.tokenizer_json import write_tokenizer_json
from megatron_7b.errors import ConversionError
from megatron_7b.tokenizer import Tokenizer, load_tokenizer
from megatron_7b.tokenizer.byte_level import MARKER_FILE

TOKENIZER_JSON = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
_VOCABULARY_FILES = (TOKENIZER_JSON, "tokenizer.model", "vocab.json", "vocab.txt")
_FILES = (
    *_VOCABULARY_FILES,
    "merges.txt",
    "tekken.json",
    "tokenizer.model.v*",
    SETTINGS_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
)
_TEMPLATES = ("chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja")

_AS_IT_STANDS = {"tokenizer_class": "PreTrainedTokenizerFast"}
"""The class that runs tokenizer.json as it is, under the name that transformers 4 and 5 know."""
_AS_IT_STANDS_IN_EVERY_FAMILY = {**_AS_IT_STANDS, "trust_remote_code": True}
"""For qwen2, whose class and splitting rules transformers puts in the place of any that are named.

`TokenizersBackend.convert_to_native_format`, transformers 5.24, keeps to the file if it is given this flag, which
reaches it from tokenizer_config.json. No code is loaded because of it: that is decided by the caller alone.
"""

PROBE_TEXTS = (
    "Hello  world, it's 1234567 o'clock – naïve café\n\n\tdef f(x):\r\n        return x ** 2  # {}\n",
    " 漢字かな交じり文 🙂👩‍👩‍👧 Привет, \u0041\u030a \u00a0\u3000end ",
)
"""Spaces, digits, contractions, code, scripts, joined and combining characters: where tokenizers part ways."""
_MOST_SPECIAL_TOKENS = 300


def copy_tokenizer(source: Path, folder: Path) -> list[str]:
    """Copy the files that make up a Hugging Face tokenizer, chat templates included.

    Args:
        source: A model or tokenizer folder.
        folder: An existing folder.

    Returns:
        Names of the files copied; empty if `source` holds no tokenizer.
    """
    if not any((source / name).is_file() for name in _VOCABULARY_FILES):
        return []
    # Our byte tokenizer comes back as what it is, not as the tokenizer.json that an export wrote for other readers.
    patterns = (MARKER_FILE, *_TEMPLATES) if (source / MARKER_FILE).is_file() else (*_FILES, *_TEMPLATES)
    names = [str(file.relative_to(source)) for pattern in patterns for file in sorted(source.glob(pattern))]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    return names


def give_back_tokenizer(carried: Path, folder: Path, *, model_max_length: int | None) -> bool:
    """Write a checkpoint's tokenizer into a folder such that transformers' AutoTokenizer gives the ids that it gives.

    Its files stay as they are wherever that does it. Otherwise tokenizer_config.json names the class that runs
    tokenizer.json as it is, and a tokenizer of another kind, or one that its class rebuilds, is written as a
    tokenizer.json.

    Args:
        carried: The tokenizer that the checkpoint carries.
        folder: A folder that has its config.json already, on which the choice of a class depends.
        model_max_length: Replaces what tokenizer_config.json says; None leaves that as it is.

    Returns:
        Whether the ids are the same.

    Raises:
        ConversionError: Transformers cannot load the tokenizer, in whatever form.
    """
    tokenizer = load_tokenizer(carried)
    shutil.copytree(
        carried,
        folder,
        ignore=shutil.ignore_patterns(CONFIG_FILE),  # of the import; the folder has its own
        copy_function=shutil.copyfile,
        dirs_exist_ok=True,
    )
    settings = _settings(folder)
    if model_max_length is not None and settings.get("model_max_length") != model_max_length:
        settings["model_max_length"] = model_max_length
        write_json(folder / SETTINGS_FILE, settings)
    problem: ConversionError | None = None
    for _ in _write_forms(tokenizer, folder, settings):
        try:
            if gives_same_ids(tokenizer, folder):
                return True
            problem = None
        except ConversionError as error:
            problem = error
    if problem is not None:
        raise problem
    return False


def _write_forms(tokenizer: Tokenizer, folder: Path, settings: Mapping[str, object]) -> Iterator[None]:
    """Write the forms that a tokenizer may have in a folder, each when it is asked for, the least changed one first."""
    yield
    yield from _write_classes(folder, settings)
    if tokenizer.kind == "hugging_face":  # its ids are not those of the files as they are: a class rebuilds it
        tokenizer.save(folder)
        length = {key: value for key, value in settings.items() if key == "model_max_length"}
        settings = {**_settings(folder), **length}
        write_json(folder / SETTINGS_FILE, settings)
        yield
    elif not (folder / TOKENIZER_JSON).is_file():
        settings = {**write_tokenizer_json(tokenizer, folder), **settings}
    else:
        return
    yield from _write_classes(folder, settings)


def _write_classes(folder: Path, settings: Mapping[str, object]) -> Iterator[None]:
    for changes in (_AS_IT_STANDS, _AS_IT_STANDS_IN_EVERY_FAMILY):
        if changes.items() - settings.items():
            write_json(folder / SETTINGS_FILE, {**settings, **changes})
            yield


def gives_same_ids(tokenizer: Tokenizer, folder: Path) -> bool:
    """Compare the ids of a tokenizer with those of the one that transformers loads from a folder.

    Raises:
        ConversionError: Transformers cannot load one.
    """
    texts = list(PROBE_TEXTS)
    if tokenizer.kind == "hugging_face":  # the others take the text of a special token for ordinary text
        special = [tokenizer.decode([token]) for token in sorted(tokenizer.special_ids)[:_MOST_SPECIAL_TOKENS]]
        texts += [f"a {token} b{token}{token}\nc" for token in special]
    return transformers_ids(folder, texts) == tokenizer.encode_batch(texts)


def transformers_ids(folder: Path, texts: list[str]) -> list[list[int]]:
    """Encode texts with the tokenizer that transformers loads from a folder, nothing added at their ends.

    Raises:
        ConversionError: Transformers cannot load one.
    """
    from transformers import AutoTokenizer

    with reported(f"transformers cannot load the tokenizer in {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def _settings(folder: Path) -> dict[str, object]:
    file = folder / SETTINGS_FILE
    return read_json(file) if file.is_file() else {}
