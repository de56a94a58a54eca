"""How a run ends when it is killed, stopped too early, or loses its terminal; real processes, real signals.

What is said, the exit code, and what status.json says afterwards have to agree.
"""

import contextlib
import fcntl
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest

from megatron_7b.config import save_config
from megatron_7b.config.schema import RunConfig
from megatron_7b.training.opening import open_folder
from megatron_7b.training.run_folder import RunFolder
from tests.support.commands import run_on_ranks, start_command
from tests.training import runs

PATIENCE = 300.0  # of a busy machine; a quiet one needs a tenth


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with run.yaml, of a run that does not end by itself."""
    return with_corpus(tmp_path, runs.write_corpus(tmp_path))


def with_corpus(folder: Path, corpus: str) -> Path:
    endless = {"train_steps": 1_000_000, "eval_interval_steps": 0}
    config = runs.config(corpus, training=endless, optimizer={"lr_decay_steps": 10})
    save_config(config, folder / "run.yaml")
    return folder


def arguments(folder: Path, num_ranks: int) -> list[str]:
    return [
        "pretrain", "--config", str(folder / "run.yaml"), "--run-dir", str(folder / "run"), "--nproc", str(num_ranks)
    ]  # fmt: skip


@contextlib.contextmanager
def launched(folder: Path, stderr: int = subprocess.PIPE) -> "Iterator[subprocess.Popen[str]]":
    command = [sys.executable, "-m", "megatron_7b", *arguments(folder, 2)]
    with subprocess.Popen(command, stderr=stderr, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.05)


def wait_for_steps(run_dir: Path, number: int = 3) -> None:
    """Wait for so many steps more than there are."""
    beyond = last_step(run_dir) + number
    wait_for(lambda: last_step(run_dir) >= beyond, f"step {beyond}")


def is_free(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def last_step(run_dir: Path) -> int:
    return max((line["step"] for line in runs.steps(run_dir)), default=0)


def rank_pids(launcher: int) -> dict[int, int]:
    """Processes of the ranks that a launcher has started, by rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    pids = {}
    for pid in map(int, children):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        pids.update({int(value[5:]): pid for value in variables if value.startswith(b"RANK=")})
    return pids


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_status_is_true_after_every_kind_of_kill(folder: Path) -> None:
    """Rank 0 is killed, then all lose their terminal, then the launcher is killed: four lives of one run."""
    run_dir = folder / "run"
    with launched(folder) as process:
        wait_for_steps(run_dir)
        os.kill(rank_pids(process.pid)[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 137, errors
    assert "error: rank 0 was ended by SIGKILL" in errors
    assert runs.status(run_dir) == {"state": "failed", "exit_code": 137, "step": last_step(run_dir)}

    terminal, end = pty.openpty()
    with launched(folder, stderr=end) as process:
        os.close(end)
        wait_for_steps(run_dir)
        os.close(terminal)
        for pid in (*rank_pids(process.pid).values(), process.pid):
            os.kill(pid, signal.SIGHUP)
        assert process.wait(timeout=PATIENCE) == 75
    assert runs.status(run_dir) == {"state": "saved", "exit_code": 75, "step": last_step(run_dir)}
    assert "because of SIGHUP; the same command continues from here" in (run_dir / "train.log").read_text()

    with launched(folder, stderr=subprocess.DEVNULL) as process:
        wait_for_steps(run_dir)
        ranks = rank_pids(process.pid)
        process.kill()
        process.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}/cwd").exists() for pid in ranks.values()), "end of the ranks")
    status = runs.status(run_dir)
    assert (status["state"], status["exit_code"]) == ("running", None)
    assert last_step(run_dir) - 1 <= status["step"] <= last_step(run_dir)  # killed between the two files
    with (run_dir / ".lock").open() as lock:
        # Nobody holds it once the last thread is done waiting for the disk: so a reader knows that the run has ended.
        wait_for(lambda: is_free(lock), "end of the lock")

    words = f"the last start was ended without a word after step {status['step']}"
    with launched(folder) as process:
        wait_for(lambda: words in (run_dir / "train.log").read_text(), "remark on the last start")
        process.send_signal(signal.SIGUSR2)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, errors


def newest_checkpoint(run_dir: Path) -> int:
    return int((run_dir / "checkpoints" / "latest").resolve().name.removeprefix("step_"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_of_several_ranks_is_stopped_while_it_is_built(folder: Path) -> None:
    """Rank 0 waits for rank 1, which is held: whatever building takes, it does not delay the end."""
    with launched(folder) as process:
        wait_for(lambda: len(rank_pids(process.pid)) == 2, "ranks")
        ranks = rank_pids(process.pid)
        os.kill(ranks[1], signal.SIGSTOP)
        wait_for(lambda: is_waiting_for_peers(ranks[0]), "rendezvous")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "stopped by SIGTERM before the first step: nothing to save; the same command starts again\n" in errors
    assert "error" not in errors
    assert runs.status(folder / "run") == {"state": "stopped", "exit_code": 75, "step": 0}


def is_waiting_for_peers(pid: int) -> bool:
    """Whether a process listens on a port, as rank 0 does in the rendezvous."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            inodes.add(str(descriptor.readlink()))
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                return True
    return False


@contextlib.contextmanager
def forked(folder: Path, tmp_path: Path, **environment: str) -> Iterator[tuple[int, Callable[[], tuple[int, str]]]]:
    """`pretrain` on one rank; yields its process id, and a function that waits for exit code and standard error."""
    variables = {name: value for name, value in os.environ.items() if name != "RANK"} | environment
    err = tmp_path / "err"
    process = start_command(arguments(folder, 1), tmp_path / "out", err, folder, variables)

    def end() -> tuple[int, str]:
        process.join(PATIENCE)
        return process.exitcode, err.read_text()

    try:
        yield process.pid, end
    finally:
        process.kill()


@pytest.mark.parametrize("name", ["SIGHUP", "SIGXCPU"])
def test_one_rank_saves_at_every_request(name: str, folder: Path, tmp_path: Path) -> None:
    with forked(folder, tmp_path) as (pid, end):
        wait_for_steps(folder / "run")
        os.kill(pid, signal.Signals[name])
        code, errors = end()
    assert code == 75, errors
    step = last_step(folder / "run")
    assert f"stopped after step {step} because of {name}; the same command continues from here" in errors
    assert runs.status(folder / "run") == {"state": "saved", "exit_code": 75, "step": step}
    assert newest_checkpoint(folder / "run") == step


def test_status_follows_the_steps(folder: Path, tmp_path: Path) -> None:
    with forked(folder, tmp_path) as (pid, end):
        wait_for_steps(folder / "run", 5)
        os.kill(pid, signal.SIGKILL)
        end()
    step = last_step(folder / "run")
    status = runs.status(folder / "run")
    assert (status["state"], status["exit_code"]) == ("running", None)
    assert step - 1 <= status["step"] <= step


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_rank_of_another_launcher_is_stopped_while_it_waits_for_its_peers(
    name: str, folder: Path, tmp_path: Path
) -> None:
    """As under torchrun or Slurm: status.json is all that the job script learns."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    (folder / "run").mkdir()  # as Slurm's script has made it
    job = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with forked(folder, tmp_path, **job) as (pid, end):
        wait_for(lambda: is_waiting_for_peers(pid), "rendezvous")
        os.kill(pid, signal.Signals[name])
        code, errors = end()
    assert code == 75, errors
    assert f"stopped by {name} before the first step: nothing to save; the same command starts again\n" in errors
    assert runs.status(folder / "run") == {"state": "stopped", "exit_code": 75, "step": 0}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("failing", ["the main rank", "whichever rank reads it"])
def test_the_message_of_the_rank_that_failed_is_shown(failing: str, tmp_path: Path) -> None:
    """By the launcher, and under another launcher by every rank, as that may end the failing one first."""
    bad_id = None if failing == "the main rank" else runs.VOCAB_SIZE
    folder = with_corpus(tmp_path, runs.write_corpus(tmp_path, bad_id=bad_id))
    expected = "another run is writing to" if bad_id is None else f"{runs.VOCAB_SIZE}"
    with open_folder(RunFolder(folder / "run"), RunConfig()) if bad_id is None else contextlib.nullcontext():
        with launched(folder) as process:
            _, errors = process.communicate(timeout=PATIENCE)
        ranks = run_on_ranks(2, *arguments(folder, 2)[:-2])
    assert process.returncode == 1
    (told,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert expected in told
    assert "failed in" not in told  # that is what the other rank says
    assert "Traceback" not in errors
    for rank in ranks:
        assert rank.returncode == 1
        assert expected in rank.stderr.split("error: ")[1]
