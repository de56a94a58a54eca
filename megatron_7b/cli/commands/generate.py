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

from megatron_7b.cli.checkpoint_command import CheckpointCommand, checkpoint_parser
from megatron_7b.cli.generated_text import print_texts
from megatron_7b.cli.options import Parser, parse_arguments
from megatron_7b.errors import ConfigError
from megatron_7b.generation.grammars import Grammar
from megatron_7b.generation.options import GenerationOptions
from megatron_7b.generation.prompts import Prompt
from megatron_7b.generation.setup import (
    DEFAULT_MAX_NEW_TOKENS,
    REQUIREMENTS,
    GenerationSetup,
    check_kind,
    check_one_copy,
    read_setup,
)
from megatron_7b.runtime.process.logs import configure_logging

SUMMARY = "continue a text with a checkpoint"


def main(argv: list[str]) -> int:
    """Run the command; returns 0 when all texts are printed.

    Raises:
        MegatronError: Before any model is built where possible.
    """
    command = CheckpointCommand.read(parse_arguments(_parser(), argv), REQUIREMENTS)
    flags = command.command_line.flags
    options = _options(flags)
    check_kind(command.folder, command.config)
    texts = _read_texts(flags)  # once: a pipe gives its text once
    setup = read_setup(command.folder, command.config, flags.tokenizer)
    prompts = (_read_chat if _is_chat(flags) else _read_prompts)(texts, flags, setup)
    check_one_copy(command.layout, command.world_size)
    setup.requests(prompts, options)  # refuses what the model's context has no room for, before ranks are started
    if not command.runs_here:
        return command.launch("generate", argv)
    return _generate(setup, prompts, options, fp32_on_cpu=command.fp32_on_cpu, as_json=flags.json)


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
        help=f"the text ends here at the latest; default: {DEFAULT_MAX_NEW_TOKENS}, or what the context leaves",
    )
    parser.add_argument(
        "--ignore-eod", "--ignore-eos", action="store_true", help="continue after the tokens that end a text"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
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
    sampling.add_argument(
        "--presence-penalty", type=float, default=0.0, metavar="P", help="taken off logits of tokens the answer has"
    )
    sampling.add_argument(
        "--frequency-penalty", type=float, default=0.0, metavar="P", help="taken off them as often as it has them"
    )
    sampling.add_argument(
        "--min-new-tokens", type=int, default=0, metavar="N", help="no token that ends the text comes before these"
    )
    sampling.add_argument(
        "--logprobs",
        type=int,
        metavar="K",
        help="with --json: the log probability of each token, and the K most probable ones in its place",
    )
    sampling.add_argument("--seed", type=int, default=1234, help="the same seed gives the same text")
    sampling.add_argument(
        "--num-samples",
        "--num-return-sequences",
        type=int,
        default=1,
        metavar="N",
        help="texts per prompt: samples, or the best ones of a beam search",
    )
    _add_grammars(parser)
    _add_beam_search(parser)
    return parser


def _add_grammars(parser: Parser) -> None:
    grammar = parser.add_argument_group("what texts must fit (needs the extra `serve`)").add_mutually_exclusive_group()
    grammar.add_argument("--json-schema", type=Path, metavar="FILE", help="file with a JSON schema")
    grammar.add_argument("--json-object", action="store_true", help="any JSON object")
    grammar.add_argument("--regex", metavar="PATTERN", help="a regular expression that the whole text matches")


def _add_beam_search(parser: Parser) -> None:
    beams = parser.add_argument_group("beam search")
    beams.add_argument(
        "--num-beams", type=int, metavar="N", help="look for the most probable texts, continuing N side by side"
    )
    beams.add_argument(
        "--length-penalty",
        type=float,
        metavar="A",
        help="log probabilities are divided by length to this power; default: 1; above 0 favors longer texts",
    )
    beams.add_argument(
        "--early-stopping",
        nargs="?",
        const="true",
        choices=("true", "false", "never"),
        help="stop once N texts are complete (true), once no better one is likely (false, the default), or possible",
    )


def _options(flags: argparse.Namespace) -> GenerationOptions:
    """Return what the flags ask for, found wrong before anything is read."""
    if flags.logprobs is not None and not flags.json:
        raise ConfigError("--logprobs is printed with --json only", hint="add --json")
    if flags.greedy and flags.temperature:
        raise ConfigError(f"--greedy and --temperature {flags.temperature:g} contradict each other")
    if flags.greedy and (flags.num_beams or 1) > 1:
        raise ConfigError(
            f"--greedy and --num-beams {flags.num_beams} contradict each other",
            hint="leave out --greedy: a beam search draws nothing",
        )
    return GenerationOptions(
        max_new_tokens=flags.max_new_tokens,
        num_return_sequences=flags.num_samples,
        temperature=0.0 if flags.greedy else flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        repetition_penalty=flags.repetition_penalty,
        seed=flags.seed,
        num_beams=flags.num_beams,
        length_penalty=flags.length_penalty,
        early_stopping={"true": True, "false": False, "never": "never", None: None}[flags.early_stopping],
        ignore_eod=flags.ignore_eod,
        stop=tuple(flags.stop),
        presence_penalty=flags.presence_penalty,
        frequency_penalty=flags.frequency_penalty,
        min_new_tokens=flags.min_new_tokens,
        logprobs=flags.logprobs,
        response_format=_grammar(flags),
    )


def _grammar(flags: argparse.Namespace) -> Grammar | None:
    """Return what texts must fit."""
    if flags.regex is not None:
        return Grammar("regex", flags.regex)
    if flags.json_schema is None:
        return Grammar("json_object") if flags.json_object else None
    try:
        return Grammar("json_schema", flags.json_schema.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--json-schema {flags.json_schema} cannot be read: {error}") from error


def _is_chat(flags: argparse.Namespace) -> bool:
    return bool(flags.chat or flags.system is not None or flags.messages is not None)


def _read_prompts(texts: Sequence[str], flags: argparse.Namespace, setup: GenerationSetup) -> list[Prompt]:
    if flags.add_bos and setup.tokenizer.bos_id is None:
        raise ConfigError("--add-bos is set, but the tokenizer has no bos token")
    return [setup.encode(text, add_bos=flags.add_bos) for text in texts]


def _read_chat(texts: Sequence[str], flags: argparse.Namespace, setup: GenerationSetup) -> list[Prompt]:
    """Return one conversation per text that was given, or the one of --messages."""
    from megatron_7b.generation.chat import read_conversation
    from megatron_7b.tokenizer.chat_template import Conversation

    if flags.add_bos is not None:
        raise ConfigError("--add-bos and --no-add-bos do not go with a chat: its template says how it begins")
    start = read_conversation(flags.messages) if flags.messages is not None else Conversation(())
    messages = list(start.messages)
    if flags.system is not None:
        if messages and messages[0].get("role") == "system":
            raise ConfigError("--system is set, but --messages begins with a system message already")
        messages.insert(0, {"role": "system", "content": flags.system})
    questions = [[{"role": "user", "content": text}] for text in texts]
    conversations = [dataclasses.replace(start, messages=[*messages, *question]) for question in questions or [[]]]
    return [setup.encode_chat(conversation) for conversation in conversations]


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
    setup: GenerationSetup, prompts: Sequence[Prompt], options: GenerationOptions, *, fp32_on_cpu: bool, as_json: bool
) -> int:
    """Generate on this rank, and print on the main one."""
    configure_logging(int(os.environ.get("RANK", "0")))  # before libraries are imported that warn while they load
    from megatron_7b.generation.session import DEFAULT_MAX_BATCH_SIZE, Session

    max_batch_size = max(DEFAULT_MAX_BATCH_SIZE, options.num_beams or 1)
    with Session(setup, fp32_on_cpu=fp32_on_cpu, max_batch_size=max_batch_size) as session:
        samples = [sample for prompt in prompts for sample in session.submit(prompt, options)]
        if session.is_main:
            if note := setup.describe(options):
                print(note, file=sys.stderr)
            print_texts(session.run(), samples, num_prompt_tokens=sum(len(one.ids) for one in prompts), as_json=as_json)
        else:
            for _ in session.run():  # every rank takes every step
                pass
    return 0
