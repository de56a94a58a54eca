"""What to type after a run: said on a terminal, where somebody is there to type it."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_7b.config import RunConfig
from megatron_7b.data import parse_blend
from megatron_7b.runtime.process.signals import EXIT_FINISHED, EXIT_SAVED
from megatron_7b.runtime.process.terminal import say


def print_next_commands(exit_code: int, command: Sequence[str], run_dir: Path, config: RunConfig) -> None:
    """Print to stderr what continues a stopped run, or what can be done with a finished one; nothing after a failure.

    Args:
        exit_code: Of the run.
        command: The words that were typed.
        run_dir: The run folder.
        config: The run.
    """
    if exit_code == EXIT_SAVED:
        say(f"\nto continue:\n  {shlex.join(command)}")
    elif exit_code == EXIT_FINISHED:
        lines = "\n".join(f"  {shlex.join(words)}" for words in _after_training(run_dir, config))
        say(f"\nnext:\n{lines}")


def _after_training(run_dir: Path, config: RunConfig) -> list[list[str]]:
    checkpoint = ["--checkpoint", str(run_dir / "checkpoints" / "latest")]
    corpus = parse_blend(config.data.valid or config.data.train)[0].prefix
    is_chat = config.objective_name == "chat"
    prompt = ["--chat", "--prompt", "Hello"] if is_chat else ["--prompt", "Once upon a time"]
    continuing = ["megatron-7b", "generate", *checkpoint, *prompt]
    if config.model.has_head:
        continuing = ["megatron-7b", "predict", *checkpoint, "--input", "F.jsonl", "--output", "G.jsonl"]
    return [
        ["megatron-7b", "evaluate", *checkpoint, "--data", corpus],
        *([continuing] if config.model.traits.kind == "decoder" or config.model.has_head else []),
        ["megatron-7b", "convert", "to-hf", *checkpoint, "--output", str(run_dir / "hf")],
    ]
