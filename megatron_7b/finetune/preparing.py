"""From a configuration that names what users have (JSONL files, a Hugging Face folder) to one that can be trained.

What is made is put into the run folder, under names that say what it was made from. So it is made once, the same
command finds it, and nothing that a run has read is ever overwritten.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import cast

from megatron_7b.checkpoint import config_file, resolve_checkpoint, tokenizer_path
from megatron_7b.checkpoint.base import check_is_whole
from megatron_7b.config import RunConfig, load_config
from megatron_7b.config.conflicts import find_conflicts
from megatron_7b.config.loading import override_config
from megatron_7b.config.problems import raise_problems
from megatron_7b.config.tasks import TASKS
from megatron_7b.conversion import HuggingFaceFolder, from_hugging_face_config
from megatron_7b.errors import ConfigError
from megatron_7b.finetune.base import has_tokenizer, import_base, is_hugging_face_folder
from megatron_7b.finetune.preparation import Preparation, Report
from megatron_7b.finetune.tasks import PREPARERS
from megatron_7b.finetune.waiting import waiting_for
from megatron_7b.model.starting_head import HEAD_FIELDS
from megatron_7b.objective import build_objective
from megatron_7b.tokenizer import load_tokenizer

_OWN_MODEL_OPTIONS = ("transformer_impl", "hidden_dropout", "attention_dropout")

_NOT_KNOWN_YET = frozenset(
    {
        *(f"model.{name}" for name in HEAD_FIELDS),
        "model.add_binary_head",
        "model.share_embeddings_and_output_weights",
        "data.train",
        "data.valid",
        "finetune.may_lack_answer",
        "training.train_steps",
    }
)
"""What only the data and the weights decide, not config.json and the options."""


def prepare_finetuning(
    config: RunConfig,
    run_dir: Path,
    report: Report,
    *,
    model_options: Mapping[str, object] = MappingProxyType({}),
    world_size: int | None = None,
    check: Callable[[RunConfig], None] = lambda _: None,
    is_preparing: bool = True,
    patience: float = 3600.0,
) -> RunConfig:
    """Make what a fine-tuning run needs, or find it.

    Args:
        config: As the user gave it: `data.train` and `data.valid` name JSONL files (or corpora made of such),
            `checkpoint.initialize_from` a checkpoint or a Hugging Face folder.
        run_dir: The run folder.
        report: Takes what is being done.
        model_options: Options of the model, by dotted path, that go before the weights' own.
        world_size: Number of ranks, if it is known: what does not fit is then refused before anything is made.
        check: Is given the run, as far as it is known, before anything is made.
        is_preparing: Make what is missing; the other ranks of a run wait for it.
        patience: How long they wait [seconds].

    Returns:
        The configuration of the run: the model's shape is that of the weights, corpora are named by prefix.

    Raises:
        ConfigError: An option is missing or impossible.
        DataFormatError: Records cannot be used; all mistakes are named with file and line.
        MegatronError: The main rank has not prepared the run in time.

    Collective: none; with several ranks all of them call it.
    """
    check_asked(config)

    def check_all(known: RunConfig) -> None:
        raise_problems(find_conflicts(known, world_size=world_size, ignore=_NOT_KNOWN_YET))
        check(known)

    def prepare(make: bool) -> RunConfig:
        return _prepare(config, run_dir, report, model_options, check_all, make=make)

    return waiting_for(prepare, is_preparing, patience)


def check_asked(config: RunConfig) -> None:
    """Refuse what shows at a glance of a configuration as the user gave it.

    Raises:
        ConfigError: It names no task, no weights or no data, or an option of the task is impossible.
    """
    if config.finetune.task is None:
        raise ConfigError("finetune.task is not set", hint=f"--finetune.task names one of {', '.join(PREPARERS)}")
    if config.checkpoint.initialize_from is None:
        raise ConfigError(
            "checkpoint.initialize_from is not set: fine-tuning starts from weights",
            hint="--checkpoint.initialize-from names a checkpoint, a run folder, or a Hugging Face folder",
        )
    if not config.data.train:
        raise ConfigError("data.train is not set", hint="--data.train F.jsonl names the records to learn from")
    # Other sections are checked when the run is complete: they depend on the weights, and on what the data decide.
    raise_problems([problem for problem in find_conflicts(config) if problem.path.startswith("finetune.")])
    epochs = config.finetune.epochs
    if epochs is not None and not 0 < epochs < math.inf:
        raise ConfigError(f"finetune.epochs is {epochs}, expected more than 0")
    if epochs is not None and config.training.rampup_batch_size is not None:
        raise ConfigError(
            "finetune.epochs does not go with training.rampup_batch_size", hint="set training.train_steps"
        )


def _prepare(
    config: RunConfig,
    run_dir: Path,
    report: Report,
    model_options: Mapping[str, object],
    check: Callable[[RunConfig], None],
    *,
    make: bool,
) -> RunConfig:
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
    task = str(config.finetune.task)
    objective = dataclasses.replace(config.objective, name=TASKS[task])
    config = dataclasses.replace(_with_model(config, start, model_options), objective=objective)
    check(config)  # encoding data and importing weights may take an hour
    wanted = Preparation(config=config, tokenizer=loaded, start=start, run_dir=run_dir, report=report, make=make)
    prepared = PREPARERS[task](wanted)  # its mistakes are found at once
    base = start
    if is_hugging_face_folder(start):
        head, seed = _head_of_import(config, prepared.settings), config.training.seed
        base = import_base(start, run_dir, report, make=make, head=head, seed=seed)
    tokenizer = prepared.tokenizer or tokenizer_path(base)
    config = _with_model(config, base, model_options)  # only the weights say for sure which of them are tied
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, train=prepared.train, valid=prepared.valid, tokenizer=str(tokenizer)),
        checkpoint=dataclasses.replace(config.checkpoint, initialize_from=str(base)),
    )
    settings = {**prepared.settings, **model_options}
    return _with_steps(override_config(config, settings) if settings else config)


def _head_of_import(config: RunConfig, settings: Mapping[str, object]) -> dict[str, object] | None:
    """Return the head that the import of an encoder gets, so that the folder's pooler is part of it.

    A decoder's head has nothing from before it, and is fresh when the run starts.
    """
    if config.model.traits.kind != "encoder" or "model.head" not in settings:
        return None
    head = {name: settings[f"model.{name}"] for name in HEAD_FIELDS}
    return {**head, "labels": tuple(cast("list[str]", head["labels"]))}


def _find_start(start: Path) -> Path:
    """Return the Hugging Face folder or the checkpoint that a path leads to."""
    if not start.exists():
        raise ConfigError(
            f"checkpoint.initialize_from is {start}, which does not exist",
            hint="name a checkpoint, a run folder, or a Hugging Face folder",
        )
    if is_hugging_face_folder(start):
        return start
    checkpoint = resolve_checkpoint(start)
    check_is_whole(checkpoint)
    return checkpoint


def _tokenizer_of(start: Path) -> Path | None:
    if not is_hugging_face_folder(start):
        return tokenizer_path(start)
    return start if has_tokenizer(start) else None


def _with_model(config: RunConfig, start: Path, model_options: Mapping[str, object]) -> RunConfig:
    """Take the model of the weights, but for what a run may choose itself."""
    if is_hugging_face_folder(start):
        model = from_hugging_face_config(HuggingFaceFolder(start).config)
    else:
        model = load_config(config_file(start)).model
    own = {name: getattr(config.model, name) for name in _OWN_MODEL_OPTIONS}
    config = dataclasses.replace(config, model=dataclasses.replace(model, **own))
    return override_config(config, model_options) if model_options else config


def _with_steps(config: RunConfig) -> RunConfig:
    """Turn epochs into steps."""
    if config.finetune.epochs is None:
        return config
    rows = build_objective(config).open_windows(config, "train").num_samples
    steps = math.ceil(config.finetune.epochs * rows / config.training.global_batch_size)
    return dataclasses.replace(config, training=dataclasses.replace(config.training, train_steps=max(1, steps)))
