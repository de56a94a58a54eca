"""`megatron-7b compress quantize|prune|cache-logits`: smaller models from larger ones.

    megatron-7b compress quantize --checkpoint RUN --output H --scheme w4a16 --method gptq --calibration text.jsonl
    megatron-7b compress quantize --hf FOLDER --output model.gguf --scheme gguf:q4_k_m --held-out text.jsonl
    megatron-7b compress prune --checkpoint RUN --output C --num-layers 24 --calibration text.jsonl
    megatron-7b compress cache-logits --checkpoint TEACHER --data PREFIX --output P --top-k 64

Each action is a module `compress_ACTION` beside this one.
"""

import difflib
import importlib

from megatron_7b.errors import ConfigError

SUMMARY = "make a model smaller: quantise it for transformers, vLLM or llama.cpp, or prune it"

ACTIONS = {
    "quantize": "write a checkpoint or a Hugging Face folder in fewer bits",
    "cache-logits": "write what a teacher finds most probable, for students that learn without it",
    "prune": "remove the layers, heads, neurons and channels that text shows to matter least",
}
"""What can be done, each by `main` of the module of that name."""


def main(argv: list[str]) -> int:
    """Run the command.

    Returns:
        0 when the output is published.

    Raises:
        MegatronError: The input cannot be used, or too much would be lost; nothing was published.
    """
    action = argv[0] if argv else "--help"
    if action in ("-h", "--help", "help"):
        lines = [f"  {name:<14}{summary}" for name, summary in ACTIONS.items()]
        print("usage: megatron-7b compress ACTION [options]", "", SUMMARY, "", *lines, sep="\n")
        return 0 if argv else 2
    if action not in ACTIONS:
        guess = difflib.get_close_matches(action, ACTIONS, n=1)
        raise ConfigError(
            f"unknown action {action!r}, expected {' or '.join(ACTIONS)}",
            hint=f"did you mean {guess[0]}?" if guess else None,
        )
    module = importlib.import_module(f"megatron_7b.cli.commands.compress_{action.replace('-', '_')}")
    code: int = module.main(argv[1:])
    return code
