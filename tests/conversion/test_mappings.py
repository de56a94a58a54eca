"""Every mapping is undone exactly by its inverse, and puts each row where megatron-core looks for it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_7b.conversion.mappings import Direct, GateUp, QueryKeyValue, TensorMapping, Vocabulary, pad_vocabulary
from megatron_7b.errors import ConversionError

SIZES = st.integers(1, 6)


@st.composite
def mappings(draw: st.DrawFn) -> TensorMapping:
    groups = draw(SIZES)
    heads = groups * draw(SIZES)
    columns = draw(st.none() | SIZES)
    return draw(
        st.sampled_from(
            [
                Direct((draw(SIZES), draw(SIZES))),
                Vocabulary(draw(SIZES), draw(SIZES)),
                GateUp(draw(SIZES), draw(SIZES)),
                QueryKeyValue(heads, groups, draw(SIZES), columns),
            ]
        )
    )


def numbered(shape: tuple[int, ...]) -> Tensor:
    """A tensor whose every element is different."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


@given(mappings())
def test_there_and_back(mapping: TensorMapping):
    canonical = numbered(mapping.canonical_shape)
    parts = mapping.to_hugging_face(canonical)
    assert tuple(tuple(part.shape) for part in parts) == mapping.hugging_face_shapes
    assert torch.equal(mapping.from_hugging_face(*parts), canonical)


@given(mappings(), st.integers(0, 2**31))
def test_back_and_there(mapping: TensorMapping, seed: int):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(shape, generator=generator).bfloat16() for shape in mapping.hugging_face_shapes]
    for before, after in zip(parts, mapping.to_hugging_face(mapping.from_hugging_face(*parts)), strict=True):
        assert after.dtype == before.dtype
        assert torch.equal(after, before)


@given(groups=SIZES, per_group=SIZES, width=SIZES, columns=st.none() | SIZES)
def test_query_groups_are_interleaved(groups: int, per_group: int, width: int, columns: int | None):
    mapping = QueryKeyValue(groups * per_group, groups, width, columns)
    query, key, value = (numbered(shape) + 1000 * i for i, shape in enumerate(mapping.hugging_face_shapes))
    rows = iter(mapping.from_hugging_face(query, key, value))
    for group in range(groups):
        for head in range(group * per_group, (group + 1) * per_group):
            for channel in range(width):
                assert torch.equal(next(rows), query[head * width + channel])
        for source in (key, value):
            for channel in range(width):
                assert torch.equal(next(rows), source[group * width + channel])
    assert next(rows, None) is None


def test_gate_rows_come_first():
    gate, up = torch.zeros(3, 2), torch.ones(3, 2)
    assert torch.equal(GateUp(3, 2).from_hugging_face(gate, up)[:, 0], torch.tensor([0.0, 0, 0, 1, 1, 1]))


@given(vocab_size=SIZES, hidden_size=SIZES, padding=st.integers(0, 5))
def test_vocabulary_padding_never_leaks(vocab_size: int, hidden_size: int, padding: int):
    mapping = Vocabulary(vocab_size, hidden_size)
    true = numbered((vocab_size, hidden_size))
    padded = pad_vocabulary(true, vocab_size + padding)
    assert padded.shape[0] == vocab_size + padding
    assert not padded[vocab_size:].any()
    (exported,) = mapping.to_hugging_face(padded)
    assert torch.equal(exported, true)


@pytest.mark.parametrize(
    "mapping",
    [Direct((4, 3)), Vocabulary(4, 3), GateUp(2, 3), QueryKeyValue(2, 1, 1, 3)],
    ids=lambda m: type(m).__name__,
)
def test_wrong_shapes_are_refused(mapping: TensorMapping):
    with pytest.raises(ConversionError, match=r"shape \[3, 3\]"):
        mapping.to_hugging_face(torch.zeros(3, 3))
    with pytest.raises(ConversionError, match=r"shape \[4, 2\]"):
        mapping.from_hugging_face(*(torch.zeros(4, 2) for _ in mapping.hugging_face_shapes))
    with pytest.raises(ConversionError, match="tensors given"):
        mapping.from_hugging_face()
    with pytest.raises(ConversionError, match="cannot be padded to 3"):
        pad_vocabulary(torch.zeros(4, 3), 3)
