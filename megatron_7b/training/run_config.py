"""The configuration of a run to be started: all of it read and checked."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_7b.checkpoint import config_file, resolve_checkpoint
from megatron_7b.config import RunConfig, check_config, load_config
from megatron_7b.config.problems import Problem


def load_run_config(
    source: str | Path | Sequence[str | Path] | None,
    overrides: Mapping[str, object] | None = None,
    *,
    world_size: int | None = None,
    problems: Sequence[Problem] = (),
) -> RunConfig:
    """Return the checked configuration of a run, as `pretrain` takes it. Collective: none.

    A run that starts from the weights of a checkpoint (`checkpoint.initialize_from`) takes the shape of its model from
    there, whatever the sources say.

    Args:
        source: A preset's name or a YAML file, several of them (later ones win), or None for the defaults.
        overrides: Values by dotted path, such as `{"data.train": ["P_text_document"]}`.
        world_size: Ranks of the whole run; None checks what holds for any number.
        problems: What the caller found wrong with the command line, to be reported in the same message.

    Raises:
        CheckpointError: There is no complete checkpoint to start from.
        ConfigError: The configuration is impossible, with all problems in one message.
    """
    load = functools.partial(
        load_config, source, overrides, world_size=world_size, require_data=True, problems=problems
    )
    config = load()
    start = config.checkpoint.initialize_from
    if start is not None and Path(start).exists():  # one that does not exist is among the problems below
        config = load(model_from=config_file(resolve_checkpoint(Path(start))))
    check_config(config, world_size=world_size, require_data=True)
    return config
