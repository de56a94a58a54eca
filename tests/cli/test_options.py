"""Arguments become flags and overrides; nothing is swallowed, nothing abbreviated."""

import pytest

from megatron_7b.cli.options import Parser, parse_arguments, split_overrides
from megatron_7b.config import load_config
from megatron_7b.config.options import leaf_options
from megatron_7b.errors import ConfigError


def make_parser(*, with_config=True):
    parser = Parser("example", "an example", with_config=with_config)
    parser.add_argument("--run-dir")
    parser.add_argument("--nproc", type=int, default=1, help="ranks")
    parser.add_argument("--config", nargs="+", default=[])
    return parser


@pytest.mark.parametrize(
    ("argv", "overrides", "rest"),
    [
        (["--training.train-steps", "5"], {"training.train_steps": "5"}, []),
        (["--training.train_steps", "5"], {"training.train_steps": "5"}, []),
        (["--training.train-steps=5"], {"training.train_steps": "5"}, []),
        (["--optimizer.min-lr", "-1"], {"optimizer.min_lr": "-1"}, []),
        (["--training.seed", "1", "--training.seed", "2"], {"training.seed": "2"}, []),
        (["--data.train", "P"], {"data.train": ["P"]}, []),
        (
            ["--data.train", "0.7", "A", "0.3", "B", "--training.seed", "1"],
            {"data.train": ["0.7", "A", "0.3", "B"], "training.seed": "1"},
            [],
        ),
        (["--training.seed", "1", "positional"], {"training.seed": "1"}, ["positional"]),
        (["--run-dir=./a.b", "--training.seed", "1"], {"training.seed": "1"}, ["--run-dir=./a.b"]),
        (["--data", "p.q", "--json"], {}, ["--data", "p.q", "--json"]),
        (["--no.such", "a", "b"], {"no.such": ["a", "b"]}, []),
    ],
)
def test_flags_with_a_dot_belong_to_the_configuration(argv, overrides, rest):
    assert split_overrides(argv) == (overrides, rest, [])


def test_every_option_can_be_given_as_its_help_spells_it():
    config = load_config(None)
    for option in leaf_options():
        overrides, rest, problems = split_overrides([option.flag, "x"])
        assert (list(overrides), rest, problems) == ([option.path], [], [])
    assert config == load_config(None)


def test_a_flag_without_a_value_is_a_problem_not_a_guess():
    command_line = parse_arguments(make_parser(), ["--parallel.sequence-parallel", "--run-dir", "R"])
    assert command_line.flags.run_dir == "R"
    assert "needs a value: True or False" in str(command_line.problems[0])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--train-steps", "5"],
            "--train-steps = 5  (command line)\n    unknown flag; did you mean --training.train-steps?",
        ),
        (["--nprocs", "5"], "--nprocs = 5  (command line)\n    unknown flag; did you mean --nproc?"),
        (["--run"], "unknown flag; did you mean"),
        (["--run-dri=R"], "--run-dri = R  (command line)\n    unknown flag; did you mean --run-dir?"),
        (["stray"], "stray  (command line)\n    unexpected argument"),
    ],
)
def test_what_means_nothing_is_reported_with_the_rest(argv, words):
    command_line = parse_arguments(make_parser(), argv)
    assert len(command_line.problems) == 1
    assert words in str(command_line.problems[0])
    with pytest.raises(ConfigError, match="2 problems"):
        load_config(None, {"optimizer.lr": "high"}, problems=command_line.problems)


def test_commands_without_configuration_refuse_its_flags():
    with pytest.raises(ConfigError, match="unknown flag"):
        parse_arguments(make_parser(with_config=False), ["--training.seed", "1"])


def test_malformed_flags_are_errors_of_ours_not_an_exit():
    with pytest.raises(ConfigError, match="invalid int value: 'many'"):
        parse_arguments(make_parser(), ["--nproc", "many"])


def test_help_shows_every_option_with_default_and_docstring(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(make_parser(), ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    flattened = " ".join(text.split())
    for option in leaf_options():
        assert f"  {option.flag} " in text
        assert option.doc in flattened
    assert "--training.train-steps INT  (default: 100)" in text
    assert "--precision.params-dtype auto|fp32|bf16  (default: auto)" in text
    assert "ranks (default: 1)" in text


def test_help_shows_the_values_of_a_preset_that_is_named(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(make_parser(), ["--config", "tiny_cpu", "--help"])
    assert "--training.train-steps INT  (default: 200)" in capsys.readouterr().out
