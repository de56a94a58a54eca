"""config.json: what is read, what is refused (all at once), and what transformers makes of what we write."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.config.architectures import ARCHITECTURES
from megatron_7b.config.schema import ModelConfig, RopeScalingConfig
from megatron_7b.conversion import (
    FAMILIES,
    SpecialTokens,
    from_hugging_face_config,
    to_generation_config,
    to_hugging_face_config,
)
from megatron_7b.conversion.json_files import write_json
from megatron_7b.errors import ConversionError

LLAMA_2_7B = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}


def test_llama_2_7b():
    model = from_hugging_face_config(LLAMA_2_7B)
    assert model == ModelConfig(
        architecture="llama",
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=11008,
        num_attention_heads=32,
        vocab_size=32000,
        max_position_embeddings=2048,
        norm_epsilon=1e-5,
    )


@pytest.mark.parametrize("model_type", sorted({family.model_type for family in FAMILIES.values()}))
def test_defaults_are_those_of_transformers(model_type: str):
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(model_type)
    for key, ours in FAMILIES[model_type].codec.defaults.items():
        if key == "position_embedding_type":  # transformers 5 has only one
            assert ours == "absolute"
        elif key == "rope_theta":
            assert theirs.rope_parameters["rope_theta"] == ours
        elif key == "scale_decoder_outputs":  # which transformers takes from the tie
            assert ours is None
            assert theirs.scale_decoder_outputs == theirs.tie_word_embeddings
        elif ours is None:  # transformers fills these in
            assert getattr(theirs, key, None) in (
                None,
                theirs.num_attention_heads,
                4096 // 32,
                theirs.num_hidden_layers,
            )
        elif key == "sliding_window" and not getattr(theirs, "use_sliding_window", True):
            assert theirs.sliding_window is None
        else:
            assert getattr(theirs, key) == ours, key


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"attention_bias": True}, "attention_bias is True"),
    ("llama", {"mlp_bias": True}, "mlp_bias is True"),
    ("qwen3", {"attention_bias": True}, "attention_bias is True"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("llama", {"architectures": ["LlamaModel"]}, "LlamaForSequenceClassification"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
    ("qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "rope_type is 'mrope'"),
    ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "rope_parameters.factor is None"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ between layer types"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("mistral", {"sliding_window": 0}, "sliding_window is 0, expected a positive integer or null"),
    ("mixtral", {"sliding_window": "4096"}, "sliding_window is '4096', expected a positive integer or null"),
    (
        "qwen3",
        {"use_sliding_window": True, "layer_types": ["full_attention", *["sliding_attention"] * 30]},
        "layer_types has 31 entries, expected one for each of 32 layers",
    ),
    (
        "qwen2",
        {"sliding_window": None, "layer_types": ["full_attention", *["sliding_attention"] * 31]},
        "layer_types has sliding_attention, but no sliding_window is in use",
    ),
    ("qwen3", {"layer_types": ["chunked_attention"] * 32}, "only full_attention and sliding_attention can be"),
    ("qwen2", {"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}, "code of the folder for AutoModelForCausalLM"),
    ("llama", {"num_key_value_heads": 5}, "not a multiple of num_key_value_heads 5"),
    ("llama", {"hidden_size": 4097}, "hidden_size 4097 is not a multiple"),
    ("llama", {"hidden_size": "4096"}, "hidden_size is '4096', expected a positive integer"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ("llama", {"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    ("llama", {"rope_theta": -1}, "rope_theta is -1"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
]


@pytest.mark.parametrize(("model_type", "changes", "message"), REFUSALS, ids=[message for _, _, message in REFUSALS])
def test_what_cannot_be_represented_is_refused(model_type: str, changes: dict[str, Any], message: str):
    with pytest.raises(ConversionError) as caught:
        from_hugging_face_config({"model_type": model_type, **changes})
    assert message in str(caught.value)


def test_what_an_import_brought_goes_out_again_and_the_shape_is_ours():
    imported = {
        "model_type": "qwen2",
        "hidden_size": 1,
        "layer_types": ["sliding_attention"],
        "rope_scaling": {"type": "linear"},
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 7,
        "torch_dtype": "float16",
        "mlp_bias": True,
        "_name_or_path": "elsewhere",
        "eos_token_id": [5, 6],
        "pad_token_id": 3,
        "use_cache": False,
        "pretraining_tp": 1,
        "architectures": ["Other"],
        "transformers_version": "4.1.0",
        "id2label": {"0": "LABEL_0"},
        "custom": {"a": [1]},
        "max_window_layers": 28,
    }
    model = ModelConfig(architecture="qwen2", add_qkv_bias=True)
    ours = to_hugging_face_config(model, vocab_size=9, dtype="bfloat16")
    written = to_hugging_face_config(model, vocab_size=9, dtype="bfloat16", imported=imported)
    kept = {"eos_token_id", "pad_token_id", "use_cache", "pretraining_tp", "id2label", "custom", "max_window_layers"}
    assert {key: written[key] for key in kept} == {key: imported[key] for key in kept}
    ids = {"bos_token_id", "eos_token_id", "pad_token_id"}
    assert written.keys() - kept == ours.keys() - ids - kept
    assert all(written[key] == ours[key] for key in written.keys() - kept)


OLDER_REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {"activation_function": "gelu"}, "activation_function is 'gelu'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
    ("gpt2", {"n_embd": 770}, "n_embd 770 is not a multiple of n_head 12"),
    ("gpt2", {"architectures": ["GPT2DoubleHeadsModel"]}, "GPT2ForSequenceClassification"),
    ("gpt2", {"n_layer": "12"}, "n_layer is '12', expected a positive integer"),
    ("bert", {"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
    ("bert", {"is_decoder": True}, "is_decoder is True"),
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
    ("bert", {"num_attention_heads": 7}, "hidden_size 768 is not a multiple of num_attention_heads 7"),
    ("bert", {"architectures": ["BertForMultipleChoice"]}, "BertForQuestionAnswering"),
    ("megatron-bert", {"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
]


@pytest.mark.parametrize(("model_type", "changes", "message"), OLDER_REFUSALS)
def test_what_older_models_cannot_have_is_refused(model_type: str, changes: dict[str, Any], message: str):
    with pytest.raises(ConversionError) as caught:
        from_hugging_face_config({"model_type": model_type, **changes})
    assert message in str(caught.value)


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "megatron-bert"])
def test_learned_positions_cannot_be_shortened(model_type: str):
    with pytest.raises(ConversionError, match="all of them are weights"):
        from_hugging_face_config({"model_type": model_type}, max_position_embeddings=64)


def test_gpt2_by_its_other_names():
    names = {"hidden_size": 64, "max_position_embeddings": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
    model = from_hugging_face_config({"model_type": "gpt2", "activation_function": "gelu_pytorch_tanh", **names})
    assert (model.hidden_size, model.num_layers, model.num_attention_heads) == (64, 3, 4)
    assert (model.max_position_embeddings, model.ffn_hidden_size) == (32, 256)


def test_everything_is_refused_at_once():
    config = {"model_type": "llama", "mlp_bias": True, "hidden_act": "gelu", "vocab_size": -1, "rope_theta": 0}
    with pytest.raises(ConversionError) as caught:
        from_hugging_face_config(config)
    for key in ("mlp_bias", "hidden_act", "vocab_size", "rope_theta"):
        assert key in str(caught.value)


@pytest.mark.parametrize("config", [{}, {"model_type": "mamba"}, {"model_type": None}, {"model_type": ["llama"]}])
def test_unknown_model_types_are_refused_with_the_known_ones(config: dict[str, Any]):
    with pytest.raises(ConversionError, match="qwen3, mixtral, qwen3_moe, gpt2, bert, megatron-bert"):
        from_hugging_face_config(config)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 4096},
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 64},
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 32},
        {"model_type": "llama", "sliding_window": 64},
    ],
)
def test_windows_without_effect_are_left_out(config: dict[str, Any]):
    assert from_hugging_face_config(config).window_size is None


def test_a_shorter_context_makes_a_window_needless():
    model = from_hugging_face_config({"model_type": "mistral"}, max_position_embeddings=4096)
    assert (model.max_position_embeddings, model.window_size) == (4096, None)


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({"model_type": "mistral"}, [4096] * 4),
        ({"model_type": "mixtral", "sliding_window": 7}, [7] * 4),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 3}, [None] * 3 + [4096]),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0}, [4096] * 4),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "layer_types": [SLIDING, SLIDING, FULL, SLIDING]},
            [4096, 4096, None, 4096],
        ),
        ({"model_type": "qwen3_moe", "use_sliding_window": True, "max_window_layers": 3}, [4096] * 4),
    ],
)
def test_windows_are_where_transformers_has_them(config: dict[str, Any], windows: list[int | None], tmp_path: Path):
    from transformers import AutoConfig

    model = from_hugging_face_config({**config, "num_hidden_layers": 4})
    assert list(model.layer_windows) == windows
    written = to_hugging_face_config(model, vocab_size=9, dtype="float32", imported=config)
    assert from_hugging_face_config(written).layer_windows == model.layer_windows
    for name, values in (("theirs", {**config, "num_hidden_layers": 4}), ("ours", written)):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "config.json", values)
        theirs = AutoConfig.from_pretrained(tmp_path / name)
        layers = getattr(theirs, "layer_types", None) or [SLIDING] * 4
        assert [theirs.sliding_window if kind == SLIDING else None for kind in layers] == windows


def test_unused_rotary_keys_do_not_matter():
    rope = {"rope_type": "default", "factor": 3.0, "rope_theta": 7.0}
    assert from_hugging_face_config({**LLAMA_2_7B, "rope_parameters": rope}).rotary_base == 7.0


def test_the_llama3_context_falls_back_to_the_model_s():
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = from_hugging_face_config({**LLAMA_2_7B, "rope_scaling": rope})
    assert model.rope_scaling == RopeScalingConfig(original_max_position_embeddings=2048)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "llama", "window_size": 9}, "llama has no windows"),
        ({"architecture": "mistral", "window_size": 9, "window_attn_skip_freq": (2,)}, "all layers of mistral have it"),
    ],
)
def test_windows_that_a_family_does_not_have_are_not_written(changes: dict[str, Any], message: str):
    with pytest.raises(ConversionError, match=message):
        to_hugging_face_config(ModelConfig(**changes), vocab_size=10, dtype="float32")


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    architecture = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    groups, per_group, width = draw(st.integers(1, 4)), draw(st.integers(1, 4)), 2 * draw(st.integers(1, 8))
    heads = groups * per_group
    regular, num_layers, longest = draw(st.booleans()), draw(st.integers(1, 5)), draw(st.integers(1, 99999))
    window = draw(st.none() | st.integers(1, longest - 1)) if architecture != "llama" and longest > 1 else None
    layers: tuple[int, ...] = ()
    if window is not None and architecture.startswith("qwen") and num_layers > 1 and draw(st.booleans()):
        layers = tuple(draw(st.permutations([1, 0, *draw(st.lists(st.integers(0, 1)))][:num_layers])))
        layers = layers + (0,) * (num_layers - len(layers))
    return ModelConfig(
        architecture=architecture,
        num_layers=num_layers,
        window_size=window,
        window_attn_skip_freq=layers,
        num_attention_heads=heads,
        num_query_groups=groups,
        hidden_size=heads * (width if regular else width + 2),
        kv_channels=None if regular else width,
        vocab_size=draw(st.integers(2, 99999)),
        max_position_embeddings=longest,
        rotary_base=draw(st.floats(1, 1e7)),
        rope_scaling=draw(st.none() | st.just(RopeScalingConfig(factor=4.0, original_max_position_embeddings=17))),
        norm_epsilon=draw(st.floats(1e-8, 1e-2)),
        share_embeddings_and_output_weights=draw(st.booleans()),
        add_qkv_bias=architecture == "qwen2",
        qk_layernorm=architecture == "qwen3",
        attention_dropout=draw(st.sampled_from([0.0, 0.1])),
    )


@given(models())
def test_there_and_back(model: ModelConfig):
    assert model.vocab_size is not None
    assert (
        from_hugging_face_config(to_hugging_face_config(model, vocab_size=model.vocab_size, dtype="float32")) == model
    )


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_what_we_write(architecture: Any, tmp_path: Path):
    from transformers import AutoConfig, GenerationConfig

    model = ModelConfig(
        architecture=architecture,
        num_query_groups=2,
        vocab_size=300,
        max_position_embeddings=777,
        rotary_base=123.0,
        rope_scaling=RopeScalingConfig(factor=3.0),
        norm_epsilon=3e-4,
        share_embeddings_and_output_weights=True,
        **ARCHITECTURES[architecture].fixed,
    )
    tokens = SpecialTokens(bos_token_id=1, eos_token_id=[2, 3])
    config = to_hugging_face_config(model, vocab_size=300, dtype="bfloat16", special_tokens=tokens)
    write_json(tmp_path / "config.json", config)
    write_json(tmp_path / "generation_config.json", to_generation_config(tokens))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert str(theirs.dtype) == "torch.bfloat16"
    assert theirs.rope_parameters["rope_theta"] == 123.0
    assert theirs.rope_parameters["rope_type"] == "llama3"
    assert theirs.rope_parameters["factor"] == 3.0
    assert theirs.tie_word_embeddings
    assert (theirs.hidden_size, theirs.num_key_value_heads, theirs.head_dim) == (256, 2, 32)
    assert (theirs.rms_norm_eps, theirs.max_position_embeddings, theirs.vocab_size) == (3e-4, 777, 300)
    assert getattr(theirs, "sliding_window", None) is None
    generation = GenerationConfig.from_pretrained(tmp_path)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, [2, 3], None)


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"add_qkv_bias": True}, ["model.add_qkv_bias is True", "['qwen2']"]),
        ({"architecture": "qwen2"}, ["model.add_qkv_bias is False", "['llama', 'mistral', 'qwen3']"]),
        ({"qk_layernorm": True, "add_qkv_bias": True}, ["model.add_qkv_bias", "model.qk_layernorm"]),
        ({"hidden_size": 100, "kv_channels": 32}, ["not a multiple of model.num_attention_heads"]),
    ],
)
def test_exports_that_would_compute_something_else_are_refused(changes: dict[str, Any], messages: list[str]):
    model = dataclasses.replace(ModelConfig(), **changes)
    with pytest.raises(ConversionError) as caught:
        to_hugging_face_config(model, vocab_size=10, dtype="float32")
    for message in messages:
        assert message in str(caught.value)
