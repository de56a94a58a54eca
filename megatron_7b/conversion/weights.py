"""Streams of weights between canonical names and Hugging Face names, one tensor in memory at a time.

Both directions refuse a missing, unexpected or misshapen tensor: nothing is skipped silently.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_7b.config.schema import ModelConfig
from megatron_7b.conversion.mappings import TensorMapping, build_mapping, pad_vocabulary
from megatron_7b.errors import ConversionError
from megatron_7b.model.kinds import parameter_table
from megatron_7b.model.parameters import Parameter, Shape

if TYPE_CHECKING:
    from torch import Tensor

_MAX_NAMES_LISTED = 12
_DERIVED_SUFFIX = "rotary_emb.inv_freq"
"""A buffer that old exports carry and every model computes from its configuration."""


@dataclass(frozen=True)
class PlannedTensor:
    """A parameter of the model, and how its Hugging Face tensors are made from it and it from them."""

    parameter: Parameter
    mapping: TensorMapping

    @property
    def canonical(self) -> str:
        """Name in checkpoints."""
        return self.parameter.name

    @property
    def hugging_face(self) -> tuple[str, ...]:
        """Names in the Hugging Face folder."""
        return self.parameter.hugging_face


def plan_weights(model: ModelConfig, vocab_size: int) -> tuple[PlannedTensor, ...]:
    """List every tensor of a model in the order of the forward pass.

    Args:
        model: Shape of the model.
        vocab_size: True vocabulary size.
    """
    table = parameter_table(model, vocab_size)
    return tuple(PlannedTensor(parameter, build_mapping(parameter, model)) for parameter in table.values())


def to_hugging_face(
    canonical: "Mapping[str, Tensor]", model: ModelConfig, vocab_size: int
) -> "Iterator[tuple[str, Tensor]]":
    """Rename and split canonical weights.

    Args:
        canonical: Full tensors by canonical name, possibly lazy; embeddings may have padding rows at their end.
        model: Shape of the model.
        vocab_size: True vocabulary size; rows beyond it are dropped.

    Yields:
        Name and tensor in the order of `plan_weights`; the tensors may be views of the canonical ones.

    Raises:
        ConversionError: Tensors are missing, unexpected (all are named) or misshapen.
    """
    plan = plan_weights(model, vocab_size)
    _check_names(canonical, (entry.canonical for entry in plan), "the checkpoint")
    for entry in plan:
        parts = _with_name(entry.canonical, entry.mapping.to_hugging_face, canonical[entry.canonical])
        yield from zip(entry.hugging_face, parts, strict=True)


def from_hugging_face(
    weights: "Mapping[str, Tensor]", model: ModelConfig, vocab_size: int, *, padded_vocab_size: int | None = None
) -> "Iterator[tuple[str, Tensor]]":
    """Rename and join Hugging Face weights.

    Args:
        weights: Tensors by Hugging Face name, possibly lazy.
        model: Shape of the model.
        vocab_size: True vocabulary size.
        padded_vocab_size: Rows of the embeddings wanted, filled up with zeros; None keeps the true size.

    Yields:
        Canonical name and full tensor in the order of `plan_weights`.

    Raises:
        ConversionError: Tensors are missing, unexpected (all are named) or misshapen, or an output layer that the
            configuration calls tied differs from the embedding.
    """
    plan = plan_weights(model, vocab_size)
    redundant = _redundant_names(weights, plan)
    expected = [name for entry in plan for name in entry.hugging_face]
    _check_names((name for name in weights if name not in redundant), expected, "the Hugging Face folder")
    _check_repeated(weights, plan)
    for entry in plan:
        parts = (weights[name] for name in entry.hugging_face)
        tensor = _with_name(", ".join(entry.hugging_face), entry.mapping.from_hugging_face, *parts)
        if padded_vocab_size is not None and entry.parameter.is_padded:
            tensor = pad_vocabulary(tensor, padded_vocab_size)
        yield entry.canonical, tensor


def check_hugging_face_shapes(shapes: Mapping[str, Shape], model: ModelConfig, vocab_size: int) -> None:
    """Compare the tensors of a folder with what its configuration promises, before any is read.

    Args:
        shapes: Shape by Hugging Face name.
        model: Shape of the model.
        vocab_size: True vocabulary size.

    Raises:
        ConversionError: Tensors are missing, unexpected or misshapen; all are named.
    """
    plan, expected = plan_weights(model, vocab_size), dict[str, Shape]()
    for entry in plan:
        expected.update(zip(entry.hugging_face, entry.mapping.hugging_face_shapes, strict=True))
    redundant = _redundant_names(shapes, plan)
    _check_names((name for name in shapes if name not in redundant), expected, "the Hugging Face folder")
    wrong = [
        f"{name} is {list(shapes[name])}, config.json makes it {list(shape)}"
        for name, shape in expected.items()
        if shapes[name] != shape
    ]
    if wrong:
        raise ConversionError("tensors do not fit config.json:\n  " + "\n  ".join(_shortened(wrong)))


def _redundant_names(names: Iterable[str], plan: Iterable[PlannedTensor]) -> frozenset[str]:
    """Return the names that repeat what other tensors or the configuration already say."""
    repeated = {name for entry in plan for name in entry.parameter.repeated_as}
    return frozenset(name for name in names if name.endswith(_DERIVED_SUFFIX) or name in repeated)


def _check_repeated(weights: "Mapping[str, Tensor]", plan: Iterable[PlannedTensor]) -> None:
    """Refuse a folder that holds one tensor under two names with different values."""
    for entry in plan:
        for name in entry.parameter.repeated_as:
            (original,) = entry.hugging_face
            if name in weights and not weights[name].equal(weights[original]):
                raise ConversionError(
                    f"config.json ties the output layer to the embedding, but {name} differs from {original}",
                    hint='set "tie_word_embeddings": false in config.json if the separate output layer is meant',
                )


def _check_names(found: Iterable[str], expected: Iterable[str], where: str) -> None:
    found_names, expected_names = set(found), list(expected)
    missing = [name for name in expected_names if name not in found_names]
    unexpected = sorted(found_names.difference(expected_names))
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing:\n  " + "\n  ".join(_shortened(missing)))
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected:\n  " + "\n  ".join(_shortened(unexpected)))
    if problems:
        raise ConversionError(f"the tensors of {where} do not fit its configuration; " + "\n".join(problems))


def _shortened(lines: list[str]) -> list[str]:
    if len(lines) <= _MAX_NAMES_LISTED:
        return lines
    return [*lines[:_MAX_NAMES_LISTED], f"and {len(lines) - _MAX_NAMES_LISTED} more"]


def _with_name[**P, R](name: str, convert: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a mapping, adding the tensor's name to what it complains about."""
    try:
        return convert(*args, **kwargs)
    except ConversionError as error:
        raise ConversionError(f"{name}: {error}") from None
