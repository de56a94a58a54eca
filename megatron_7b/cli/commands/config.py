"""`megatron-7b config`: look at presets and at the configuration that a command line comes to.

megatron-7b config list
megatron-7b config show llama2_7b_8xh100_bf16 --training.micro-batch-size 2
"""

from megatron_7b.cli.options import Parser, parse_arguments
from megatron_7b.config import RunConfig, check_config, dump_config, load_config, preset_names, read_source
from megatron_7b.model.sizes import count_parameters

SUMMARY = "list the presets; show and check the configuration that options come to"


def main(argv: list[str]) -> int:
    """Run the command; see the module's docstring.

    Raises:
        ConfigError: The configuration cannot be read or is impossible.
    """
    parser = Parser("config", SUMMARY, with_config=True)
    parser.add_argument("action", choices=("list", "show"), help="list presets, or show an effective configuration")
    parser.add_argument("config", nargs="*", help="presets or YAML files; of several, the later ones win")
    parser.add_argument("--nproc", type=int, help="also check that this many ranks fit")
    command_line = parse_arguments(parser, argv)
    flags = command_line.flags
    config = load_config(flags.config, command_line.overrides, world_size=flags.nproc, problems=command_line.problems)
    if flags.action == "list":
        print(_preset_table())
        return 0
    check_config(config, world_size=flags.nproc)
    print(_size_comment(config))
    print(dump_config(config), end="")
    return 0


def _preset_table() -> str:
    """Return one line per preset: name, ranks, description."""
    width = max(len(name) for name in preset_names())
    lines = [f"{'preset':<{width}}  ranks  description"]
    for name in preset_names():
        source = read_source(name)
        lines.append(f"{name:<{width}}  {source.intended_world_size or '':>5}  {source.description}")
    return "\n".join(lines)


def _size_comment(config: RunConfig) -> str:
    """Return what the numbers come to, as YAML comments."""
    tokens = config.training.global_batch_size * config.data.seq_length
    lines = [f"# {tokens:,} tokens per step, {tokens * config.training.train_steps:,} in all"]
    if config.model.vocab_size is not None:
        lines.insert(0, f"# {count_parameters(config.model):,} parameters")
    return "\n".join(lines)
