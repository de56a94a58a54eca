"""Heads as Hugging Face has them: the class of a model with one, and what config.json says of it."""

from collections.abc import Mapping
from typing import Any

from megatron_7b.config.schema import ModelConfig

_SUFFIXES = {
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}
HEAD_NAMES = ("classifier.", "score.", "qa_outputs.")
"""Beginnings of the names of their tensors."""
_POOLER = "bert.pooler."
_USUAL_LABELS = 2
"""As many as transformers assumes where config.json names none."""


def class_of_head(prefix: str, head: str) -> str:
    """Return the class of a family's models with a head; `prefix` begins the names of its classes."""
    return prefix + _SUFFIXES[head]


def head_classes(prefix: str) -> dict[str, str]:
    """Return the head of each class of a family that has one."""
    return {prefix + suffix: head for head, suffix in _SUFFIXES.items()}


def names_of_head(model: ModelConfig) -> tuple[str, ...]:
    """Return the beginnings of the names of a head's tensors, each of which a folder may lack."""
    pooled = model.traits.kind == "encoder" and model.head == "sequence_classification"
    return (*HEAD_NAMES, _POOLER) if pooled else HEAD_NAMES


def read_head(config: Mapping[str, Any], head: str) -> tuple[dict[str, object], list[str]]:
    """Return the fields of the model section that describe a head, and what is wrong with it.

    Args:
        config: Parsed config.json.
        head: What its class has.
    """
    if head == "question_answering":
        return {"head": head}, []
    named = config.get("id2label")
    names = named if isinstance(named, Mapping) else {}
    try:
        labels = tuple(str(names[key]) for key in sorted(names, key=int))
        is_complete = sorted(map(int, names)) == list(range(len(names)))
    except ValueError:
        is_complete = False
    if not is_complete:
        return {}, [f"id2label has the keys {list(names)!r}, expected 0, 1, 2, …"]
    count = len(labels) or config.get("num_labels", _USUAL_LABELS)
    kind = config.get("problem_type") or ("regression" if count == 1 else "single_label_classification")
    if head != "sequence_classification":
        kind = "single_label_classification"
    if kind not in ("single_label_classification", "multi_label_classification", "regression"):
        return {}, [f"problem_type is {kind!r}, which is not known"]
    if kind == "regression":
        labels = ()
    return {"head": head, "num_labels": count, "labels": labels, "problem_type": kind}, []


def write_head(model: ModelConfig) -> dict[str, object]:
    """Return the keys of config.json that describe a head; none if the model has none."""
    if not model.has_head or model.head == "question_answering":
        return {}
    labels = model.labels or tuple(f"LABEL_{number}" for number in range(model.num_labels))
    keys: dict[str, object] = {
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
    }
    return {**keys, "problem_type": model.problem_type} if model.head == "sequence_classification" else keys
