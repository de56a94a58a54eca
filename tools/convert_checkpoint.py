#!/usr/bin/env python3
"""Checkpoints to Hugging Face folders and back: the same as `megatron-7b convert`; see --help."""

from environment import run_command

if __name__ == "__main__":
    run_command("convert", library="safetensors")
