"""`config list` and `config show`."""

import pytest
import yaml

from megatron_7b.cli.commands.config import main
from megatron_7b.config import config_to_dict, load_config, preset_names
from megatron_7b.errors import ConfigError


def test_list_names_every_preset_with_its_ranks(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == preset_names()
    assert next(line for line in lines if line.startswith("llama3_8b_64xh100_bf16")).split()[1] == "64"


def test_show_prints_yaml_that_loads_back(capsys, tmp_path):
    assert main(["show", "llama2_7b_8xh100_fp8", "--training.train-steps", "50", "--nproc", "8"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# 6,738,415,616 parameters\n# 1,048,576 tokens per step, 52,428,800 in all\n")
    expected = load_config("llama2_7b_8xh100_fp8", {"training.train_steps": 50})
    assert yaml.safe_load(text) == config_to_dict(expected)
    (tmp_path / "shown.yaml").write_text(text)
    assert load_config(tmp_path / "shown.yaml") == expected


def test_show_checks():
    with pytest.raises(ConfigError, match="number of ranks = 3"):
        main(["show", "llama3_8b_8xh100_bf16", "--nproc", "3"])
