"""Every shipped preset loads, passes its checks, and has the size that its name promises."""

import pytest

from megatron_7b.config import check_config, load_config, preset_names, read_source
from megatron_7b.model.sizes import count_parameters

SIZES = {
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "mistral_7b": 7_241_732_096,
    "qwen2_5_7b": 7_615_616_512,
}
MIXTURES = {"mixtral_8x7b": 46_702_792_704}
PUBLISHED = {
    "gpt2": 124_439_808,
    "bert_base": 109_514_298,
    "bert_large": 335_174_458,
    "t5_small": 76_961_152,
    "t5_base": 247_577_856,
    "t5_large": 783_150_080,
}
"""As transformers counts them, BERT with the head for masked tokens, T5 in release 1.1."""
LAYOUTS = ("8xh100_bf16", "8xh100_fp8", "64xh100_bf16")


def test_the_promised_presets_are_there():
    promised = {
        "tiny_cpu",
        "mini_cpu",
        "gpt2_tiny_cpu",
        "bert_tiny_cpu",
        "t5_tiny_cpu",
        "moe_tiny_cpu",
        *MIXTURES,
        "mistral_7b_v0_1",
        "sft_tiny_cpu",
        "classify_tiny_cpu",
        "lora_tiny_cpu",
        "lora_7b_1xh100",
        "sft_7b_8xh100",
        "qlora_7b_1x24gb",
        "dpo_tiny_cpu",
        "embedding_tiny_cpu",
        *PUBLISHED,
        *SIZES,
        *(f"{name}_{layout}" for name in SIZES for layout in LAYOUTS),
    }
    assert set(preset_names()) == promised


@pytest.mark.parametrize("name", preset_names())
def test_preset_is_possible(name):
    source = read_source(name)
    assert source.description
    check_config(load_config(name), world_size=source.intended_world_size or 1)


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith(tuple(SIZES))])
def test_parameter_count_is_exact(name):
    base = next(base for base in SIZES if name.startswith(base))
    assert count_parameters(load_config(name).model) == SIZES[base]


@pytest.mark.parametrize("name", [*PUBLISHED, *MIXTURES])
def test_other_models_have_their_published_size(name):
    assert count_parameters(load_config(name).model) == {**PUBLISHED, **MIXTURES}[name]


def test_mini_cpu_has_about_fifty_million_parameters():
    assert count_parameters(load_config("mini_cpu").model) == 51_747_328


@pytest.mark.parametrize("base", SIZES)
def test_layouts_use_the_machine_that_they_are_named_for(base):
    for layout in LAYOUTS:
        source = read_source(f"{base}_{layout}")
        config = load_config(f"{base}_{layout}")
        assert source.intended_world_size == int(layout.partition("x")[0])
        assert (config.precision.fp8 != "none") == layout.endswith("fp8")
        tokens = config.training.global_batch_size * config.data.seq_length
        assert tokens == (2**22 if layout.startswith("64") else 2**20)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "sequence_parallel", "ranks"),
    [(2, 1, False, 2), (2, 1, True, 2), (1, 2, False, 2), (2, 2, False, 4), (2, 2, False, 8), (1, 1, False, 2)],
)
@pytest.mark.parametrize("preset", ["tiny_cpu", "bert_tiny_cpu", "gpt2_tiny_cpu"])
def test_tiny_cpu_can_be_laid_out_in_every_promised_way(preset, tensor, pipeline, sequence_parallel, ranks):
    overrides = {
        "parallel.tensor_model_parallel_size": tensor,
        "parallel.pipeline_model_parallel_size": pipeline,
        "parallel.sequence_parallel": sequence_parallel,
        "training.train_steps": 10,
    }
    check_config(load_config(preset, overrides), world_size=ranks)
