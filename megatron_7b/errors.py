"""Errors that a user can fix.

Every message names the offending value, says what was expected, and where possible ends with a hint. The command line
prints these without a traceback; any other exception is our bug and keeps its traceback.
"""

import errno

_OF_PERMISSION = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
"""Errors of the file system that mean: another path."""


class MegatronError(Exception):
    """Base of all errors that the user can fix.

    Attributes:
        hint: One sentence on how to fix it, or None.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\nhint: {self.hint}" if self.hint else message


class ConfigError(MegatronError):
    """A configuration value is unknown, of the wrong type, or impossible in combination."""


class PathError(ConfigError):
    """A path that was given is not there, is not of the kind that is needed, or is in the way of what is written."""


class DataFormatError(MegatronError):
    """A corpus, index or tokenizer file is truncated, foreign or inconsistent."""


class CheckpointError(MegatronError):
    """A checkpoint is incomplete, damaged or does not fit the model."""


class ConversionError(MegatronError):
    """A Hugging Face folder cannot be converted, or the converted model differs from its source."""


class CollectiveError(MegatronError):
    """Ranks disagree, or a peer was lost."""


class TrainingError(MegatronError):
    """Training cannot continue: the loss is not finite, or the environment lacks what the run needs."""


def is_path_error(error: BaseException) -> bool:
    """Whether an error of the file system is a mistake of the user's, who gave a path that may not be used."""
    return isinstance(error, OSError) and error.errno in _OF_PERMISSION


def exit_code(error: BaseException) -> int:
    """The exit code of a command that an error ends: 2 for a mistake in the command line or configuration, or 1."""
    return 2 if isinstance(error, ConfigError) or is_path_error(error) else 1
