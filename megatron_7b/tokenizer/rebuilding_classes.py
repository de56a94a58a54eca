"""Classes of transformers that take vocabulary and merges from a tokenizer.json and build the rest themselves.

Known here are those whose rules most byte-level folders follow anyway, so that nobody has to be asked for these.
Source: transformers 5.24, `models/gpt2/tokenization_gpt2.py` and `models/qwen2/tokenization_qwen2.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_7b.tokenizer.definition import token_content

_END = "<|endoftext|>"
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PLAIN_MODEL: dict[str, Any] = {
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "",
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
_PLAIN_TOKEN: dict[str, Any] = {
    "lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Rules:
    """What a class builds."""

    normalizer: Mapping[str, Any] | None
    pre_tokenizer: Mapping[str, Any]
    """`trim_offsets`, which has no part in ids, left out."""
    roles: Mapping[str, str | None]
    """The tokens that it adds if the settings do not name others."""
    adds_special_again: bool = False
    """Special tokens lose the flags that they may have."""


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


REBUILDING_CLASSES: dict[str, _Rules] = {
    "GPT2Tokenizer": _Rules(
        normalizer=None,
        pre_tokenizer=_byte_level(use_regex=True),
        roles={"unk_token": _END, "bos_token": _END, "eos_token": _END, "pad_token": None},
    ),
    "Qwen2Tokenizer": _Rules(
        normalizer={"type": "NFC"},
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _QWEN_WORDS}, "behavior": "Isolated", "invert": False},
                _byte_level(use_regex=False),
            ],
        },
        roles={"unk_token": _END, "bos_token": None, "eos_token": _END, "pad_token": _END},
        adds_special_again=True,
    ),
}


def why_rebuilt_otherwise(name: str, definition: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """Return why a class builds another tokenizer than tokenizer.json describes, in words; None if it is the same.

    Args:
        name: One of `REBUILDING_CLASSES`.
        definition: The tokenizer.json.
        settings: tokenizer_config.json under special_tokens_map.json, all of whose tokens are in tokenizer.json.
    """
    rules = REBUILDING_CLASSES[name]
    model = {key: value for key, value in definition["model"].items() if key not in ("type", "vocab", "merges")}
    found = _PLAIN_MODEL | {
        key: "" if value is None and _PLAIN_MODEL.get(key) == "" else value for key, value in model.items()
    }
    if definition["model"].get("type") != "BPE" or found != _PLAIN_MODEL:
        return f"the class {name} builds another model than tokenizer.json has"
    if definition.get("normalizer") != rules.normalizer:
        return f"the class {name} normalizes text by rules of its own"
    if _without_offsets(definition.get("pre_tokenizer")) != rules.pre_tokenizer:
        return f"the class {name} splits text by rules of its own"
    return None if _adds_the_same(rules, definition, settings) else f"the class {name} adds tokens by rules of its own"


def _without_offsets(pre_tokenizer: object) -> object:
    """Return a pre-tokenizer without what only offsets depend on, with the default that old files leave out."""
    if isinstance(pre_tokenizer, list):
        return [_without_offsets(step) for step in pre_tokenizer]
    if not isinstance(pre_tokenizer, dict):
        return pre_tokenizer
    kept = {key: _without_offsets(value) for key, value in pre_tokenizer.items() if key != "trim_offsets"}
    return {"use_regex": True, **kept} if kept.get("type") == "ByteLevel" else kept


def _adds_the_same(rules: _Rules, definition: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Return whether the added tokens of tokenizer.json come out with the ids and flags that they have there."""
    added, vocabulary = definition["added_tokens"], definition["model"]["vocab"]
    known = {token["content"] for token in added}
    roles = {role: token_content(settings[role]) if role in settings else token for role, token in rules.roles.items()}
    if any(token is not None and token not in known for token in roles.values()):
        return False
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict) and len(decoder) != len(added):
        return False
    if rules.adds_special_again and not all(
        _PLAIN_TOKEN.items() <= token.items() for token in added if token["special"]
    ):
        return False
    # They are added one after another, in the order of their ids, after a vocabulary without holes.
    new = sorted(token["id"] for token in added if token["content"] not in vocabulary)
    return (
        sorted(vocabulary.values()) == list(range(len(vocabulary)))
        and new == list(range(len(vocabulary), len(vocabulary) + len(new)))
        and all(vocabulary[token["content"]] == token["id"] for token in added if token["content"] in vocabulary)
    )
