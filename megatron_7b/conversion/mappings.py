"""Typed tensor mappings: how one canonical tensor becomes Hugging Face tensors, and back, exactly.

Each mapping only rearranges rows, so `from_hugging_face(*to_hugging_face(t))` is `t` bit for bit, in any dtype.
Shapes are full (unsharded): `h` hidden, `n` heads, `g` query groups, `d` head width, `v` vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megatron_7b.config.schema import ModelConfig
from megatron_7b.errors import ConversionError
from megatron_7b.model.parameters import Parameter, Shape

if TYPE_CHECKING:
    from torch import Tensor


class TensorMapping(Protocol):
    """One canonical tensor against one or more Hugging Face tensors."""

    @property
    def canonical_shape(self) -> Shape:
        """Shape of the canonical tensor, without vocabulary padding."""
        ...

    @property
    def hugging_face_shapes(self) -> tuple[Shape, ...]:
        """Shapes of the Hugging Face tensors, in the order of their names."""
        ...

    def to_hugging_face(self, tensor: "Tensor") -> "tuple[Tensor, ...]":
        """Split the canonical tensor.

        Raises:
            ConversionError: The tensor does not have `canonical_shape`.
        """
        ...

    def from_hugging_face(self, *parts: "Tensor") -> "Tensor":
        """Join the Hugging Face tensors.

        Raises:
            ConversionError: The parts do not have `hugging_face_shapes`.
        """
        ...


@dataclass(frozen=True)
class Direct:
    """The same tensor under another name."""

    shape: Shape

    @property
    def canonical_shape(self) -> Shape:
        """As given."""
        return self.shape

    @property
    def hugging_face_shapes(self) -> tuple[Shape, ...]:
        """As given, once."""
        return (self.shape,)

    def to_hugging_face(self, tensor: "Tensor") -> "tuple[Tensor, ...]":
        """Hand the tensor on."""
        _check_shape(tensor, self.shape)
        return (tensor,)

    def from_hugging_face(self, *parts: "Tensor") -> "Tensor":
        """Hand the tensor on."""
        _check_shapes(parts, self.hugging_face_shapes)
        return parts[0]


@dataclass(frozen=True)
class Vocabulary:
    """A tensor of one row per token; the canonical one may carry padding rows for tensor parallelism at its end."""

    vocab_size: int
    hidden_size: int | None
    """Width of a row; None for a bias, a vector."""

    @property
    def canonical_shape(self) -> Shape:
        """`[v, h]` of the true vocabulary, or `[v]`."""
        return (self.vocab_size,) if self.hidden_size is None else (self.vocab_size, self.hidden_size)

    @property
    def hugging_face_shapes(self) -> tuple[Shape, ...]:
        """The same, once."""
        return (self.canonical_shape,)

    def to_hugging_face(self, tensor: "Tensor") -> "tuple[Tensor, ...]":
        """Drop the padding rows, so that they never leak into an export."""
        expected = self.canonical_shape
        if tuple(tensor.shape[1:]) != expected[1:] or tensor.dim() == 0 or tensor.shape[0] < self.vocab_size:
            raise ConversionError(
                f"an embedding has shape {list(tensor.shape)}, expected {list(expected)} or more rows"
            )
        return (tensor[: self.vocab_size],)

    def from_hugging_face(self, *parts: "Tensor") -> "Tensor":
        """Hand the tensor on, unpadded: padding depends on the layout that loads it."""
        _check_shapes(parts, self.hugging_face_shapes)
        return parts[0]


@dataclass(frozen=True)
class QueryKeyValue:
    """Query, key and value projections against megatron-core's one matrix, interleaved per query group.

    Without query heads: the key and value projections of a cross-attention.

    Rows of the canonical tensor: for every query group its n/g query heads, then its key head, then its value head, so
    that a tensor-parallel shard holds whole groups. Both sides use rotate-half rotary embeddings: no permutation.

    Source: `megatron.core.transformer.attention.SelfAttention.get_query_key_value_tensors`, 0.19.
    """

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    """Width `d` of one head."""
    columns: int | None
    """Input width of the weight; None for the bias, a vector."""

    @property
    def canonical_shape(self) -> Shape:
        """`[(n + 2g) d, h]`, or `[(n + 2g) d]` for the bias."""
        return ((self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels, *self._tail)

    @property
    def hugging_face_shapes(self) -> tuple[Shape, ...]:
        """`[n d, h], [g d, h], [g d, h]`, without `h` for the biases, without the first if there are no query heads."""
        query = self.num_attention_heads * self.kv_channels
        key = self.num_query_groups * self.kv_channels
        return tuple((rows, *self._tail) for rows in (query, key, key) if rows)

    @property
    def _tail(self) -> Shape:
        return () if self.columns is None else (self.columns,)

    @property
    def _rows_per_group(self) -> tuple[int, ...]:
        queries = self.num_attention_heads // self.num_query_groups
        return tuple(heads * self.kv_channels for heads in (queries, 1, 1) if heads)

    def to_hugging_face(self, tensor: "Tensor") -> "tuple[Tensor, ...]":
        """Split into query, key, value."""
        _check_shape(tensor, self.canonical_shape)
        grouped = tensor.reshape(self.num_query_groups, sum(self._rows_per_group), *self._tail)
        parts = grouped.split_with_sizes(list(self._rows_per_group), dim=1)
        return tuple(part.reshape(shape) for part, shape in zip(parts, self.hugging_face_shapes, strict=True))

    def from_hugging_face(self, *parts: "Tensor") -> "Tensor":
        """Join query, key, value."""
        _check_shapes(parts, self.hugging_face_shapes)
        grouped = [
            part.reshape(self.num_query_groups, rows, *self._tail)
            for part, rows in zip(parts, self._rows_per_group, strict=True)
        ]
        return _joined(grouped, dim=1).reshape(self.canonical_shape)


@dataclass(frozen=True)
class GateUp:
    """SwiGLU's gate and up projections against megatron-core's one matrix: all gate rows, then all up rows."""

    ffn_hidden_size: int
    hidden_size: int

    @property
    def canonical_shape(self) -> Shape:
        """`[2 ffn, h]`."""
        return (2 * self.ffn_hidden_size, self.hidden_size)

    @property
    def hugging_face_shapes(self) -> tuple[Shape, ...]:
        """`[ffn, h]` twice."""
        return ((self.ffn_hidden_size, self.hidden_size),) * 2

    def to_hugging_face(self, tensor: "Tensor") -> "tuple[Tensor, ...]":
        """Split into gate, up."""
        _check_shape(tensor, self.canonical_shape)
        return tuple(tensor.split_with_sizes([self.ffn_hidden_size] * 2))

    def from_hugging_face(self, *parts: "Tensor") -> "Tensor":
        """Join gate, up."""
        _check_shapes(parts, self.hugging_face_shapes)
        return _joined(parts)


@dataclass(frozen=True)
class Concatenated:
    """Several Hugging Face tensors that are stored as one, one after the other along their rows."""

    parts: TensorMapping

    @property
    def canonical_shape(self) -> Shape:
        """That of the parts' mapping."""
        return self.parts.canonical_shape

    @property
    def hugging_face_shapes(self) -> tuple[Shape, ...]:
        """One shape with the rows of all parts."""
        shapes = self.parts.hugging_face_shapes
        return ((sum(shape[0] for shape in shapes), *shapes[0][1:]),)

    def to_hugging_face(self, tensor: "Tensor") -> "tuple[Tensor, ...]":
        """Split, then join in their order."""
        return (_joined(self.parts.to_hugging_face(tensor)),)

    def from_hugging_face(self, *parts: "Tensor") -> "Tensor":
        """Split in their order, then join."""
        _check_shapes(parts, self.hugging_face_shapes)
        return self.parts.from_hugging_face(
            *parts[0].split_with_sizes([shape[0] for shape in self.parts.hugging_face_shapes])
        )


