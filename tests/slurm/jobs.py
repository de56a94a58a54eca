"""A job in the queue, its run folder, and what both tell about it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.slurm.cluster import Cluster


@dataclass(frozen=True)
class Job:
    """A submitted job. Waiting fails after `patience` seconds, with the job's log in the message."""

    cluster: Cluster
    number: int
    run_dir: Path
    log_file: Path
    patience: float = 60.0

    @property
    def log(self) -> str:
        """What the job has printed in all its lives."""
        return self.log_file.read_text() if self.log_file.exists() else ""

    @property
    def lives(self) -> list[tuple[str, ...]]:
        """(first step, last step, exit code, verdict) of each life; a death by signal reads `killed`."""
        rows = [row.split("\t")[3:] for row in (self.run_dir / "slurm" / "lives.tsv").read_text().splitlines()[1:]]
        # Which signal's code srun passes on depends on which of the processes that it ends is the last.
        return [(first, last, "killed" if int(code) > 128 else code, end) for first, last, code, end in rows]

    @property
    def fields(self) -> dict[str, str]:
        """What Slurm knows about the job."""
        return self.cluster.job(self.number)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Return once `condition` holds."""
        deadline = time.monotonic() + self.patience
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not in {self.patience} s\n{self.fields}\n{self.log}"
            time.sleep(0.1)

    def end(self) -> str:
        """Wait until the job is over; return its state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait_until(lambda: self.fields["JobState"] in over, "the end of the job")
        return self.fields["JobState"]

    def signal_script(self, name: str) -> None:
        """Send a signal to the batch script alone, as Slurm does before the time limit."""
        self.cluster.run("scancel", "--batch", f"--signal={name}", str(self.number))

    def cancel(self) -> None:
        """End the job, as its user would."""
        self.cluster.run("scancel", str(self.number))

    def update(self, setting: str) -> None:
        """Change the job in the queue: `TimeLimit=60`."""
        self.cluster.run("scontrol", "update", f"JobId={self.number}", setting)
