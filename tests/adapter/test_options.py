"""Options of adapters: what belongs to which method, and names that the model does not have."""

from typing import Any

import pytest

from megatron_7b.adapter import build_adapter
from megatron_7b.config import check_config, load_config
from megatron_7b.errors import ConfigError
from megatron_7b.model.kinds import parameter_table
from tests.support.tiny_runs import tiny_config

LORA = {"adapter.method": "lora"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter.rank": 4}, "adapter.rank = 4\n      needs adapter.method lora | dora | qlora; without an adapter"),
        ({"adapter.dropout": 0.1}, "needs adapter.method; without an adapter the model itself is trained"),
        ({"adapter.method": "bottleneck", "adapter.rank": 4}, "needs adapter.method lora | dora | qlora"),
        ({**LORA, "adapter.bottleneck_size": 4}, "needs adapter.method bottleneck"),
        ({**LORA, "adapter.rank": 0}, "must be at least 1"),
        ({**LORA, "adapter.alpha": 0.0}, "must be above 0"),
        ({**LORA, "adapter.dropout": 1.0}, "must be at least 0 and below 1"),
        ({**LORA, "adapter.target_modules": ["all-linear", "q_proj"]}, "all-linear leaves nothing else to be named"),
        ({"adapter.method": "adalora", "adapter.target_rank": 13}, "must be at most adapter.initial_rank = 12"),
        (
            {"adapter.method": "adalora", "adapter.tinit": 60, "adapter.tfinal": 40},
            "must be below training.train_steps",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(load_config(None, {"training.train_steps": 100, **settings}))
    assert message in str(caught.value)


def test_a_method_that_is_named_leaves_the_options_of_others_behind() -> None:
    adapter = load_config("lora_7b_1xh100", {"adapter.method": "bottleneck"}).adapter
    assert (adapter.method, adapter.rank, adapter.dropout) == ("bottleneck", 8, 0.05)
    assert not load_config("lora_7b_1xh100", {"adapter.method": "none"}).adapter.is_used


def test_an_adapter_needs_a_base() -> None:
    with pytest.raises(ConfigError, match="adapter.method lora needs it: the model to adapt"):
        check_config(load_config(None, {**LORA, "data.train": ["x"]}), require_data=True)


@pytest.mark.parametrize(
    ("architecture", "adapter", "parts"),
    [
        ("llama", {"target_modules": ("lm_head",)}, ("'lm_head'", "q_proj, k_proj, v_proj", "modules-to-save lm_head")),
        ("llama", {"target_modules": ("c_attn", "v_proj")}, ("'c_attn'", "down_proj")),
        ("gpt2", {"target_modules": ("q_proj",)}, ("'q_proj'", "there are c_attn, c_proj, c_fc")),
        ("llama", {"modules_to_save": ("wte",)}, ("'wte'", "embed_tokens", "lm_head")),
        ("llama", {"method": "bottleneck", "target_modules": ("q_proj",)}, ("'q_proj'", "there are o_proj, down_proj")),
    ],
)  # fmt: skip
def test_a_name_that_the_model_lacks_is_refused(
    architecture: str, adapter: dict[str, Any], parts: tuple[str, ...]
) -> None:
    model = {"architecture": architecture, "num_query_groups": None}
    with pytest.raises(ConfigError) as caught:
        build_adapter(tiny_config(model=model, adapter={"method": "lora", **adapter}))
    assert [part for part in parts if part not in str(caught.value)] == []


def test_rows_have_the_names_and_shapes_of_peft() -> None:
    config = tiny_config(adapter={"method": "dora", "rank": 3, "target_modules": ("v_proj", "layers.1.mlp.down_proj")})
    adapter, table = build_adapter(config), parameter_table(config.model, 509)
    assert adapter is not None
    found = {
        row.name: (row.hugging_face, row.shape, row.tp_dim) for row in adapter.rows(table) if ".layers.1." in row.name
    }
    ours, theirs = "decoder.layers.1.self_attention.linear_qkv.v_proj.", "model.layers.1.self_attn.v_proj."
    mlp, their_mlp = "decoder.layers.1.mlp.linear_fc2.down_proj.", "model.layers.1.mlp.down_proj."
    assert found == {
        f"{ours}lora_A": ((f"{theirs}lora_A.weight",), (3, 64), None),
        f"{ours}lora_B": ((f"{theirs}lora_B.weight",), (32, 3), 0),
        f"{ours}lora_magnitude_vector": ((f"{theirs}lora_magnitude_vector",), (32,), 0),
        f"{mlp}lora_A": ((f"{their_mlp}lora_A.weight",), (3, 96), 1),
        f"{mlp}lora_B": ((f"{their_mlp}lora_B.weight",), (64, 3), None),
        f"{mlp}lora_magnitude_vector": ((f"{their_mlp}lora_magnitude_vector",), (64,), None),
    }