@dataclass(frozen=True)
class Twice:
    """A tensor that Hugging Face stores under a second name as well, of which nothing is made."""

    first: TensorMapping

    @property
    def canonical_shape(self) -> Shape:
        """That of the one tensor."""
        return self.first.canonical_shape

    @property
    def hugging_face_shapes(self) -> tuple[Shape, ...]:
        """The same shape again."""
        return self.first.hugging_face_shapes * 2

    def to_hugging_face(self, tensor: "Tensor") -> "tuple[Tensor, ...]":
        """Copy it."""
        (part,) = self.first.to_hugging_face(tensor)
        return part, part.clone()

    def from_hugging_face(self, *parts: "Tensor") -> "Tensor":
        """Take the first."""
        _check_shapes(parts, self.hugging_face_shapes)
        return self.first.from_hugging_face(parts[0])


@dataclass(frozen=True)
class Transposed:
    """Weights that Hugging Face stores as [in, out]."""

    plain: TensorMapping

    @property
    def canonical_shape(self) -> Shape:
        """[out, in]."""
        return self.plain.canonical_shape

    @property
    def hugging_face_shapes(self) -> tuple[Shape, ...]:
        """[in, out]."""
        return tuple(shape[::-1] for shape in self.plain.hugging_face_shapes)

    def to_hugging_face(self, tensor: "Tensor") -> "tuple[Tensor, ...]":
        """Turn each part."""
        return tuple(part.t().contiguous() for part in self.plain.to_hugging_face(tensor))

    def from_hugging_face(self, *parts: "Tensor") -> "Tensor":
        """Turn each part back."""
        _check_shapes(parts, self.hugging_face_shapes)
        return self.plain.from_hugging_face(*(part.t() for part in parts)).contiguous()


