"""Written values become typed ones, or one message that names every mistake."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.config import (
    RopeScalingConfig,
    RunConfig,
    check_config,
    config_from_dict,
    config_to_dict,
    load_config,
    override_config,
    save_config,
)
from megatron_7b.config.options import get_value, leaf_options, options
from megatron_7b.errors import ConfigError


@pytest.mark.parametrize(
    ("path", "written", "expected"),
    [
        ("training.train_steps", "1000", 1000),
        ("training.train_steps", "1_000", 1000),
        ("training.train_steps", "1e3", 1000),
        ("optimizer.lr", "3e-4", 3e-4),
        ("optimizer.lr", 1, 1.0),
        ("parallel.sequence_parallel", "True", True),
        ("parallel.sequence_parallel", "false", False),
        ("model.num_query_groups", "none", None),
        ("model.num_query_groups", None, None),
        ("precision.fp8", "none", "none"),
        ("precision.fp8", None, "none"),
        ("data.split", 1, "1"),
        ("data.train", ["0.7", "A", "0.3", "B"], ("0.7", "A", "0.3", "B")),
        ("data.train", [0.7, "A", 0.3, "B"], ("0.7", "A", "0.3", "B")),
        ("data.train", "A", ("A",)),
        ("data.train", "", ()),
        ("training.rampup_batch_size", ["4", "4", "1000"], (4, 4, 1000)),
        ("training.rampup_batch_size", ["none"], None),
        ("data.max_epochs", ["1", "0.5", "0"], (1.0, 0.5, 0.0)),
        ("data.max_epochs", 2, (2.0,)),
    ],
)
def test_reads_what_people_write(path, written, expected):
    value = get_value(load_config(None, {path: written}), path)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("path", "written", "allowed"),
    [
        ("training.train_steps", "0.5", "an integer"),
        ("training.train_steps", True, "an integer"),
        ("training.train_steps", None, "an integer"),
        ("training.train_steps", "inf", "an integer"),
        ("training.train_steps", ["1", "2"], "an integer"),
        ("optimizer.lr", "fast", "a number"),
        ("optimizer.lr", "nan", "a number"),
        ("optimizer.lr", True, "a number"),
        ("parallel.sequence_parallel", "1", "True or False"),
        ("parallel.sequence_parallel", 1, "True or False"),
        ("precision.params_dtype", "BF16", "auto | fp32 | bf16; did you mean bf16?"),
        ("training.rampup_batch_size", ["4", "4"], "3 integers or none"),
        ("model.rope_scaling", "llama3", "a mapping or none"),
        ("data.tokenizer", ["a", "b"], "a text or none"),
    ],
)
def test_refuses_and_says_what_is_allowed(path, written, allowed):
    with pytest.raises(ConfigError) as caught:
        load_config(None, {path: written})
    assert f"{path} = " in str(caught.value)
    assert f"allowed: {allowed}" in str(caught.value)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("parallel.tensor_model_paralel_size", "parallel.tensor_model_parallel_size"),
        ("traning.train_steps", "training.train_steps"),
        ("training.lr", "optimizer.lr"),
        ("train_steps", "training.train_steps"),
        ("model.rope_scaling.facter", "model.rope_scaling.factor"),
    ],
)
def test_unknown_options_come_with_the_nearest_name(written, meant):
    with pytest.raises(ConfigError, match=f"did you mean {meant}\\?"):
        load_config(None, {written: 1})


def test_an_unknown_option_like_none_comes_with_those_of_its_section():
    with pytest.raises(ConfigError, match="parallel has tensor_model_parallel_size, "):
        load_config(None, {"parallel.zzz": 1})


def test_a_section_is_not_a_value():
    with pytest.raises(ConfigError, match="model is a section"):
        load_config(None, {"model": 5})


def test_all_mistakes_are_in_one_message():
    mistakes = {
        "model.num_layers": "four",  # type
        "modle.hidden_size": 3,  # name
        "optimizer.lr": -1,  # range
        "data.seq_length": 4096,  # combination with model.max_position_embeddings
        "model.num_query_groups": 3,  # combination with model.num_attention_heads
    }
    with pytest.raises(ConfigError) as caught:
        load_config(None, mistakes)
    message = str(caught.value)
    assert message.startswith("5 problems")
    assert all(f"  {path} = " in message for path in mistakes)


def test_a_mistake_is_not_reported_again_by_the_rules_that_read_it():
    mistaken = {"parallel.tensor_model_paralel_size": 2, "parallel.sequence_parallel": True}
    with pytest.raises(ConfigError, match=r"^1 problem in"):
        load_config(None, mistaken)


def test_every_option_survives_a_round_trip_through_yaml(tmp_path):
    config = load_config(
        "llama3_8b_8xh100_fp8",
        {
            "model.rope_scaling.factor": 4,
            "data.train": ["0.7", "A", "0.3", "B"],
            "training.rampup_batch_size": ["8", "8", "1000"],
            "optimizer.lr": 1e-5,
        },
    )
    assert config.model.rope_scaling == RopeScalingConfig(factor=4.0)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config_from_dict(config_to_dict(config)) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@given(
    st.fixed_dictionaries(
        {
            "training.seed": st.integers(0, 2**32 - 1),
            "optimizer.lr": st.floats(1e-9, 10, allow_nan=False),
            "parallel.sequence_parallel": st.booleans(),
            "model.num_query_groups": st.none() | st.integers(1, 64),
            "telemetry.wandb_project": st.text(st.characters(codec="ascii", categories=["L"]), min_size=5),
        }
    )
)
def test_texts_of_the_command_line_mean_what_the_values_print_as(values):
    written = {path: "none" if value is None else str(value) for path, value in values.items()}
    config = load_config(None, written)
    assert {path: get_value(config, path) for path in values} == values


def test_overrides_change_a_copy():
    config = load_config("tiny_cpu")
    changed = override_config(config, {"training.train_steps": "7", "model.rope_scaling.factor": "2"})
    assert (config.training.train_steps, changed.training.train_steps) == (200, 7)
    assert changed.model.rope_scaling == RopeScalingConfig(factor=2.0)
    assert override_config(changed, {"model.rope_scaling": "none"}).model.rope_scaling is None


def test_saved_configurations_of_other_versions_are_refused_whole():
    tree = config_to_dict(RunConfig())
    tree["model"]["mtp_num_layers"] = 8
    tree["runtime"]["device"] = "tpu"
    with pytest.raises(ConfigError, match=r"^2 problems") as caught:
        config_from_dict(tree)
    assert "model.mtp_num_layers" in str(caught.value)
    assert "runtime.device" in str(caught.value)


def test_defaults_pass_their_own_checks():
    check_config(RunConfig(), world_size=1)


def test_every_option_is_documented():
    assert [option.path for option in leaf_options() if not option.doc] == []


def test_every_option_has_words_for_what_it_takes():
    for option in leaf_options():
        assert option.allowed
        assert option.metavar
    assert options()["training.rampup_batch_size"].metavar == "INT INT INT|none"
