"""Whether tokenizer.json alone says which ids AutoTokenizer gives, seen from the files, without transformers.

transformers adds tokens that are declared beside tokenizer.json, and many of its classes rebuild the tokenizer by rules
of their own. For a folder without any of this, nobody has to be asked, which takes seconds. Whatever is not known here
to be harmless counts as a reason to ask. Source: transformers 5.24, `models/auto/tokenization_auto.py`,
`tokenization_utils_base.py: _from_pretrained`, `tokenization_utils_tokenizers.py`; the tests compare with the release
that is installed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_7b.tokenizer.definition import CONFIG_FILE, read_object_if_there, token_content
from megatron_7b.tokenizer.rebuilding_classes import REBUILDING_CLASSES, why_rebuilt_otherwise

SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
MODEL_FILE = "config.json"
DECLARING_FILES = (CONFIG_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE)

BACKEND = "TokenizersBackend"
"""The class that runs a tokenizer.json as it is; by its older names too."""
_BACKEND_NAMES = (BACKEND, "PreTrainedTokenizer")

CLASS_OF_MODEL: dict[str, str | None] = {
    "bert": "BertTokenizer",
    "gemma": "GemmaTokenizer",
    "gpt2": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "granite": BACKEND,
    "llama": None,
    "mistral": BACKEND,
    "mixtral": BACKEND,
    "olmo2": BACKEND,
    "qwen2": "Qwen2Tokenizer",
    "qwen2_moe": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
}
"""What transformers registers for a model_type; None: nothing, so that the folder's own word counts."""
OVERRULED_MODELS = ("qwen2",)
"""For these the class of the model is taken, whatever the folder says."""

_LISTS = ("additional_special_tokens", "extra_special_tokens")
HARMLESS_SETTINGS = frozenset({
    "add_bos_token", "add_eos_token", "add_prefix_space", "backend", "chat_template",
    "clean_up_tokenization_spaces", "do_lower_case", "errors", "is_local", "legacy", "local_files_only", "max_len",
    "max_length", "model_input_names", "model_max_length", "name_or_path", "never_split", "pad_to_multiple_of",
    "pad_token_type_id", "padding_side", "processor_class", "response_schema", "sp_model_kwargs",
    "spaces_between_special_tokens", "special_tokens_map_file", "split_special_tokens", "stride", "strip_accents",
    "tokenize_chinese_chars", "tokenizer_class", "tokenizer_file", "trim_offsets", "truncation_side",
    "truncation_strategy", "transformers_version", "use_default_system_prompt", "use_fast",
})  # fmt: skip
"""Settings that do not change ids if a class runs tokenizer.json as it is, or that are followed here."""


@dataclass(frozen=True, kw_only=True)
class Declarations:
    """What the files beside a vocabulary say."""

    settings: Mapping[str, Any]
    """tokenizer_config.json, under special_tokens_map.json if transformers reads that."""
    added_ids: Mapping[str, Any]
    """added_tokens.json, if transformers reads it: text to id."""
    model: Mapping[str, Any]
    """config.json."""
    tokens: tuple[str, ...] = ()
    """Texts of all tokens that the files name, in any of the ways that transformers reads."""
    has_tekken: bool = False
    """mistral-common's own vocabulary is there, which goes first if that library is installed."""

    @property
    def is_empty(self) -> bool:
        """There is nothing of transformers'."""
        return not (self.settings or self.added_ids or self.model.get("model_type"))


def read_declarations(folder: Path) -> Declarations:
    """Read the files beside a vocabulary, with transformers' precedence.

    Raises:
        DataFormatError: One of them is not a JSON object.
    """
    settings = read_object_if_there(folder / CONFIG_FILE)
    special, added = (
        read_object_if_there(folder / SPECIAL_TOKENS_FILE),
        read_object_if_there(folder / ADDED_TOKENS_FILE),
    )
    if "added_tokens_decoder" in settings:
        special = added = {}
    return Declarations(
        settings=settings | special,
        added_ids=added,
        tokens=tuple(dict.fromkeys([*_named_tokens(settings), *_named_tokens(special), *added])),
        model=read_object_if_there(folder / MODEL_FILE),
        has_tekken=(folder / "tekken.json").is_file(),
    )


