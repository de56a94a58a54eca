"""Which rank a run failed because of. All ranks end when one does; this tells the cause from what followed.

The order in which ends are seen says little: the rank that failed may take seconds to leave, while the others have
reported the lost connection at once. So the kind of evidence counts first, and time only decides within a kind:

1. interrupted: Ctrl-C pressed twice;
2. killed: ended by a signal that nobody here sent, without a word. That never follows from another rank's failure, but
   for SIGABRT, by which communication libraries answer a lost peer;
3. own: an error of its own, or an exit without a word;
4. stopped: a request to stop before the first step;
5. followed: what a rank makes of a peer that has left (CollectiveError, lost connection, timeout, SIGABRT).

The launcher's own SIGKILL is no evidence, but what the rank had recorded before it is.
"""

import enum
import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_7b.runtime.process.launched import Record
from megatron_7b.runtime.process.signals import EXIT_FINISHED, EXIT_INTERRUPTED, EXIT_SAVED, STOP_SIGNALS

_HEAD_START_SECONDS = 1.0
"""An exit without a word is only seen after the fact; what others recorded just before may follow from it."""


class Kind(enum.IntEnum):
    """What the end of a rank is evidence of, the most telling first."""

    INTERRUPTED = 1
    KILLED = 2
    OWN = 3
    STOPPED = 4
    FOLLOWED = 5


@dataclass(frozen=True)
class End:
    """How a rank ended, as far as it has.

    Attributes:
        rank: Its number.
        code: Exit code, negative after a signal; None while it runs, and where the launcher ended it.
        seen: Monotonic time at which it was first seen to have ended.
        record: What it said itself.
    """

    rank: int
    code: int | None
    seen: float
    record: Record | None = None


@dataclass(frozen=True)
class Verdict:
    """An end other than "finished" or "saved", judged."""

    kind: Kind
    time: float
    end: End
    exit_code: int


def judge(end: End, *, asked: Collection[signal.Signals], resumable: bool) -> Verdict | None:
    """Say what an end is evidence of; None for a rank that finished, saved, or has said nothing yet.

    Args:
        end: Of one rank.
        asked: The signals that the launcher has passed on.
        resumable: Whether ranks listen to requests to stop once they have begun, so that one that dies of a request
            was only starting.
    """
    if end.record is not None:
        kind = {"own": Kind.OWN, "followed": Kind.FOLLOWED, "stopped": Kind.STOPPED}[end.record.kind]
        return Verdict(kind, end.record.time, end, end.record.exit_code)
    if end.code is None or end.code in (EXIT_FINISHED, EXIT_SAVED):
        return None
    if end.code > 0:
        interrupted = end.code == EXIT_INTERRUPTED and signal.SIGINT in asked
        kind = Kind.INTERRUPTED if interrupted else Kind.OWN
        return Verdict(kind, end.seen - _HEAD_START_SECONDS, end, end.code)
    number, exit_code = -end.code, 128 - end.code
    if number in asked or (resumable and number in STOP_SIGNALS):
        return Verdict(Kind.STOPPED, end.seen, end, EXIT_SAVED if resumable else exit_code)
    return Verdict(Kind.FOLLOWED if number == signal.SIGABRT else Kind.KILLED, end.seen, end, exit_code)


def first_cause(verdicts: Sequence[Verdict]) -> Verdict | None:
    """Return the verdict that the others follow from."""
    return min(verdicts, key=lambda verdict: (verdict.kind, verdict.time, verdict.end.rank), default=None)
