#!/usr/bin/env python3
"""Raw text to Megatron's .bin/.idx: the same as `megatron-7b preprocess`; see --help."""

from environment import run_command

if __name__ == "__main__":
    run_command("preprocess", library="tokenizers")
