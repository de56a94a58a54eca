"""Companions: what belongs to a model beside its weights, carried from import to export as it is.

An import puts them into its checkpoint; a run that starts from there keeps them in its folder, each of its checkpoints
carries them on, and an export gives them back. Nothing in between changes a byte of them.

    tokenizer/     files of the tokenizer, chat templates included
    hugging_face/  what else an imported folder held and this project does not own: its config.json,
                   generation_config.json, licence, …
"""

import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_7b.checkpoint.manifest import read_manifest
from megatron_7b.checkpoint.records import HUGGING_FACE, TOKENIZER, check_nothing_foreign, names_below, verify_files
from megatron_7b.errors import CheckpointError

_FILES_WITH_IDS = ("generation_config.json", "config.json")


@dataclass(frozen=True)
class Companions:
    """Where the companions of a checkpoint or a run are.

    Attributes:
        tokenizer: Folder of the tokenizer's files; None: no tokenizer is known.
        hugging_face: Folder of what else the imported folder held; None: the weights come from no import.
    """

    tokenizer: Path | None = None
    hugging_face: Path | None = None

    @classmethod
    def of(cls, folder: Path) -> "Companions":
        """Find the companions of a run folder."""
        return cls(tokenizer=_existing(folder / TOKENIZER), hugging_face=_existing(folder / HUGGING_FACE))

    @classmethod
    def of_checkpoint(cls, folder: Path) -> "Companions":
        """Find the companions of a checkpoint, once their hashes were found right.

        Raises:
            CheckpointError: The folder is not a checkpoint, or its companions are damaged.
        """
        files = read_manifest(folder).files
        check_nothing_foreign(folder, files)
        names = {part: names_below(files, part) for part in (TOKENIZER, HUGGING_FACE)}
        verify_files(folder, files, names=itertools.chain(*names.values()))
        return cls(
            tokenizer=folder / TOKENIZER if names[TOKENIZER] else None,
            hugging_face=folder / HUGGING_FACE if names[HUGGING_FACE] else None,
        )

    def copy_to(self, folder: Path) -> None:
        """Copy them into a checkpoint or run folder that has none yet."""
        for source, name in ((self.tokenizer, TOKENIZER), (self.hugging_face, HUGGING_FACE)):
            if source is not None:
                shutil.copytree(source, folder / name)


NO_COMPANIONS = Companions()


def forget_other_ids(hugging_face: Path, eod_id: int | None) -> None:
    """Remove what names the tokens of another tokenizer, where an import had none and a run brings one.

    Args:
        hugging_face: A run's own copy.
        eod_id: The run's end of document; another end in the imported files shows that they mean another tokenizer.
    """
    ends = text_end_ids(hugging_face)
    if eod_id is not None and ends and eod_id not in ends:
        for name in _FILES_WITH_IDS:
            (hugging_face / name).unlink(missing_ok=True)


def text_end_ids(hugging_face: Path) -> frozenset[int]:
    """Return the tokens that end a generated text: those of generation_config.json, or else of config.json.

    Raises:
        CheckpointError: A file is not a JSON object.
    """
    for name in _FILES_WITH_IDS:
        if (hugging_face / name).is_file():
            ids = _read(hugging_face / name).get("eos_token_id")
            return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return frozenset()


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, expected a JSON object")
    return content


def tokenizer_path(folder: Path) -> Path | None:
    """Return the tokenizer folder of a checkpoint, or None if it has none; raises as `Companions.of_checkpoint`."""
    return Companions.of_checkpoint(folder).tokenizer


def _existing(folder: Path) -> Path | None:
    return folder if folder.is_dir() else None
