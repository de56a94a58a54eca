"""Real processes: exit codes, signals, the first failure, the port, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megatron_7b.runtime import launch
from tests.support.assets import REPOSITORY

RANK = """
import os, signal, sys, time
from megatron_7b.errors import CheckpointError
from megatron_7b.runtime import launch
launch.join_launcher()
rank = int(os.environ["RANK"])
"""

LAUNCHER = """
import sys
from pathlib import Path
from megatron_7b.runtime.launch import LaunchPlan, launch
sys.exit(launch([sys.executable, sys.argv[1]], LaunchPlan(int(sys.argv[2]), log_folder=Path(sys.argv[3]))))
"""


@pytest.fixture
def start(tmp_path):
    """Start a launcher whose ranks run a program; its ranks find `tmp_path` in $SHARED."""
    started = []

    def start_launcher(program, num_ranks=2, **environment):
        script = tmp_path / "rank.py"
        script.write_text(RANK + textwrap.dedent(program))
        command = [sys.executable, "-c", LAUNCHER, str(script), str(num_ranks), str(tmp_path / "logs")]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "SHARED": str(tmp_path), **environment}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start_launcher
    for process in started:
        process.kill()
        process.communicate()


def finish(process):
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "the ranks did not come that far"
        time.sleep(0.02)


def test_ranks_find_their_place_in_the_environment(start, tmp_path):
    program = """
    import json
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    with open(f"{os.environ['SHARED']}/{rank}.json", "w") as stream:
        json.dump({name: os.environ[name] for name in names}, stream)
    print("said by", rank)
    """
    code, output, errors = finish(start(program, 3, OMP_NUM_THREADS="5"))
    assert (code, output, errors) == (0, "said by 0\n", "")
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [(place["RANK"], place["LOCAL_RANK"]) for place in seen] == [("0", "0"), ("1", "1"), ("2", "2")]
    assert {place["WORLD_SIZE"] + place["LOCAL_WORLD_SIZE"] + place["OMP_NUM_THREADS"] for place in seen} == {"335"}
    assert len({place["MASTER_PORT"] for place in seen}) == 1
    assert (tmp_path / "logs" / "rank_00001.log").read_text() == "said by 1\n"


def test_threads_share_the_cores_where_nothing_is_set(start, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    code, output, _ = finish(start("print(os.environ['OMP_NUM_THREADS']) if rank == 0 else None", 2))
    assert (code, int(output)) == (0, max(cores // 2, 1))


@pytest.mark.parametrize(("codes", "expected"), [((0, 0), 0), ((75, 75), 75), ((0, 75), 75), ((75, 3), 3)])
def test_exit_codes(start, codes, expected):
    assert finish(start(f"sys.exit({codes}[rank])"))[0] == expected


def test_the_first_failure_is_shown_once_and_the_others_are_ended(start):
    program = """
    try:
        if rank == 1:
            raise CheckpointError("shard 7 is damaged", hint="restore it")
        time.sleep(0.5 if rank == 2 else 600)
        raise RuntimeError("connection closed by peer")
    except Exception as error:
        launch.record_failure(error, 1)
        sys.exit(1)
    """
    began = time.monotonic()
    code, _, errors = finish(start(program, 3))
    assert (code, errors.splitlines()[:2]) == (1, ["error: shard 7 is damaged", "hint: restore it"])
    assert "connection closed" not in errors
    assert time.monotonic() - began < 30


def test_defects_keep_their_traceback_and_name_the_rank(start):
    program = """
    if rank == 1:
        try:
            [][5]
        except IndexError as error:
            launch.record_failure(error, 1)
            sys.exit(1)
    time.sleep(600)
    """
    code, _, errors = finish(start(program))
    assert code == 1
    assert errors.startswith("error: rank 1 failed\nTraceback")
    assert "IndexError: list index out of range" in errors


def test_a_death_by_signal_comes_before_what_the_others_say_of_it(start):
    program = """
    if rank == 1:
        print("about to die", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    launch.record_failure(RuntimeError("connection closed by peer"), 1)
    sys.exit(1)
    """
    code, _, errors = finish(start(program))
    assert code == 128 + signal.SIGKILL
    assert errors.startswith("error: rank 1 was ended by SIGKILL; often the kernel ran out of memory")
    assert "  about to die" in errors


def test_only_the_last_life_is_quoted_from_an_appended_log(start, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_00001.log").write_text("a former life\n")
    _, _, errors = finish(start("if rank == 1:\n    print('this life', flush=True)\n    sys.exit(9)\ntime.sleep(600)"))
    assert "rank 1 left with exit code 9\n  this life" in errors
    assert "former" not in errors
    assert (tmp_path / "logs" / "rank_00001.log").read_text() == "a former life\nthis life\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_every_rank(start, tmp_path, number):
    program = """
    def leave(number, frame):
        open(f"{os.environ['SHARED']}/got_{rank}_{signal.Signals(number).name}", "w").close()
        sys.exit(75)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, leave)
    open(f"{os.environ['SHARED']}/ready_{rank}", "w").close()
    time.sleep(600)
    """
    process = start(program)
    wait_for(lambda: len(list(tmp_path.glob("ready_*"))) == 2)
    process.send_signal(number)
    assert finish(process)[0] == 75
    name = "SIGTERM" if number == signal.SIGHUP else number.name
    assert {path.name for path in tmp_path.glob("got_*")} == {f"got_0_{name}", f"got_1_{name}"}


def test_a_signal_before_training_begins_is_said_so(start, tmp_path):
    process = start("open(f\"{os.environ['SHARED']}/ready_{rank}\", 'w').close()\ntime.sleep(600)")
    wait_for(lambda: len(list(tmp_path.glob("ready_*"))) == 2)
    process.send_signal(signal.SIGUSR1)
    code, _, errors = finish(process)
    assert code == 128 + signal.SIGUSR1
    assert "stopped by SIGUSR1 before there was anything to save" in errors


def test_ranks_die_with_a_killed_launcher(start, tmp_path):
    process = start("open(f\"{os.environ['SHARED']}/pid_{os.getpid()}\", 'w').close()\ntime.sleep(600)")
    wait_for(lambda: len(list(tmp_path.glob("pid_*"))) == 2)
    pids = [int(path.name.removeprefix("pid_")) for path in tmp_path.glob("pid_*")]
    process.kill()
    process.communicate()
    wait_for(lambda: not any(is_running(pid) for pid in pids))


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_port_is_kept_for_rank_zero():
    """No one else gets the reserved port, and torch's store can listen on it all the same."""
    import socket

    from torch.distributed import TCPStore

    with launch._reserved_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("", port))
        store = TCPStore("127.0.0.1", port, world_size=1, is_master=True)
        store.set("key", "value")
        assert store.get("key") == b"value"


