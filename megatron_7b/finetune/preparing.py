"""From a configuration that names what users have (JSONL files, a Hugging Face folder) to one that can be trained.

What is made is put into the run folder, under names that say what it was made from. So it is made once, the same
command finds it, and nothing that a run has read is ever overwritten.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

from megatron_7b.checkpoint import config_file, resolve_checkpoint, tokenizer_path
from megatron_7b.config import RunConfig, load_config
from megatron_7b.errors import ConfigError, MegatronError
from megatron_7b.finetune.base import has_tokenizer, import_base, is_hugging_face_folder
from megatron_7b.finetune.conversations import prepare_chat
from megatron_7b.objective import build_objective
from megatron_7b.tokenizer import load_tokenizer

type Report = Callable[[str, str], None]

_OWN_MODEL_OPTIONS = ("transformer_impl", "hidden_dropout", "attention_dropout")
_SECONDS_BETWEEN_LOOKS = 0.5


def prepare_finetuning(
    config: RunConfig, run_dir: Path, report: Report, *, is_preparing: bool = True, patience: float = 3600.0
) -> RunConfig:
    """Make what a fine-tuning run needs, or find it.

    Args:
        config: As the user gave it: `data.train` and `data.valid` name JSONL files (or corpora of conversations),
            `checkpoint.initialize_from` a checkpoint or a Hugging Face folder.
        run_dir: The run folder.
        report: Takes what is being done.
        is_preparing: Make what is missing; the other ranks of a run wait for it.
        patience: How long they wait [seconds].

    Returns:
        The configuration of the run: the model's shape is that of the weights, corpora are named by prefix.

    Raises:
        ConfigError: An option is missing or impossible.
        DataFormatError: Conversations cannot be used; all mistakes are named with file and line.
        MegatronError: The main rank has not prepared the run in time.

    Collective: none; with several ranks all of them call it.
    """
    _check(config)
    if is_preparing:
        return _prepare(config, run_dir, report, make=True)
    deadline = time.monotonic() + patience
    while True:
        try:
            return _prepare(config, run_dir, report, make=False)
        except FileNotFoundError as missing:
            if time.monotonic() > deadline:
                raise MegatronError(
                    f"{missing} did not appear within {patience:.0f} s, which the main rank makes",
                    hint="give all ranks one run folder on a file system that they share",
                ) from None
            time.sleep(_SECONDS_BETWEEN_LOOKS)


def _check(config: RunConfig) -> None:
    """Refuse what shows at a glance."""
    if config.finetune.task is None:
        raise ConfigError("finetune.task is not set", hint="--finetune.task chat learns from conversations")
    if config.checkpoint.initialize_from is None:
        raise ConfigError(
            "checkpoint.initialize_from is not set: fine-tuning starts from weights",
            hint="--checkpoint.initialize-from names a checkpoint, a run folder, or a Hugging Face folder",
        )
    if not config.data.train:
        raise ConfigError("data.train is not set", hint="--data.train F.jsonl names the conversations")
    epochs = config.finetune.epochs
    if epochs is not None and not 0 < epochs < math.inf:
        raise ConfigError(f"finetune.epochs is {epochs}, expected more than 0")
    if epochs is not None and config.training.rampup_batch_size is not None:
        raise ConfigError(
            "finetune.epochs does not go with training.rampup_batch_size", hint="set training.train_steps"
        )


def _prepare(config: RunConfig, run_dir: Path, report: Report, *, make: bool) -> RunConfig:
    start = _find_start(Path(str(config.checkpoint.initialize_from)))
    carried = _tokenizer_of(start)
    named = config.data.tokenizer or carried
    if named is None:
        raise ConfigError(f"{start} carries no tokenizer", hint="--data.tokenizer names it")
    loaded = load_tokenizer(named)
    if carried not in (None, named) and load_tokenizer(carried).identity != loaded.identity:
        raise ConfigError(
            f"data.tokenizer is {named}, but the weights of {start} were trained with another one",
            hint="leave data.tokenizer out; --finetune.chat-template FILE changes the template alone",
        )
    chat = prepare_chat(config, loaded, run_dir, report, make=make)  # its mistakes are found at once
    base = import_base(start, run_dir, report, make=make) if is_hugging_face_folder(start) else start
    tokenizer = chat.tokenizer or tokenizer_path(base)
    config = _with_shape_of(config, base)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, train=chat.train, valid=chat.valid, tokenizer=str(tokenizer)),
        objective=dataclasses.replace(config.objective, name=config.finetune.task),
        checkpoint=dataclasses.replace(config.checkpoint, initialize_from=str(base)),
    )
    return _with_steps(config)


def _find_start(start: Path) -> Path:
    """Return the Hugging Face folder or the checkpoint that a path leads to."""
    if not start.exists():
        raise ConfigError(
            f"checkpoint.initialize_from is {start}, which does not exist",
            hint="name a checkpoint, a run folder, or a Hugging Face folder",
        )
    return start if is_hugging_face_folder(start) else resolve_checkpoint(start)


def _tokenizer_of(start: Path) -> Path | None:
    if not is_hugging_face_folder(start):
        return tokenizer_path(start)
    return start if has_tokenizer(start) else None


def _with_shape_of(config: RunConfig, base: Path) -> RunConfig:
    """Take the model of the weights, but for what a run may choose itself."""
    own = {name: getattr(config.model, name) for name in _OWN_MODEL_OPTIONS}
    return dataclasses.replace(config, model=dataclasses.replace(load_config(config_file(base)).model, **own))


def _with_steps(config: RunConfig) -> RunConfig:
    """Turn epochs into steps."""
    if config.finetune.epochs is None:
        return config
    rows = build_objective(config).open_windows(config, "train").num_samples
    steps = math.ceil(config.finetune.epochs * rows / config.training.global_batch_size)
    return dataclasses.replace(config, training=dataclasses.replace(config.training, train_steps=max(1, steps)))
