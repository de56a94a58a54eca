#!/usr/bin/env python3
"""How many steps the quickstart trains for, from a trial of a few: as many as take two to three minutes.

    examples/quickstart_plan.py quickstart_run/trial/metrics.jsonl --seconds 14 --write quickstart_run/plan

Writes NAME=VALUE lines, which examples/quickstart.sh reads again when it continues.
"""

import argparse
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import median

TRAINING_SECONDS = 150
"""What training should take."""
ALTOGETHER_SECONDS = 420
"""What the rest may leave of it on a slow machine: everything should stay under eight minutes."""
STARTS = 7
"""How often the time of one start passes after the trial: two legs of training, conversion (three), two texts."""
HALF_BATCH = 0.55
"""Time of a step with half the sequences, as a share."""


@dataclass(frozen=True)
class Plan:
    """How training fills the time."""

    steps: int
    batch: int
    """Sequences of a step."""
    step_seconds: float

    @property
    def margin_nats(self) -> float:
        """By how much the validation loss must be below the unigram entropy; what was reached is about 0.15 more."""
        if self.steps < 80:
            return -math.inf  # too few to promise anything
        if self.batch == 16:
            return 0.4 if self.steps >= 110 else 0.15
        return 0.2 if self.steps >= 110 else 0.05


def choose(step_seconds: float, start_seconds: float, steps: int | None = None) -> Plan:
    """Return the plan for a machine.

    Args:
        step_seconds: Of a step of 16 sequences.
        start_seconds: From a command to its first step.
        steps: How many, whatever they take; None chooses.
    """
    if steps is not None:
        return Plan(steps, 16, step_seconds)
    budget = max(60.0, min(TRAINING_SECONDS, ALTOGETHER_SECONDS - STARTS * start_seconds))
    fitting = int(budget / step_seconds) // 10 * 10
    if fitting >= 110:
        return Plan(min(240, fitting), 16, step_seconds)
    half = step_seconds * HALF_BATCH
    return Plan(max(80, min(160, int(budget / half) // 10 * 10)), 8, half)


def main() -> None:
    """Write the plan and say it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path, help="metrics.jsonl of the trial")
    parser.add_argument("--seconds", type=float, required=True, help="what the trial took, its start included")
    parser.add_argument("--steps", type=int, help="train for this many instead")
    parser.add_argument("--write", type=Path, required=True, metavar="FILE", help="where the plan goes")
    arguments = parser.parse_args()
    records = [json.loads(line) for line in arguments.metrics.read_text(encoding="utf-8").splitlines()]
    seconds = [record["step_seconds"] for record in records if "step_seconds" in record]
    step_seconds = median(seconds[1:])  # the first allocates memory
    start_seconds = max(1.0, arguments.seconds - sum(seconds))
    plan = choose(step_seconds, start_seconds, arguments.steps)
    training_seconds = plan.steps * plan.step_seconds
    values = {
        "STEPS": plan.steps,
        "BATCH": plan.batch,
        "WARMUP": min(20, max(1, plan.steps // 5)),
        "MARGIN": plan.margin_nats,
        "START_SECONDS": round(start_seconds),
        "TRAINING_SECONDS": round(training_seconds),
    }
    partial = arguments.write.with_name(f".{arguments.write.name}.tmp")
    partial.write_text("".join(f"{name}={value}\n" for name, value in values.items()), encoding="utf-8")
    os.replace(partial, arguments.write)
    print(
        f"{step_seconds:.2f} s a step of 16 sequences, {start_seconds:.0f} s to start: {plan.steps} steps "
        f"of {plan.batch} sequences, in about {training_seconds / 60:.1f} minutes"
    )


if __name__ == "__main__":
    main()
