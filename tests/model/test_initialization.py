"""Initial weights depend on seed and name only: any shard is a part of the same whole."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.config.schema import ModelConfig
from megatron_7b.model.initialization import draw_rows, initial_shard
from megatron_7b.model.names import parameter_kind, parameter_shapes

MODEL = ModelConfig(
    num_layers=2, hidden_size=48, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=4, vocab_size=120,
    add_qkv_bias=True, qk_layernorm=True,
)  # fmt: skip


def shard(name: str, shape: tuple[int, ...], rank: int, size: int, *, seed: int = 1, vocab: int = 120) -> torch.Tensor:
    kind = parameter_kind(name)
    return initial_shard(name, kind, shape, model=MODEL, seed=seed, tp_rank=rank, tp_size=size, vocab_size=vocab)


@pytest.mark.parametrize(("name", "shape"), list(parameter_shapes(MODEL, 120)))
@pytest.mark.parametrize("size", [2, 4])
def test_shards_are_parts_of_the_whole(name: str, shape: tuple[int, ...], size: int) -> None:
    whole, kind = shard(name, shape, 0, 1), parameter_kind(name)
    assert tuple(whole.shape) == shape
    parts = [shard(name, shape, rank, size) for rank in range(size)]
    if kind.tp_dim is None:
        assert all(torch.equal(part, whole) for part in parts)
    elif kind.gated:
        gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
        assert torch.equal(torch.cat([*gates, *ups]), whole)
    else:
        assert torch.equal(torch.cat(parts, dim=kind.tp_dim), whole)


@given(st.integers(1, 3000), st.data())
def test_rows_do_not_depend_on_what_else_is_drawn(width: int, data: st.DataObject) -> None:
    rows_per_block = (1 << 20) // width
    first = data.draw(st.integers(0, 3 * rows_per_block))
    last = data.draw(st.integers(first + 1, first + 5))
    some = draw_rows("x.weight", width, first, last, seed=9, std=1.0)
    more = draw_rows("x.weight", width, max(0, first - 2), last + 1, seed=9, std=1.0)
    assert torch.equal(more[first - max(0, first - 2) :][: last - first], some)


def test_padding_is_zero_and_changes_nothing_else() -> None:
    name = "embedding.word_embeddings.weight"
    padded = shard(name, (128, 48), 0, 1)
    assert torch.equal(padded[:120], shard(name, (120, 48), 0, 1))
    assert not padded[120:].any()
    assert not shard(name, (128, 48), 15, 16).any()  # the last of 16 ranks holds padding only


def test_seeds_names_and_widths_differ() -> None:
    shapes = dict(parameter_shapes(MODEL, 120))
    first, second = (f"decoder.layers.{layer}.self_attention.linear_proj.weight" for layer in (0, 2))
    assert not torch.equal(shard(first, shapes[first], 0, 1), shard(second, shapes[second], 0, 1))
    assert not torch.equal(shard(first, shapes[first], 0, 1), shard(first, shapes[first], 0, 1, seed=2))
    rows = draw_rows("wide", 1024, 0, 2048, seed=1, std=0.02)
    assert rows.std().item() == pytest.approx(0.02, rel=0.01)
    assert rows.mean().item() == pytest.approx(0.0, abs=1e-4)
    narrow = shard("decoder.layers.1.mlp.linear_fc2.weight", (48, 96), 0, 1)
    assert narrow.std().item() == pytest.approx(0.02 / math.sqrt(4), rel=0.05)
