"""`megatron-7b generate`: text from a training checkpoint, of any layout, at any layout.

    megatron-7b generate --checkpoint RUN/checkpoints/latest --prompt "The state of the union" --max-new-tokens 20
    megatron-7b generate --checkpoint CHAT_MODEL --chat --system "Be brief." --prompt "Who are you?"

A single text appears as it is generated; of several, each when it is complete.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_7b.checkpoint import Companions, tokenizer_path
from megatron_7b.cli.checkpoint_command import CheckpointCommand, checkpoint_parser
from megatron_7b.cli.generated_text import print_texts
from megatron_7b.cli.options import Parser, parse_arguments
from megatron_7b.cli.ranks import smallest_world_size
from megatron_7b.errors import CheckpointError, ConfigError
from megatron_7b.generation.prompts import Prompt, encode_prompt
from megatron_7b.generation.settings import GenerationSettings, read_generation_settings
from megatron_7b.runtime.process.logs import configure_logging
from megatron_7b.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from megatron_7b.generation.requests import GenerationRequest
    from megatron_7b.generation.sampling import SamplingOptions

SUMMARY = "continue a text with a checkpoint"

_MAX_NEW_TOKENS = 128
# The engine's cache and its positions per text need the torch-native layers, which compute in FP32 and BF16.
_REQUIREMENTS = {"model.transformer_impl": "local", "precision.fp8": "none"}


def main(argv: list[str]) -> int:
    """Run the command; returns 0 when all texts are printed.

    Raises:
        MegatronError: Before any model is built where possible.
    """
    command = CheckpointCommand.read(parse_arguments(_parser(), argv), _REQUIREMENTS)
    flags = command.command_line.flags
    _check_kind(command)
    if flags.num_samples < 1:
        raise ConfigError(f"--num-samples is {flags.num_samples}, expected at least 1")
    texts = _read_texts(flags)  # once: a pipe gives its text once
    tokenizer = _load_tokenizer(flags, command.folder)
    settings = read_generation_settings(Companions.of(command.folder).hugging_face)
    prompts = (_read_chat if _is_chat(flags) else _read_prompts)(texts, flags, tokenizer)
    if command.layout.dp_size > 1:
        raise ConfigError(
            f"{command.world_size} ranks hold more than one copy of the model",
            hint=f"generation takes --nproc {smallest_world_size(command.config.parallel)}",
        )
    return _generate(command, tokenizer, settings, prompts) if command.runs_here else command.launch("generate", argv)


def _parser() -> Parser:
    parser = checkpoint_parser("generate", SUMMARY)
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be given several times"
    )
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="file with one more prompt, all of its text")
    parser.add_argument("--tokenizer", type=Path, help="instead of the one that the checkpoint carries")
    parser.add_argument(
        "--add-bos",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="begin prompts with the tokenizer's bos token; default: as transformers does with this tokenizer",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"the text ends here at the latest; default: {_MAX_NEW_TOKENS}, or what the context leaves",
    )
    parser.add_argument(
        "--ignore-eod", "--ignore-eos", action="store_true", help="continue after the tokens that end a text"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    chat = parser.add_argument_group("chat")
    chat.add_argument(
        "--chat", action="store_true", help="prompts are messages of a user, put into the tokenizer's chat template"
    )
    chat.add_argument("--system", metavar="TEXT", help="system message that a chat begins with")
    chat.add_argument(
        "--messages", type=Path, metavar="FILE", help="JSON file with the messages before the prompt, or all of them"
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--greedy", action="store_true", help="always take the most probable token")
    sampling.add_argument(
        "--temperature", type=float, metavar="T", help="0 is greedy; default: as generation_config.json says, else 1"
    )
    sampling.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens")
    sampling.add_argument("--top-p", type=float, metavar="P", help="draw from the most probable tokens that share P")
    sampling.add_argument(
        "--repetition-penalty", type=float, metavar="R", help="above 1: tokens that the text has become less probable"
    )
    sampling.add_argument("--seed", type=int, default=1234, help="the same seed gives the same text")
    sampling.add_argument("--num-samples", type=int, default=1, metavar="N", help="texts per prompt")
    return parser


def _check_kind(command: CheckpointCommand) -> None:
    """Refuse a model that does not predict what comes next."""
    model = command.config.model
    if model.traits.kind != "decoder":
        raise ConfigError(
            f"{command.folder} holds a model of kind {model.traits.kind} ({model.architecture}), which cannot continue "
            "a text",
            hint="`megatron-7b evaluate` measures it; generation takes a decoder such as gpt2 or llama",
        )


def _load_tokenizer(flags: argparse.Namespace, folder: Path) -> Tokenizer:
    path = flags.tokenizer or tokenizer_path(folder)
    if path is None:
        raise CheckpointError(f"{folder} carries no tokenizer", hint="name one with --tokenizer DIR")
    return load_tokenizer(path)


def _is_chat(flags: argparse.Namespace) -> bool:
    return bool(flags.chat or flags.system is not None or flags.messages is not None)


def _read_prompts(texts: Sequence[str], flags: argparse.Namespace, tokenizer: Tokenizer) -> list[Prompt]:
    return [encode_prompt(text, tokenizer, add_bos=flags.add_bos) for text in texts]


def _read_chat(texts: Sequence[str], flags: argparse.Namespace, tokenizer: Tokenizer) -> list[Prompt]:
    """Return one conversation per text that was given, or the one of --messages."""
    from megatron_7b.generation.chat import encode_conversation, read_conversation
    from megatron_7b.tokenizer.chat_template import ChatTemplate, Conversation

    if flags.add_bos is not None:
        raise ConfigError("--add-bos and --no-add-bos do not go with a chat: its template says how it begins")
    template = ChatTemplate(tokenizer)
    start = read_conversation(flags.messages) if flags.messages is not None else Conversation(())
    messages = list(start.messages)
    if flags.system is not None:
        if messages and messages[0].get("role") == "system":
            raise ConfigError("--system is set, but --messages begins with a system message already")
        messages.insert(0, {"role": "system", "content": flags.system})
    questions = [[{"role": "user", "content": text}] for text in texts]
    return [
        encode_conversation(dataclasses.replace(start, messages=[*messages, *question]), template)
        for question in questions or [[]]
    ]


def _read_texts(flags: argparse.Namespace) -> list[str]:
    """Return the prompts, found wanting before the tokenizer is loaded, which may take seconds."""
    texts: list[str] = list(flags.prompt)
    if flags.prompt_file is not None:
        try:
            texts.append(flags.prompt_file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompt-file {flags.prompt_file} cannot be read: {error}") from error
    if not texts and not _is_chat(flags):
        raise ConfigError("there is nothing to continue", hint='give --prompt "TEXT" or --prompt-file FILE')
    if not texts and flags.messages is None:
        raise ConfigError("there is nothing to answer", hint='give --prompt "TEXT" or --messages FILE')
    return texts


def _generate(
    command: CheckpointCommand, tokenizer: Tokenizer, settings: GenerationSettings, prompts: Sequence[Prompt]
) -> int:
    """Generate on this rank, and print on the main one."""
    flags, config = command.command_line.flags, command.config
    configure_logging(int(os.environ.get("RANK", "0")))  # before libraries are imported that warn while they load
    from megatron_7b.checkpoint.open_model import opened_model
    from megatron_7b.generation.engine import GenerationEngine

    context = config.model.max_position_embeddings
    options, applied = _sampling(flags, settings)
    requests = _requests(prompts, flags, options, settings, context)
    # What ends a document in training ends a text, and what the imported folder says does too.
    ends = settings.stop_ids if tokenizer.eod_id is None else settings.stop_ids | {tokenizer.eod_id}
    with (
        opened_model(command.folder, config, fp32_on_cpu=command.fp32_on_cpu) as model,
        GenerationEngine(model.only_chunk, stop_ids=ends, max_length=context) as engine,
    ):
        tokens = engine.generate(requests)
        if model.layout.is_main:
            if note := settings.describe(applied):
                print(note, file=sys.stderr)
            print_texts(tokens, tokenizer, prompts, num_samples=flags.num_samples, as_json=flags.json)
        else:
            for _ in tokens:  # every rank takes every step
                pass
    return 0


def _sampling(flags: argparse.Namespace, settings: GenerationSettings) -> "tuple[SamplingOptions, set[str]]":
    """Return how tokens are chosen, and which defaults of the settings are applied: those that no flag replaces."""
    from megatron_7b.generation.sampling import SamplingOptions

    given = {name: getattr(flags, name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")}
    if flags.greedy:
        given["temperature"] = 0.0
    given = {name: value for name, value in given.items() if value is not None}
    applied = {name for name in settings.defaults if name not in given}
    if flags.max_new_tokens is not None:
        applied.discard("max_new_tokens")
    values = {name: settings.defaults[name] for name in applied if name != "max_new_tokens"} | given
    return SamplingOptions(**values, seed=flags.seed), applied


def _requests(
    prompts: Sequence[Prompt],
    flags: argparse.Namespace,
    options: "SamplingOptions",
    settings: GenerationSettings,
    context: int,
) -> "list[GenerationRequest]":
    """Return the samples of the first prompt, then those of the second, and so on, all within the context."""
    from megatron_7b.generation.requests import GenerationRequest

    wanted = int(settings.defaults.get("max_new_tokens", _MAX_NEW_TOKENS))
    requests = []
    for prompt in prompts:
        as_many_as_fit = max(1, min(wanted, context - len(prompt.ids)))
        for index in range(flags.num_samples):
            request = GenerationRequest(
                prompt_ids=prompt.ids,
                max_new_tokens=as_many_as_fit if flags.max_new_tokens is None else flags.max_new_tokens,
                sampling=options,
                sample_index=index,
                ignore_eod=flags.ignore_eod,
            )
            request.check_length(context)
            requests.append(request)
    return requests
