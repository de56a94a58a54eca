"""A program of the trainer's exit contract, without training: what examples/slurm/lives.sh is tested against quickly.

    contract_trainer.py [--steps N] END

Each life goes N steps on from the newest checkpoint of $RUN_DIR, writes a checkpoint, and then ends by END:

    finish    exits with 0
    quit      exits with 75
    wait      on a signal goes one step further, saves, exits with 75; resumed it finishes
    crash     rank 0 kills itself; resumed it does so before it has made any steps
    hang      is deaf to signals

Each rank has a child process, as one that writes a checkpoint would be.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

RUN_DIR = Path(os.environ["RUN_DIR"])
RANK = int(os.environ["RANK"])
STOPPED = RUN_DIR / "stopped"


def write(path: Path, text: str) -> None:
    """Write a file so that it is there as a whole or not at all."""
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").replace(path)


def latest_step() -> int:
    """Return the step of the newest checkpoint; 0 where there is none."""
    latest = RUN_DIR / "checkpoints" / "latest"
    return int(latest.read_text().removeprefix("step_")) if latest.exists() else 0


def save(step: int) -> None:
    """Publish a checkpoint of nothing."""
    if RANK == 0:
        (RUN_DIR / "checkpoints").mkdir(exist_ok=True)
        write(RUN_DIR / "checkpoints" / "latest", f"step_{step:08d}")


def leave(state: str, exit_code: int, step: int) -> None:
    """Say how it ended, in the run folder and by the exit code; nobody leaves before, or srun would end the others."""
    status = RUN_DIR / "status.json"
    if RANK == 0:
        write(status, json.dumps({"state": state, "exit_code": exit_code, "step": step}))
    while not status.exists():
        time.sleep(0.05)
    sys.exit(exit_code)


def stop(signal_number: int, frame: FrameType | None) -> None:
    """Tell all ranks, as the trainer does by a collective."""
    STOPPED.write_text(signal.Signals(signal_number).name)


def main(steps: int, end: str) -> None:
    """One life."""
    first = latest_step()
    if end != "crash":
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN if end == "hang" else stop)
    writer = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    atexit.register(writer.kill)
    if end == "crash" and first:
        steps = 0  # it has always been at this step
    if steps:
        save(first + steps)
    if end == "wait" and not first:
        while not STOPPED.exists():
            time.sleep(0.05)
        time.sleep(0.2)
        if RANK == 0:
            write(RUN_DIR / "writer", f"{STOPPED.read_text()} {'alive' if writer.poll() is None else 'dead'}")
        save(first + steps + 1)
        leave("saved", 75, first + steps + 1)
    if end == "quit":
        leave("saved", 75, first + steps)
    if end == "crash" and RANK == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if end in ("crash", "hang"):
        time.sleep(3600)
    leave("finished", 0, first + steps)


if __name__ == "__main__":
    main(int(sys.argv[2]) if sys.argv[1] == "--steps" else 0, sys.argv[-1])
