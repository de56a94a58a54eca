"""Where the time of the steps goes on all ranks, and which rank the others wait for."""

import dataclasses
import socket
import statistics
import time
from collections.abc import Mapping, Sequence

from megatron_7b.config.schema import RunConfig
from megatron_7b.runtime.machine.part_clock import BETWEEN_STEPS, HOOKS, OTHER, STEP_PARTS, PartClock
from megatron_7b.training.agreement import Ranks

SECONDS_BETWEEN_REPORTS = 60.0
"""A log in which nothing appears for longer looks like a run that hangs."""
STRAGGLING = 0.1
"""A rank is named in the log if it works this share longer than its peers."""

_SHOWN_SHARE = 0.02
_COLUMNS = (*STEP_PARTS, *BETWEEN_STEPS)
_WORK = (*(part for part in STEP_PARTS if part not in ("communication", OTHER)), HOOKS)
"""What others wait for. In `communication` a rank waits itself, and in `other` too: between the parts that the
interleaved schedule names on GPUs."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """Seconds of one part: the mean over ranks, the least and the most of any."""

    mean: float
    least: float
    most: float


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a rank is: the name of its host, and its pipeline stage."""

    host: str
    stage: int


@dataclasses.dataclass(frozen=True)
class Slowest:
    """The rank that works longest.

    Attributes:
        rank: Its number.
        place: Where it is.
        share: How much longer it works than the median of its peers: 0.25 is a quarter longer. Peers are the other
            ranks of its pipeline stage, which have equal work; where a stage has one rank, the other stages.
        is_stage: Whether its peers are other stages.
    """

    rank: int
    place: Place
    share: float
    is_stage: bool

    def __str__(self) -> str:
        who = f"stage {self.place.stage} (rank {self.rank}, {self.place.host})" if self.is_stage else (
            f"rank {self.rank} ({self.place.host})"
        )  # fmt: skip
        more = f"{self.share:.0%} longer than" if self.share < 1 else f"{1 + self.share:.1f} times as long as"
        return f"{who} works {more} the others"


@dataclasses.dataclass(frozen=True)
class Timing:
    """The parts of the steps since the last report, over all ranks.

    Attributes:
        num_steps: How many steps these were.
        parts: Seconds per step of each part of a step, which add up to the step; and of what came between steps, all
            of it.
        slowest: The rank that works longest; None if there is one rank only.
    """

    num_steps: int
    parts: Mapping[str, Spread]
    slowest: Slowest | None = None

    @property
    def step_seconds(self) -> float:
        """Mean time of a step."""
        return sum(spread.mean for name, spread in self.parts.items() if name in STEP_PARTS)

    @property
    def values(self) -> dict[str, float]:
        """Every number by name, for metrics.jsonl and services that plot curves."""
        values: dict[str, float] = {"timed_steps": self.num_steps}
        for name, spread in self.parts.items():
            values[f"{name}_seconds"] = spread.mean
            if self.slowest is not None:
                values[f"{name}_seconds_min"], values[f"{name}_seconds_max"] = spread.least, spread.most
        if self.slowest is not None:
            values["slowest_rank"], values["slowest_by"] = self.slowest.rank, self.slowest.share
        return values

    @property
    def shares(self) -> str:
        """The largest parts of a step in words: `backward 58%, forward 31%, optimizer 9%`."""
        whole = self.step_seconds or 1.0
        shares = {name: self.parts[name].mean / whole for name in STEP_PARTS if name in self.parts}
        largest = sorted(shares, key=lambda name: -shares[name])
        return ", ".join(f"{name} {shares[name]:.0%}" for name in largest if shares[name] >= _SHOWN_SHARE)

    @property
    def straggler(self) -> Slowest | None:
        """The slowest rank, if it is slower than its peers by more than clocks and caches explain."""
        is_one = self.slowest is not None and self.num_steps > 1 and self.slowest.share >= STRAGGLING
        return self.slowest if is_one else None


class StepTiming:
    """Reports the parts of steps as often as the log has a line.

    Args:
        clock: This rank's.
        config: Of the run.
        ranks: All ranks.
        stage: Pipeline stage of this rank, counted from 1.

    Collective: all ranks.
    """

    def __init__(self, clock: PartClock, config: RunConfig, ranks: Ranks, *, stage: int) -> None:
        self._clock, self._ranks = clock, ranks
        self._interval = config.telemetry.log_interval_steps
        self._last_step = config.training.train_steps
        self._num_reports = 0
        self._last_time = time.monotonic()
        self.is_overdue = False
        """Whether it seemed so to any rank."""
        self._places = ranks.gather(Place(socket.gethostname(), stage))

    @property
    def seems_overdue(self) -> bool:
        """Whether the last report is long ago by the clock of this rank."""
        return time.monotonic() - self._last_time >= SECONDS_BETWEEN_REPORTS

    def is_due(self, step: int) -> bool:
        """Whether there is a report after a step, the next one, however long it takes."""
        return self._num_reports == 0 or step % self._interval == 0 or step == self._last_step

    def report(self, step: int) -> Timing | None:
        """Return the parts of the steps since the last report if it is time to; the same on all ranks.

        The first step of a start has a report of its own, because it is slower than those after it; and nobody is
        called slow for it.

        Args:
            step: Steps done.

        Collective: all ranks, if it is time to.
        """
        if not (self.is_overdue or self.is_due(step)):
            return None
        self._num_reports += 1
        self._last_time = time.monotonic()
        num_steps, seconds = self._clock.take()
        rows = self._ranks.gather_numbers([seconds.get(name, 0.0) for name in _COLUMNS])
        return combine(num_steps, rows, self._places)


def combine(num_steps: int, rows: Sequence[Sequence[float]], places: Sequence[Place]) -> Timing:
    """Combine what the ranks have measured.

    Args:
        num_steps: How many steps it was.
        rows: Seconds of each part, those of a step first, of each rank.
        places: Of each rank.
    """
    parts = {}
    for name, column in zip(_COLUMNS, zip(*rows, strict=True), strict=True):
        if any(column):
            per_step = [seconds / (num_steps if name in STEP_PARTS else 1) for seconds in column]
            parts[name] = Spread(statistics.fmean(per_step), min(per_step), max(per_step))
    work = [sum(seconds for name, seconds in zip(_COLUMNS, row, strict=True) if name in _WORK) for row in rows]
    return Timing(num_steps, parts, find_slowest(work, places))


def find_slowest(work: Sequence[float], places: Sequence[Place]) -> Slowest | None:
    """Return the rank whose work takes longest in comparison with that of its peers.

    Args:
        work: Seconds that each rank did not spend waiting for others.
        places: Of each rank.
    """
    slowest: Slowest | None = None
    for rank, (seconds, place) in enumerate(zip(work, places, strict=True)):
        others = [other for other in range(len(work)) if other != rank]
        peers = [other for other in others if places[other].stage == place.stage]
        reference = statistics.median([work[other] for other in peers or others] or [0.0])
        if reference > 0 and (slowest is None or seconds / reference - 1 > slowest.share):
            slowest = Slowest(rank, place, seconds / reference - 1, is_stage=not peers)
    return slowest
