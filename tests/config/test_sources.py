"""YAML files, what they extend, and which of several values counts."""

import pytest

from megatron_7b.config import load_config
from megatron_7b.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def write_yaml(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_yaml


def test_precedence_is_defaults_then_preset_then_file_then_command_line(write):
    file = write("run.yaml", "training: {train_steps: 11, global_batch_size: 32}\n")
    overrides = {"training.train_steps": 12}
    assert load_config(None).training.train_steps == 100
    assert load_config("tiny_cpu").training.train_steps == 200
    assert load_config(["tiny_cpu", file]).training.train_steps == 11
    config = load_config(["tiny_cpu", file], overrides)
    assert (config.training.train_steps, config.training.global_batch_size) == (12, 32)
    assert config.training.eval_interval_steps == load_config("tiny_cpu").training.eval_interval_steps
    assert load_config([file, "tiny_cpu"]).training.train_steps == 200


def test_files_extend_presets_and_files_beside_them(write):
    write("sub/base.yaml", "extends: tiny_cpu\noptimizer: {lr: 0.5}\n")
    write("sub/other.yaml", "optimizer: {lr: 0.25, min_lr: 0.125}\n")
    top = write("sub/top.yaml", "extends: [base.yaml, other.yaml]\ndata: {seq_length: 64}\n")
    config = load_config(top)
    assert (config.optimizer.lr, config.optimizer.min_lr, config.data.seq_length) == (0.25, 0.125, 64)
    assert config.model.num_layers == load_config("tiny_cpu").model.num_layers


def test_cycles_are_refused(write):
    write("a.yaml", "extends: b.yaml\n")
    path = write("b.yaml", "extends: a.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load_config(path)


def test_a_group_set_as_a_whole_and_its_fields_replace_each_other(write):
    stretched = write("stretched.yaml", "model: {rope_scaling: {factor: 4}}\n")
    assert load_config([stretched], {"model.rope_scaling": "none"}).model.rope_scaling is None
    mistaken = write("mistaken.yaml", "model: {rope_scaling: {factor: much}}\n")
    assert load_config([mistaken], {"model.rope_scaling": "none"}).model.rope_scaling is None
    plain = write("plain.yaml", "extends: stretched.yaml\nmodel: {rope_scaling: null}\n")
    assert load_config(plain).model.rope_scaling is None
    assert load_config(plain, {"model.rope_scaling.factor": 2}).model.rope_scaling.factor == 2


def test_dotted_keys_and_empty_sections_are_fine(write):
    path = write("run.yaml", "training.train_steps: 5\nmodel:\n")
    assert load_config(path).training.train_steps == 5


def test_an_empty_file_is_the_defaults(write):
    assert load_config(write("empty.yaml", "")) == load_config(None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {train_steps: 1}\ntraining: {train_steps: 2}\n", "given twice"),
        ("training: [1\n", "cannot read"),
        ("- 1\n", "holds a list"),
        ("extends: 5\n", "extends"),
        ("extends: nothing_like_it\n", "unknown preset"),
        ("training: {train_steps: !!python/object/apply:os.system [true]}\n", "cannot read"),
    ],
)
def test_broken_files_are_named(write, text, message):
    path = write("broken.yaml", text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_problems_name_the_file_that_they_were_written_in(write):
    path = write("run.yaml", "training: {train_steps: many}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(["tiny_cpu", path], {"optimizer.lr": "high", "model.num_query_groups": 3})
    message = str(caught.value)
    assert f"training.train_steps = many  ({path})" in message
    assert "optimizer.lr = high  (command line)" in message
    assert "model.num_query_groups = 3  (command line)" in message


def test_unknown_presets_and_missing_files(tmp_path):
    with pytest.raises(ConfigError, match="did you mean llama2_7b_8xh100_bf16"):
        load_config("llama2_7b_8xh100_bf6")
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(tmp_path / "absent.yaml")
