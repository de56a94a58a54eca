"""Matrices that stay as they are. Needs no torch."""

import re

from megatron_7b.errors import ConfigError


def is_ignored(name: str, ignore: tuple[str, ...]) -> bool:
    """Whether a matrix stays as it is: it is named, or a pattern after `re:` matches its name."""
    return any(re.match(one[3:], name) if one.startswith("re:") else one == name for one in ignore)


def check_ignored(names: list[str], ignore: tuple[str, ...]) -> None:
    """Refuse what no matrix is named.

    Args:
        names: Of all matrices.
        ignore: What the user gave.

    Raises:
        ConfigError: A name or pattern fits none, or is no pattern.
    """
    for one in ignore:
        try:
            fits = any(is_ignored(name, (one,)) for name in names)
        except re.error as error:
            raise ConfigError(f"--ignore {one} is no regular expression: {error}") from None
        if not fits:
            raise ConfigError(
                f"--ignore {one} fits no matrix of the model",
                hint=f"they are named such as {names[0]}; re:.*down_proj fits those of all layers",
            )
