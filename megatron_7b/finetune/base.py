"""The weights that fine-tuning starts from, where they are a Hugging Face folder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import xxhash

from megatron_7b.config import RunConfig
from megatron_7b.conversion import ImportOptions, import_from_hugging_face
from megatron_7b.data.corpus.fingerprint import spot_hash
from megatron_7b.errors import ConfigError
from megatron_7b.runtime.process.launch import without_launcher
from megatron_7b.training.run_folder import RunFolder, read_saved_config

_CONFIG_FILE = "config.json"


def is_hugging_face_folder(folder: Path) -> bool:
    """Return whether a folder is one of Hugging Face's: a checkpoint has no config.json."""
    return (folder / _CONFIG_FILE).is_file()


def has_tokenizer(folder: Path) -> bool:
    """Return whether a Hugging Face folder has files of a tokenizer."""
    return any(folder.glob("tokenizer*")) or any((folder / name).is_file() for name in ("vocab.json", "vocab.txt"))


def import_base(
    source: Path,
    run_dir: Path,
    report: Callable[[str, str], None],
    *,
    make: bool,
    head: Mapping[str, object] | None = None,
    seed: int | None = None,
    name: Literal["base", "teacher"] = "base",
) -> Path:
    """Return the checkpoint that a Hugging Face folder was imported as; import it if that has not been done.

    Importing a large model takes minutes, so a run that goes on with another folder is refused before.

    Args:
        source: The folder.
        run_dir: Where the checkpoint is put, as `base-…` or `teacher-…`.
        report: Takes what is being done.
        make: Whether to import.
        head: Fields of the model section of an encoder that gets a head; None: it is imported as it is.
        seed: The run's, for a head that the folder lacks; that of its first start, if it goes on.
        name: What the checkpoint is to the run.

    Raises:
        ConfigError: The run began with another folder or head, or has learned from another teacher.
        ConversionError: The folder cannot be converted exactly.
        FileNotFoundError: It is missing, and not to be made.
    """
    before = read_saved_config(RunFolder(run_dir))
    seed = seed if before is None else before.training.seed
    output = run_dir / f"{name}-{_identity(source, (head, seed) if head is not None else None)}"
    if before is not None:
        check = _check_base if name == "base" else _check_teacher
        check(before, RunFolder(run_dir), source, output)
    if not output.is_dir():
        if not make:
            raise FileNotFoundError(output)
        run_dir.mkdir(parents=True, exist_ok=True)
        with without_launcher():
            import_from_hugging_face(source, output, ImportOptions(head=head, seed=seed), report)
    return output


def _check_base(before: RunConfig, run: RunFolder, source: Path, output: Path) -> None:
    """Refuse a folder whose checkpoint is not the one that was imported when the run began."""
    began = _imported_as(before.checkpoint.initialize_from, "base")
    if began not in (None, output.name):
        raise ConfigError(
            f"checkpoint.initialize_from is {source}, but the run in {run.root} began with a folder of other files or "
            f"head, imported as {began}",
            hint=f"choose another --run-dir, or go on with --checkpoint.initialize-from {run.root / str(began)}",
        )


def _check_teacher(before: RunConfig, run: RunFolder, source: Path, output: Path) -> None:
    """The same for whom the run has learned from, unless its note of that was deleted on purpose."""
    began = _imported_as(before.distillation.teacher, "teacher")
    if began not in (None, output.name) and run.teacher_note.is_file():
        raise ConfigError(
            f"distillation.teacher is {source}, but the run has learned from another one so far, imported as {began}",
            hint=f"name the teacher of before, choose another --run-dir, or delete {run.teacher_note} to change it on "
            "purpose",
        )


def _imported_as(checkpoint: str | None, name: str) -> str | None:
    """Return the name of a checkpoint's folder, if it is one that `import_base` makes."""
    folder = None if checkpoint is None else Path(checkpoint).name
    return folder if folder is not None and folder.startswith(f"{name}-") else None


def _identity(folder: Path, head: object) -> str:
    """Hash what decides the weights, without reading all of them."""
    digest = xxhash.xxh3_64()
    for file in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.json")) + sorted(folder.glob("*.bin")):
        digest.update(f"{file.name}/{file.stat().st_size}/{spot_hash(file)}".encode())
    if head is not None:
        digest.update(repr(head).encode())
    return digest.hexdigest()[:8]
