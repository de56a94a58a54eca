"""`megatron-7b serve`: a checkpoint behind an HTTP interface that OpenAI's clients speak.

megatron-7b serve --checkpoint RUN
megatron-7b serve --hf HF_FOLDER --port 8080
megatron-7b serve --checkpoint RUN --host 0.0.0.0 --api-key-file keys --nproc 2 --parallel.tensor-model-parallel-size 2
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import socket
import subprocess
from pathlib import Path

from megatron_7b.checkpoint import resolve_checkpoint
from megatron_7b.checkpoint.inference_config import inference_config
from megatron_7b.cli.checkpoint_command import CheckpointCommand
from megatron_7b.cli.options import CommandLine, Parser, parse_arguments
from megatron_7b.cli.ranks import add_launch_flags
from megatron_7b.config.problems import raise_problems
from megatron_7b.errors import ConfigError
from megatron_7b.generation.setup import REQUIREMENTS
from megatron_7b.runtime.process.launch import is_rank, megatron_command
from megatron_7b.runtime.process.logs import configure_logging
from megatron_7b.runtime.process.terminal import say
from megatron_7b.serving.listening import take_address
from megatron_7b.serving.options import ServerOptions, read_api_keys
from megatron_7b.serving.vllm import replace_by_vllm

SUMMARY = "serve checkpoints over HTTP, for OpenAI's clients"


def main(argv: list[str]) -> int:
    """Run the command; returns 0 when it was asked to stop and has answered what was running.

    Raises:
        MegatronError: Before any model is built where possible.
    """
    command_line = parse_arguments(_parser(), argv)
    flags = command_line.flags
    if (flags.checkpoint is None) == (flags.hf is None):
        raise ConfigError("expected --checkpoint C, or --hf H, and not both")
    options = _options(flags)
    if flags.engine == "vllm":
        raise_problems(command_line.problems)
        replace_by_vllm(flags, options, command_line.overrides)
    if flags.vllm_python is not None or flags.vllm_args is not None:
        raise ConfigError("--vllm-python and --vllm-args are for --engine vllm")
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"serving needs {', '.join(missing)}", hint="pip install 'megatron_7b[serve]'")
    with contextlib.nullcontext() if is_rank() else take_address(options.host, options.port) as taken:
        if flags.hf is not None:
            command_line, argv = _converted(command_line, argv)
        return _serve(command_line, options, argv, taken)


def _converted(command_line: CommandLine, argv: list[str]) -> tuple[CommandLine, list[str]]:
    """Convert the Hugging Face folder; return the command line that names the checkpoint in its place."""
    flags = command_line.flags
    if is_rank():
        raise ConfigError(
            "--hf is converted once, before ranks are started; under a launcher each would do it",
            hint=f"megatron-7b convert from-hf --input {flags.hf} --output C, then --checkpoint C",
        )
    from megatron_7b.serving.converted import converted, default_folder

    def convert(output: Path) -> None:
        words = ["convert", "from-hf", "--input", str(flags.hf), "--output", str(output)]
        if (code := subprocess.run(megatron_command(words)).returncode) != 0:
            raise SystemExit(code)  # it has said why

    return _of_checkpoint(command_line, argv, converted(flags.hf, flags.converted or default_folder(), convert))


def _parser() -> Parser:
    parser = Parser("serve", SUMMARY, with_config=True)
    parser.add_argument("--checkpoint", type=Path, help="step folder, RUN/checkpoints/latest, or a run folder")
    parser.add_argument(
        "--hf", type=Path, metavar="H", help="a Hugging Face folder instead; converted at the first start"
    )
    parser.add_argument(
        "--converted", type=Path, metavar="DIR",
        help="where conversions of --hf are kept; default: ~/.cache/megatron_7b/converted",
    )  # fmt: skip
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]CHECKPOINT",
        help="adapter trained beside the checkpoint, a further model for clients; may be given several times",
    )
    parser.add_argument("--name", help="what clients call the model; default: the run's or the folder's name")
    parser.add_argument("--tokenizer", type=Path, help="instead of the one that the checkpoint carries")
    parser.add_argument("--engine", choices=("own", "vllm"), default="own", help="vllm starts `vllm serve` with --hf")
    parser.add_argument("--vllm-python", metavar="PYTHON", help="interpreter that has vLLM, if it is not in the PATH")
    parser.add_argument(
        "--vllm-args",
        metavar="WORDS",
        help="further options of vLLM: --vllm-args='--enforce-eager --max-model-len 4096'",
    )
    defaults = ServerOptions()
    web = parser.add_argument_group("web server")
    web.add_argument("--host", default=defaults.host, help="address to listen at; default: only this machine's")
    web.add_argument("--port", type=int, default=defaults.port, help="0 finds a free one; default: %(default)s")
    web.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys that let clients in, one per line")
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-batch-size", type=int, default=defaults.max_batch_size, metavar="N",
        help="texts that share a forward pass; default: %(default)s",
    )  # fmt: skip
    limits.add_argument(
        "--max-waiting", type=int, default=defaults.max_waiting, metavar="N",
        help="texts that may wait; further ones get 429; default: %(default)s",
    )  # fmt: skip
    limits.add_argument(
        "--max-cache-gib", type=float, metavar="G", help="memory for keys and values; default: 0.4 of what is free"
    )
    limits.add_argument(
        "--no-prefix-cache",
        dest="prefix_cache",
        action="store_false",
        help="keep nothing of texts that have ended; default: prompts that begin alike are read from there on",
    )
    for name, unit, what in (
        ("max_body_mib", "M", "larger requests get 413"),
        ("max_request_seconds", "S", "a request that takes longer is ended"),
        ("receive_seconds", "S", "a client has this long to send a request"),
        ("stop_seconds", "S", "after SIGTERM, running requests have this long to finish"),
    ):
        default = getattr(defaults, name)
        limits.add_argument(
            f"--{name.replace('_', '-')}",
            type=float,
            default=default,
            metavar=unit,
            help=f"{what}; default: {default:g}",
        )
    add_launch_flags(parser)
    return parser


def _options(flags: argparse.Namespace) -> ServerOptions:
    names = {field.name for field in dataclasses.fields(ServerOptions)} & set(vars(flags))
    keys = read_api_keys(flags.api_key_file) if flags.api_key_file is not None else ()
    return ServerOptions(**{name: getattr(flags, name) for name in names}, api_keys=keys)


def _of_checkpoint(command_line: CommandLine, argv: list[str], checkpoint: Path) -> tuple[CommandLine, list[str]]:
    """Return a command line with a checkpoint in the place of the folder that it was made from."""
    position = next(number for number, word in enumerate(argv) if word.partition("=")[0] == "--hf")
    length = 1 if "=" in argv[position] else 2
    name = command_line.flags.name or command_line.flags.hf.resolve().name
    words = [*argv[:position], *argv[position + length :], "--checkpoint", str(checkpoint), f"--name={name}"]
    return parse_arguments(_parser(), words), words


def _serve(command_line: CommandLine, options: ServerOptions, argv: list[str], taken: socket.socket | None) -> int:
    from megatron_7b.serving.opening import NamedAdapter, name_of, read_models, writes_texts

    flags = command_line.flags
    folder = resolve_checkpoint(flags.checkpoint)
    plain = inference_config(folder, command_line.overrides, problems=command_line.problems)
    command = CheckpointCommand.read(command_line, REQUIREMENTS if writes_texts(plain) else None)
    models = read_models(
        folder,
        command.config,
        name=flags.name or name_of(folder),
        tokenizer=flags.tokenizer,
        adapters=[NamedAdapter.parse(text) for text in flags.adapter],
        overrides=command_line.overrides,
    )
    if not command.runs_here:
        if taken is not None:
            taken.close()  # the main rank takes it again, at once
        return command.launch("serve", argv)
    configure_logging(int(os.environ.get("RANK", "0")))
    from megatron_7b.serving.running import serve

    def tell(address: str) -> None:
        say(f"serving {', '.join(model.name for model in models)} at {address} (Ctrl-C ends it)")

    serve(models, options, fp32_on_cpu=command.fp32_on_cpu, on_ready=tell, taken=taken)
    return 0
