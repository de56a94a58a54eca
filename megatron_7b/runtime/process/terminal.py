"""Standard error, which may go away while a run continues: a closed window, a lost connection, a reader like `head`.

A message that nobody can read any more must neither end a run nor change its exit code.
"""

import contextlib
import errno
import os
import sys
from typing import TextIO

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)
"""What writing says once the reader of a pipe has left, or the terminal was closed."""


class Terminal:
    """Standard error for as long as somebody reads it; afterwards what is written is dropped."""

    @property
    def encoding(self) -> str:
        """How text becomes bytes."""
        return getattr(_stream(), "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write as far as possible; returns the length of the text."""
        if (stream := _stream()) is not None:
            try:
                stream.write(text)
            except OSError as error:
                _drop(stream, error)
        return len(text)

    def flush(self) -> None:
        """Hand everything to the operating system, as far as possible."""
        if (stream := _stream()) is not None:
            try:
                stream.flush()
            except OSError as error:
                _drop(stream, error)

    def isatty(self) -> bool:
        """Return whether it is a terminal."""
        stream = _stream()
        return stream is not None and stream.isatty()

    def fileno(self) -> int:
        """Return the number of the file that is written to."""
        stream = _stream()
        if stream is None:
            raise OSError(errno.EBADF, "standard error is closed")
        return stream.fileno()


def say(message: str) -> None:
    """Write one message to standard error, if anybody reads it."""
    terminal = Terminal()
    terminal.write(f"{message}\n")
    terminal.flush()


def restore_cursor(*, clear_line: bool = False) -> None:
    """Show a terminal's cursor again after a process was ended that had hidden it for something that moves.

    Args:
        clear_line: Whether that is still on the line, and is to be removed.
    """
    terminal = Terminal()
    if terminal.isatty():
        terminal.write(("\r\x1b[2K" if clear_line else "") + "\x1b[?25h")
        terminal.flush()


def finish_output() -> None:
    """Flush standard output and error at the end of a process; what nobody can take is dropped.

    The interpreter does the same at its very end, and would turn a failure there into exit code 120.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError):  # ValueError: it has been closed
                _send_to_nowhere(stream)


def _stream() -> TextIO | None:
    """Return standard error itself, also while a progress bar has put something of its own in its place."""
    stream: TextIO | None = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
    return stream


def _drop(stream: TextIO, error: OSError) -> None:
    if error.errno in _GONE:
        _send_to_nowhere(stream)


def _send_to_nowhere(stream: TextIO) -> None:
    """Let a stream's file be the null device, also for native code and for what is still buffered."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
