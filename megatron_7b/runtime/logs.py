"""Logging of a run: one voice per run, plain lines in a file, and a terminal where messages and progress bar get along.

Modules log with `logging.getLogger(__name__)` as usual. The main rank speaks on stderr (stdout belongs to results) and in
the run folder's log; the other ranks only speak when something is wrong, and then say which rank they are.
"""

import logging
import sys
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

PACKAGE = "megatron_7b"
"""Parent of all loggers of the project."""

_LINE = "%(asctime)s %(levelname)-7s %(message)s"
_TIME = "%Y-%m-%d %H:%M:%S"

console = Console(stderr=True)
"""The terminal. Whatever draws on it (progress bars) must use this object, so that log lines go above the drawing."""


def configure_logging(rank: int = 0, *, level: int = logging.INFO) -> None:
    """Send the project's messages, and Python's warnings, to stderr. Calling it again starts afresh.

    Args:
        rank: Global rank of this process; all but rank 0 are limited to warnings and prefix them with their rank.
        level: Lowest level that the main rank shows.
    """
    handler: logging.Handler
    if rank == 0 and console.is_terminal:
        handler = RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S", rich_tracebacks=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        prefix = "" if rank == 0 else f"[rank {rank}] "
        handler.setFormatter(logging.Formatter(_LINE.replace("%(message)", f"{prefix}%(message)"), _TIME))
    handler.setLevel(level if rank == 0 else max(level, logging.WARNING))
    for logger in _loggers():
        _remove_handlers(logger)
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)  # each handler decides for itself; the log file takes everything
        logger.propagate = False
    logging.captureWarnings(True)


def add_log_file(path: Path) -> logging.Handler:
    """Append all messages to a file as well, as plain lines; for the main rank.

    Args:
        path: The file; its folder must exist.

    Returns:
        The handler, for `remove_log_file`.
    """
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_LINE, _TIME))
    for logger in _loggers():
        logger.addHandler(handler)
    return handler


def remove_log_file(handler: logging.Handler) -> None:
    """End what `add_log_file` began, and closes the file."""
    for logger in _loggers():
        logger.removeHandler(handler)
    handler.close()


def _loggers() -> tuple[logging.Logger, logging.Logger]:
    return logging.getLogger(PACKAGE), logging.getLogger("py.warnings")


def _remove_handlers(logger: logging.Logger) -> None:
    for handler in tuple(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