def build_mapping(parameter: Parameter, model: ModelConfig) -> TensorMapping:
    """Return how a parameter of a model relates to its Hugging Face tensors."""
    mapping = _arranged(parameter, model)
    if len(mapping.hugging_face_shapes) > len(parameter.hugging_face):
        mapping = Concatenated(mapping)
    elif len(mapping.hugging_face_shapes) < len(parameter.hugging_face):
        mapping = Twice(mapping)
    return Transposed(mapping) if parameter.is_transposed else mapping


def _arranged(parameter: Parameter, model: ModelConfig) -> TensorMapping:
    rows, *columns = parameter.shape
    match parameter.arrangement:
        case "plain":
            return Direct(parameter.shape)
        case "vocabulary":
            return Vocabulary(rows, columns[0] if columns else None)
        case "gate_up":
            return GateUp(rows // 2, *columns)
        case "query_key_value" | "key_value" as heads:
            queries = model.num_attention_heads if heads == "query_key_value" else 0
            return QueryKeyValue(queries, model.query_groups, model.head_width, columns[0] if columns else None)


def pad_vocabulary(tensor: "Tensor", num_rows: int) -> "Tensor":
    """Append zero rows, which the loss masks and an export drops.

    Args:
        tensor: `[v, h]` of the true vocabulary.
        num_rows: Rows wanted, at least `v`.

    Returns:
        `[num_rows, h]`, the same tensor where nothing is to be added.

    Raises:
        ConversionError: `num_rows` is smaller than the vocabulary.
    """
    missing = num_rows - tensor.shape[0]
    if missing < 0:
        raise ConversionError(f"a vocabulary of {tensor.shape[0]} rows cannot be padded to {num_rows}")
    if missing == 0:
        return tensor
    return _joined([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])


def _joined(parts: "Sequence[Tensor]", dim: int = 0) -> "Tensor":
    import torch  # only tensors need it: shapes are compared without

    return torch.cat(list(parts), dim=dim)


def _check_shape(tensor: "Tensor", expected: Shape) -> None:
    if tuple(tensor.shape) != expected:
        raise ConversionError(f"a tensor has shape {list(tensor.shape)}, expected {list(expected)}")


def _check_shapes(parts: "Sequence[Tensor]", expected: Sequence[Shape]) -> None:
    if len(parts) != len(expected):
        raise ConversionError(f"{len(parts)} tensors given, expected {len(expected)}")
    for part, shape in zip(parts, expected, strict=True):
        _check_shape(part, shape)
