"""What --overwrite may replace: an earlier output of the same command, and nothing that it could not write again."""

from collections.abc import Iterator
from pathlib import Path

from megatron_7b.checkpoint.manifest import MANIFEST, read_manifest
from megatron_7b.conversion.adapters.folder import CONFIG_FILE as ADAPTER_FILE
from megatron_7b.conversion.folder_reader import CONFIG_FILE
from megatron_7b.errors import CheckpointError, PathError

_FOLDERS_OF_AN_EXPORT = frozenset({"additional_chat_templates"})


def check_replaces_export(output: Path) -> None:
    """Refuse a folder with content that is not just a Hugging Face model.

    Args:
        output: The folder that is to be replaced; it need not be there.

    Raises:
        PathError: It has no config.json or no weights, or a folder that no export has.
    """
    content = _content(output)
    if not content:
        return
    if CONFIG_FILE not in content or not any(name.endswith(".safetensors") for name in content):
        raise _refusal(output, f"is no Hugging Face model: it lacks {CONFIG_FILE} or weights in safetensors")
    for name in content:
        if (output / name).is_dir() and name not in _FOLDERS_OF_AN_EXPORT:
            raise _refusal(output, f"holds {name}/, which no export writes")


def check_replaces_adapter(output: Path) -> None:
    """Refuse a folder with content that is not just a PEFT adapter.

    Args:
        output: The folder that is to be replaced; it need not be there.

    Raises:
        PathError: It has no adapter_config.json, has weights of a model, or a folder that no export has.
    """
    content = _content(output)
    if not content:
        return
    if ADAPTER_FILE not in content or any(name.startswith("model") for name in content):
        raise _refusal(output, f"is no adapter: it lacks {ADAPTER_FILE}, or has weights of a whole model")
    for name in content:
        if (output / name).is_dir() and name not in _FOLDERS_OF_AN_EXPORT:
            raise _refusal(output, f"holds {name}/, which no export writes")


def check_replaces_import(output: Path) -> None:
    """Refuse a folder with content that is not just an imported checkpoint.

    Args:
        output: The folder that is to be replaced; it need not be there.

    Raises:
        PathError: It is no checkpoint, is one that a run has trained, or holds a file that is not of the checkpoint.
    """
    if not _content(output):
        return
    try:
        manifest = read_manifest(output)
    except CheckpointError as error:
        raise _refusal(output, f"is no imported checkpoint: {str(error).partition('\nhint:')[0]}") from error
    if manifest.counters.step or manifest.has_optimizer:
        raise _refusal(output, f"is a checkpoint of a run, at step {manifest.counters.step}")
    for name in _files(output):
        if name not in manifest.files and name != MANIFEST:
            raise _refusal(output, f"holds {name}, which is not of the checkpoint")


def _content(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _files(folder: Path) -> Iterator[str]:
    """Yield every file and every link below a folder, by its path in there."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            yield path.relative_to(folder).as_posix()


def _refusal(output: Path, why: str) -> PathError:
    return PathError(
        f"--overwrite would delete {output}, which {why}",
        hint="it replaces only an earlier output of the same command; choose another folder, or remove this one first",
    )
