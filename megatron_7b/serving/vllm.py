"""vLLM in the place of our engine: the way for production on GPUs. Imports nothing heavy, nor vLLM itself."""

import argparse
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from typing import NoReturn

from megatron_7b.errors import ConfigError
from megatron_7b.serving.options import ServerOptions

_PARALLEL = {
    "parallel.tensor_model_parallel_size": "--tensor-parallel-size",
    "parallel.pipeline_model_parallel_size": "--pipeline-parallel-size",
}
_OURS_ALONE = (
    "max_waiting", "max_body_mib", "max_request_seconds", "receive_seconds", "stop_seconds", "nproc", "nnodes",
    "converted",
)  # fmt: skip
"""Flags that say something of our server, or of ranks that vLLM starts by itself."""

_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def replace_by_vllm(flags: argparse.Namespace, options: ServerOptions, overrides: Mapping[str, object]) -> NoReturn:
    """Become `vllm serve` with the same options; returns only as an error.

    Raises:
        ConfigError: vLLM is not installed, or an option has no counterpart there.
    """
    command, environment = vllm_command(flags, options, overrides)
    os.execvpe(command[0], command, {**os.environ, **environment})


def vllm_command(
    flags: argparse.Namespace, options: ServerOptions, overrides: Mapping[str, object]
) -> tuple[list[str], dict[str, str]]:
    """Return the command, and the variables that it needs: keys are never words of a command, which everybody sees.

    Raises:
        ConfigError: vLLM is not installed, or an option has no counterpart there.
    """
    if flags.hf is None:
        raise ConfigError(
            "--engine vllm serves a Hugging Face folder",
            hint=f"megatron-7b convert to-hf --checkpoint {flags.checkpoint} --output H, then --engine vllm --hf H",
        )
    if not flags.hf.is_dir():
        raise ConfigError(f"--hf {flags.hf} is no folder", hint="a folder with config.json and *.safetensors")
    start = _start(flags)
    if len(options.api_keys) > 1:
        raise ConfigError(f"--engine vllm takes one key, and --api-key-file has {len(options.api_keys)}")
    unknown = sorted(set(overrides) - set(_PARALLEL) - {"precision.params_dtype"})
    unknown += [f"--{name.replace('_', '-')}" for name in _OURS_ALONE if _is_given(flags, name)]
    if unknown:
        raise ConfigError(
            f"--engine vllm has no counterpart of {', '.join(unknown)}", hint="--vllm-args takes options of vLLM itself"
        )
    command = [*start, str(flags.hf), "--host", options.host, "--port", str(options.port)]
    command += ["--served-model-name", flags.name or flags.hf.resolve().name]
    command += ["--max-num-seqs", str(options.max_batch_size)]
    if options.max_cache_gib is not None:
        command += ["--kv-cache-memory-bytes", str(int(options.max_cache_gib * 2**30))]
    if not options.prefix_cache:
        command += ["--no-enable-prefix-caching"]
    for path, option in _PARALLEL.items():
        if path in overrides:
            command += [option, str(overrides[path])]
    if "precision.params_dtype" in overrides:
        command += ["--dtype", _DTYPES.get(str(overrides["precision.params_dtype"]), "auto")]
    if flags.tokenizer is not None:
        command += ["--tokenizer", str(flags.tokenizer)]
    if flags.adapter:
        command += ["--enable-lora", "--lora-modules", *map(_lora_module, flags.adapter)]
    command += _further(flags.vllm_args, command)
    return command, {"VLLM_API_KEY": options.api_keys[0]} if options.api_keys else {}


def _start(flags: argparse.Namespace) -> list[str]:
    """Return the words that start vLLM, up to the model."""
    if flags.vllm_python is not None:
        python = shutil.which(flags.vllm_python)
        if python is None:
            raise ConfigError(f"--vllm-python {flags.vllm_python} is no program")
        return [python, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    program = shutil.which("vllm")
    if program is None:
        raise ConfigError(
            "--engine vllm needs vLLM, and there is no program `vllm` in the PATH",
            hint="--vllm-python names the interpreter of the environment that has it (pip install vllm, in one of its "
            "own); or leave out --engine, and ours serves the folder",
        )
    return [program, "serve"]


def _is_given(flags: argparse.Namespace, name: str) -> bool:
    default = 1 if name == "nnodes" else getattr(ServerOptions, name, None)
    return bool(getattr(flags, name) != default)


def _further(text: str | None, command: Sequence[str]) -> list[str]:
    """Return the options of vLLM that were given as they are.

    Raises:
        ConfigError: The quotes do not match, or this command says one already: an open address would need no key.
    """
    try:
        words = shlex.split(text or "")
    except ValueError as error:
        raise ConfigError(f"--vllm-args {text!r}: {error}") from None
    said = {word.replace("_", "-") for word in (*command, "--api-key", "--model") if word.startswith("--")}
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        # An option may be shortened: --hos is --host.
        if name.startswith("--") and any(option.startswith(name) for option in said):
            raise ConfigError(f"--vllm-args has {word}, which options of `serve` say already")
    return words


def _lora_module(text: str) -> str:
    name, has_name, folder = text.rpartition("=")
    name = name if has_name else os.path.basename(os.path.normpath(folder))  # noqa: PTH119
    if not os.path.isfile(os.path.join(folder, "adapter_config.json")):  # noqa: PTH113, PTH118
        raise ConfigError(
            f"--adapter {text} is no folder that PEFT has saved, which --engine vllm needs",
            hint="megatron-7b convert to-hf --checkpoint ADAPTER --output A writes one",
        )
    return f"{name}={folder}"
