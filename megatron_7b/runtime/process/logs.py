"""Logging of a run: plain lines in a file, and a terminal on which messages and a progress bar coexist.

Modules log with `logging.getLogger(__name__)` as usual. The main rank logs to stderr (stdout is for results) and to the
run folder's log; the other ranks log only warnings and errors, prefixed with their rank. Messages of libraries and
Python's warnings go into the log file only.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import IO, cast, override

from rich.console import Console
from rich.logging import RichHandler

from megatron_7b.runtime.process.terminal import Terminal, say

logger = logging.getLogger(__name__)

PACKAGE = "megatron_7b"
"""Parent of all loggers of the project."""

_LINE = "%(asctime)s %(levelname)-7s %(message)s"
_TIME = "%Y-%m-%d %H:%M:%S"
_MAX_EARLY_RECORDS = 1000

console = Console(file=cast("IO[str]", Terminal()))
"""The terminal. Progress bars must use this object, so that log lines appear above them."""

_own: list[tuple[logging.Logger, logging.Handler]] = []
"""Loggers and the handlers that this module has added to them."""


class _LogFile(logging.FileHandler):
    """A log file that survives a full disk: that is reported once, and writing continues once there is room."""

    _has_complained = False

    @override
    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_complained:
            self._has_complained = True
            say(f"lines are missing from {self.baseFilename}: {error.strerror}")

    @override
    def close(self) -> None:
        with suppress(OSError):  # of lines that were missing already; it must not hide why the run ends
            super().close()


def configure_logging(rank: int = 0, *, level: int = logging.INFO) -> None:
    """Send the project's messages to stderr, and keep everything for the log file. A second call starts over.

    Call it before heavy libraries are imported: some warn while they load.

    Args:
        rank: Global rank of this process; all but rank 0 are limited to warnings and prefix them with their rank.
        level: Lowest level that the main rank shows.
    """
    _remove_own_handlers()
    package = logging.getLogger(PACKAGE)
    package.setLevel(logging.DEBUG)  # each handler decides for itself; the log file takes everything
    screen = _screen(rank)
    screen.setLevel(level if rank == 0 else max(level, logging.WARNING))
    _add(package, screen)
    # Messages from before the run folder is open wait in memory; only the main rank will have a file.
    waiting = MemoryHandler(_MAX_EARLY_RECORDS, flushLevel=logging.CRITICAL + 1) if rank == 0 else logging.NullHandler()
    _add(logging.getLogger(), waiting)
    logging.captureWarnings(True)
    # Warns at every start, on its own handler, that a machine with a CUDA toolkit has no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Say that something is being loaded, which takes seconds in which nothing else appears.

    On a terminal the words move, and vanish; in a log they are a line.
    """
    if not console.is_terminal:
        logger.info("loading %s", what)
        yield
        return
    with console.status(f"loading {what}"):
        yield


def add_log_file(path: Path) -> logging.Handler:
    """Also append all messages, including early ones, to a file as plain lines; for the main rank.

    Args:
        path: The file; its folder must exist.

    Returns:
        The handler, for `remove_log_file`.
    """
    file = _LogFile(path, encoding="utf-8")
    file.setFormatter(logging.Formatter(_LINE, _TIME))
    root = logging.getLogger()
    for logger, handler in tuple(_own):
        if isinstance(handler, MemoryHandler):
            handler.setTarget(file)
            handler.flush()
            _remove(logger, handler)
    _add(root, file)
    return file


def remove_log_file(handler: logging.Handler) -> None:
    """Undo `add_log_file`, and close the file."""
    _remove(logging.getLogger(), handler)


def _screen(rank: int) -> logging.Handler:
    if rank == 0 and console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S")
        handler.setFormatter(logging.Formatter("%(message)s"))
        return handler
    handler = logging.StreamHandler(cast("IO[str]", Terminal()))
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(_LINE.replace("%(message)", f"{prefix}%(message)"), _TIME))
    return handler


def _add(logger: logging.Logger, handler: logging.Handler) -> None:
    logger.addHandler(handler)
    _own.append((logger, handler))


def _remove(logger: logging.Logger, handler: logging.Handler) -> None:
    logger.removeHandler(handler)
    handler.close()
    _own.remove((logger, handler))


def _remove_own_handlers() -> None:
    for logger, handler in tuple(_own):
        _remove(logger, handler)
