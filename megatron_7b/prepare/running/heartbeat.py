"""Where a worker is, in memory that its parent reads, also when the worker hangs or has been killed."""

import ctypes
import os
from collections.abc import Mapping
from multiprocessing.context import BaseContext
from typing import Any

_STAGE_BYTES, _PLACE_BYTES = 64, 1024


class _Cells(ctypes.Structure):
    _fields_ = (
        ("beats", ctypes.c_int64),
        ("stage", ctypes.c_char * _STAGE_BYTES),
        ("place", ctypes.c_char * _PLACE_BYTES),
    )


def name_place(source: str, position: int) -> str:
    """Return a record, as messages name it."""
    return f"{source}:{position}"


class Heartbeat:
    """Told by a task what it does next; read by its supervisor.

    A task that has not been heard once is never taken for hung: it may have nothing to tell.

    Args:
        cells: Shared ones, from `make_cells`; without any, nobody listens.
        skipped: Records that ended the workers that looked at them, and how: the task quarantines them unseen.
    """

    def __init__(self, cells: Any = None, skipped: Mapping[str, str] | None = None) -> None:
        self._cells = _Cells() if cells is None else cells
        self.skipped = skipped or {}

    def begin(self, stage: str) -> None:
        """Note that a stage begins, with no document yet."""
        self._cells.stage = stage.encode()[:_STAGE_BYTES]
        self._cells.place = b""
        self._cells.beats += 1

    def beat(self, source: str, position: int) -> None:
        """Note that the stage looks at a document."""
        self._cells.place = os.fsencode(name_place(source, position))[-_PLACE_BYTES:]
        self._cells.beats += 1

    def reset(self) -> None:
        """Note a new task."""
        self._cells.stage = self._cells.place = b""
        self._cells.beats = 0

    @property
    def beats(self) -> int:
        """How often it was told something since the task began."""
        return int(self._cells.beats)

    @property
    def stage(self) -> str:
        """The stage that the task is in."""
        return str(self._cells.stage.decode())

    @property
    def place(self) -> str:
        """The document that it looks at, as `name_place` names it; empty where it looks at none."""
        return os.fsdecode(self._cells.place)


def make_cells(context: BaseContext) -> Any:
    """Memory for a heartbeat, to be handed to a process when it is started."""
    return context.RawValue(_Cells)
