"""The folder beside a corpus that keeps a tokenizer which no folder of the user's holds."""

import os
import shutil
from pathlib import Path

from megatron_7b.errors import ConfigError
from megatron_7b.tokenizer import Tokenizer, load_tokenizer


def kept_tokenizer(output_prefix: str) -> Path:
    """Return the folder of an output prefix."""
    return Path(f"{output_prefix}_tokenizer")


def check_kept_tokenizer(tokenizer: Tokenizer, output_prefix: str, *, overwrite: bool) -> None:
    """Check that a tokenizer made of single files can be kept beside the corpus; others are where they were.

    Raises:
        ConfigError: Another tokenizer is there already.
    """
    folder = kept_tokenizer(output_prefix)
    if tokenizer.path != folder or not folder.exists() or overwrite:
        return
    if not folder.is_dir() or load_tokenizer(folder).identity != tokenizer.identity:
        raise ConfigError(f"{folder} holds another tokenizer", hint="--overwrite replaces it")


def keep_tokenizer(tokenizer: Tokenizer, output_prefix: str) -> None:
    """Write a tokenizer made of single files beside the corpus, where training and `data show` will look for it."""
    folder = kept_tokenizer(output_prefix)
    if tokenizer.path != folder:
        return
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    tokenizer.save(staging)
    try:
        staging.rename(folder)
    except OSError:  # there is one already: an older one, or that of another shard, which is the same
        for file in sorted(staging.iterdir()):
            file.replace(folder / file.name)
        staging.rmdir()
