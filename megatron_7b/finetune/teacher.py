"""The teacher that a run learns from, where it is a Hugging Face folder: imported once, into the run folder."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from megatron_7b.config.schema import RunConfig
from megatron_7b.conversion import HuggingFaceFolder, from_hugging_face_config
from megatron_7b.finetune.base import has_tokenizer, import_base, is_hugging_face_folder
from megatron_7b.finetune.waiting import waiting_for
from megatron_7b.tokenizer import load_tokenizer
from megatron_7b.training.teacher_check import check_tokens


def prepare_teacher(
    config: RunConfig,
    run_dir: Path,
    report: Callable[[str, str], None],
    *,
    is_preparing: bool = True,
    patience: float = 3600.0,
) -> RunConfig:
    """Return the configuration with a checkpoint as the teacher; a Hugging Face folder is imported as `teacher-…`.

    Args:
        config: The run.
        run_dir: The run folder.
        report: Takes what is being done.
        is_preparing: Import it; the other ranks of a run wait for it.
        patience: How long they wait [seconds].

    Raises:
        ConfigError: It has other tokens.
        ConversionError: The folder cannot be converted exactly.
        MegatronError: The main rank has not prepared it in time.

    Collective: none; with several ranks all of them call it.
    """
    named = config.distillation.teacher
    if named is None or not is_hugging_face_folder(Path(named)):
        return config

    folder = Path(named)
    vocab_size = from_hugging_face_config(HuggingFaceFolder(folder).config).vocab_size
    tokenizer = None if config.data.tokenizer is None else load_tokenizer(config.data.tokenizer)
    check_tokens(config, folder, vocab_size, folder if has_tokenizer(folder) else None, tokenizer)

    def prepare(make: bool) -> Path:
        return import_base(folder, run_dir, report, make=make, name="teacher")

    teacher = waiting_for(prepare, is_preparing, patience)
    return dataclasses.replace(config, distillation=dataclasses.replace(config.distillation, teacher=str(teacher)))
