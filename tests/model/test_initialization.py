"""Initial weights depend on seed and name only: any shard is a part of the same whole."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.config.schema import ModelConfig
from megatron_7b.model.initialization import draw_rows, initial_shard
from megatron_7b.model.kinds import parameter_table
from megatron_7b.model.parameters import Parameter

MODEL = ModelConfig(
    num_layers=2, hidden_size=48, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=4, vocab_size=120,
    add_qkv_bias=True, qk_layernorm=True,
)  # fmt: skip


TABLE = parameter_table(MODEL, 120)


def shard(parameter: Parameter, rank: int, size: int, *, seed: int = 1) -> torch.Tensor:
    return initial_shard(parameter, model=MODEL, seed=seed, tp_rank=rank, tp_size=size, vocab_size=120)


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("size", [2, 4])
def test_shards_are_parts_of_the_whole(name: str, size: int) -> None:
    parameter = TABLE[name]
    whole = shard(parameter, 0, 1)
    assert tuple(whole.shape) == parameter.shape
    parts = [shard(parameter, rank, size) for rank in range(size)]
    if parameter.tp_dim is None:
        assert all(torch.equal(part, whole) for part in parts)
    elif parameter.arrangement == "gate_up":
        gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
        assert torch.equal(torch.cat([*gates, *ups]), whole)
    else:
        assert torch.equal(torch.cat(parts, dim=parameter.tp_dim), whole)


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
    larger = parameter_table(MODEL, 128)[name]
    padded = shard(larger, 0, 1)
    assert torch.equal(padded[:120], shard(TABLE[name], 0, 1))
    assert not padded[120:].any()
    assert not shard(larger, 15, 16).any()  # the last of 16 ranks holds padding only


def test_seeds_names_and_widths_differ() -> None:
    first, second = (TABLE[f"decoder.layers.{layer}.self_attention.linear_proj.weight"] for layer in (0, 1))
    assert not torch.equal(shard(first, 0, 1), shard(second, 0, 1))
    assert not torch.equal(shard(first, 0, 1), shard(first, 0, 1, seed=2))
    rows = draw_rows("wide", 1024, 0, 2048, seed=1, std=0.02)
    assert rows.std().item() == pytest.approx(0.02, rel=0.01)
    assert rows.mean().item() == pytest.approx(0.0, abs=1e-4)
    narrow = shard(TABLE["decoder.layers.1.mlp.linear_fc2.weight"], 0, 1)
    assert narrow.std().item() == pytest.approx(0.02 / math.sqrt(4), rel=0.05)