def test_nodes_meet_where_they_are_told(tmp_path):
    """Two launchers stand for two nodes, each with one rank."""
    script = tmp_path / "rank.py"
    script.write_text(
        RANK + "import torch.distributed as dist\ndist.init_process_group('gloo')\n"
        "print(rank, dist.get_world_size(), os.environ['LOCAL_RANK'])\ndist.destroy_process_group()\n"
    )
    program = textwrap.dedent("""
        import sys
        from megatron_7b.runtime.launch import LaunchPlan, launch
        node, port, script = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
        sys.exit(launch([sys.executable, script], LaunchPlan(1, num_nodes=2, node_rank=node, master_port=port)))
    """)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with launch._reserved_port() as port:
        commands = [[sys.executable, "-c", program, str(node), str(port), str(script)] for node in range(2)]
        processes = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for command in commands
        ]
        assert [process.communicate(timeout=90)[0] for process in processes] == ["0 2 0\n", "1 2 0\n"]
        assert [process.returncode for process in processes] == [0, 0]


def test_outside_of_a_launcher_nothing_is_recorded(monkeypatch):
    monkeypatch.delenv("MEGATRON_7B_FAILURE_FILE", raising=False)
    assert not launch.record_failure(RuntimeError("x"), 1)
    launch.join_launcher()