def why_not_settled(definition: Mapping[str, Any], declared: Declarations, *, byte_level: bool) -> str | None:
    """Return why AutoTokenizer may give other ids than a tokenizer.json, in words; None if it does not.

    Args:
        definition: The tokenizer.json.
        declared: What the files beside it say.
        byte_level: Its text has the word "ByteLevel", which transformers looks for.
    """
    if declared.is_empty:
        return None
    name = find_class(declared, byte_level=byte_level)
    if name is None:
        return f"{MODEL_FILE} is of model_type {declared.model.get('model_type')!r}"
    if reason := _why_tokens_differ(definition, declared) or _why_settings_matter(declared, name):
        return reason
    if name == BACKEND:
        return None
    if name not in REBUILDING_CLASSES:
        return f"the class {name} may split text by rules of its own"
    return why_rebuilt_otherwise(name, definition, declared.settings)


def find_class(declared: Declarations, *, byte_level: bool) -> str | None:
    """Return the class that AutoTokenizer takes, without `Fast`; None if only transformers knows."""
    model_type = declared.model.get("model_type")
    said = declared.settings.get("tokenizer_class") or declared.model.get("tokenizer_class")
    said = said.removesuffix("Fast") if isinstance(said, str) else None
    said = BACKEND if said in _BACKEND_NAMES else said
    if model_type is not None and (model_type not in CLASS_OF_MODEL or declared.has_tekken):
        return None
    registered = CLASS_OF_MODEL.get(model_type or "")
    overruled = model_type in OVERRULED_MODELS
    if said == "LlamaTokenizer" and byte_level and not overruled:
        return BACKEND
    if overruled or registered == BACKEND or said is None:
        return registered or BACKEND
    return said


def _why_tokens_differ(definition: Mapping[str, Any], declared: Declarations) -> str | None:
    added = {token["content"]: token for token in definition["added_tokens"]}
    if missing := [token for token in declared.tokens if token not in added]:
        return f"tokens are declared that the added tokens of tokenizer.json lack: {', '.join(missing[:5])}"
    moved = [token for token, index in declared.added_ids.items() if added[token]["id"] != index]
    decoder = declared.settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        moved += [
            str(token_content(token))
            for index, token in decoder.items()
            if not _is_same_token(added[token_content(token) or ""], index, token)
        ]
    return f"tokens are declared otherwise than in tokenizer.json: {', '.join(moved[:5])}" if moved else None


def _is_same_token(known: Mapping[str, Any], index: str, declared: Mapping[str, Any]) -> bool:
    """Return whether a token of `added_tokens_decoder` is one of tokenizer.json, flags included."""
    special = bool(declared.get("special", False))
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": not special, "special": False}
    return str(known["id"]) == index and all(
        bool(declared.get(flag, default)) == bool(known.get(flag, default)) for flag, default in flags.items()
    )


def _named_tokens(settings: Mapping[str, Any]) -> list[str]:
    values: list[object] = [value for key, value in settings.items() if key.endswith("_token")]
    for name in _LISTS:
        several = settings.get(name)
        values += several.values() if isinstance(several, dict) else several if isinstance(several, list) else ()
    decoder = settings.get("added_tokens_decoder")
    values += decoder.values() if isinstance(decoder, dict) else ()
    return [content for content in map(token_content, values) if content is not None]


def _why_settings_matter(declared: Declarations, name: str) -> str | None:
    prefixed = name != BACKEND and declared.settings.get("add_prefix_space")
    harmless = HARMLESS_SETTINGS - ({"add_prefix_space"} if prefixed else set())
    unknown = [
        key
        for key, value in declared.settings.items()
        if value is not None
        and key not in harmless
        and not key.endswith("_token")
        and key not in (*_LISTS, "added_tokens_decoder")
    ]
    return f"settings may change what is encoded: {', '.join(sorted(unknown)[:5])}" if unknown else None
