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

from megatron_7b.runtime.process import launch, launched
from megatron_7b.runtime.process.signals import STOP_SIGNALS
from tests.support.assets import REPOSITORY

RANK = """
import os, signal, sys, time
from megatron_7b.errors import CheckpointError, CollectiveError
from megatron_7b.runtime.process import launched
from megatron_7b.runtime.process.signals import STOP_SIGNALS
launched.join_launcher()
rank = int(os.environ["RANK"])
"""

LAUNCHER = """
import os, sys
from pathlib import Path
from megatron_7b.runtime.process import launch
for name in ("SECONDS_TO_FAIL", "SECONDS_TO_EXPLAIN"):
    setattr(launch, name, float(os.environ.get(name, getattr(launch, name))))
logs = Path(sys.argv[3]) if sys.argv[3] else None
plan = launch.LaunchPlan(int(sys.argv[2]), log_folder=logs, resumable="RESUMABLE" in os.environ)
sys.exit(launch.launch([sys.executable, sys.argv[1]], plan))
"""


@pytest.fixture
def start(tmp_path):
    """Start a launcher whose ranks run a program; its ranks find `tmp_path` in $SHARED."""
    started = []

    def start_launcher(program, num_ranks=2, *, logs=True, ignored=(), **environment):
        script = tmp_path / "rank.py"
        script.write_text(RANK + textwrap.dedent(program))
        command = [sys.executable, "-c", LAUNCHER, str(script), str(num_ranks), str(tmp_path / "logs") if logs else ""]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "SHARED": str(tmp_path), **environment}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: [signal.signal(number, signal.SIG_IGN) for number in ignored],
        )  # fmt: skip
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
        launched.record_failure(error, 1)
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
            launched.record_failure(error, 1)
            sys.exit(1)
    time.sleep(600)
    """
    code, _, errors = finish(start(program))
    assert code == 1
    assert errors.startswith("error: rank 1 failed\nTraceback")
    assert "IndexError: list index out of range" in errors


# What a rank that has lost a peer may do: say so, misunderstand it, or be ended by its communication library.
WAYS_TO_FOLLOW = {
    "lost": 'launched.record_failure(RuntimeError("Read error: Connection reset by peer"), 1)',
    "told": 'launched.record_failure(CollectiveError("rank 1 failed in reading"), 1)',
    "misunderstood": 'launched.record_failure(ValueError("no idea"), 1)',
    "aborted": "os.kill(os.getpid(), signal.SIGABRT) if turn == order.index('leave') else None",
}


@pytest.mark.parametrize("way", WAYS_TO_FOLLOW)
@pytest.mark.parametrize("order", [("die", "say", "leave"), ("say", "die", "leave"), ("say", "leave", "die")])
def test_a_killed_rank_is_named_in_every_order_of_events(start, way, order):
    """Rank 1 is killed; rank 0 says something and leaves. Each waits for its turn, so that the order is certain."""
    program = f"""
    order, shared = {order!r}, os.environ["SHARED"]
    def happened(event):
        path = f"{{shared}}/{{event}}"
        return os.path.exists(path) and (event == "say" or not is_running(int(open(path).read())))
    def is_running(pid):
        try:
            return open(f"/proc/{{pid}}/stat").read().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False
    for turn, event in enumerate(order):
        while turn and not happened(order[turn - 1]):
            time.sleep(0.01)
        if (event == "die") != (rank == 1):
            continue
        if event == "say":
            {WAYS_TO_FOLLOW[way]}
        with open(f"{{shared}}/{{event}}.new", "w") as mark:
            mark.write(str(os.getpid()))
        os.rename(f"{{shared}}/{{event}}.new", f"{{shared}}/{{event}}")
        if event == "die":
            print("about to die", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "leave":
            {WAYS_TO_FOLLOW[way]}
            os._exit(1)
    """
    code, _, errors = finish(start(program))
    assert code == 128 + signal.SIGKILL, errors
    assert "error: rank 1 was ended by SIGKILL; " in errors
    assert "  about to die" in errors
    assert errors.count("error: rank") == 1


def test_a_killed_rank_is_named_though_the_others_take_long_to_leave(start):
    program = """
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)
    launched.record_failure(RuntimeError("no idea"), 1)
    time.sleep(1.5)
    sys.exit(1)
    """
    code, _, errors = finish(start(program))
    assert (code, errors.split(";")[0]) == (137, "error: rank 1 was ended by SIGKILL")


def test_the_reason_is_waited_for_longer_than_what_follows_from_it(start):
    """A rank may take long to tell its own error: formatting it, closing files, drawing the loss."""
    program = """
    if rank == 0:
        launched.record_failure(CollectiveError("rank 1 failed in opening the run folder"), 1)
        sys.exit(1)
    time.sleep(2.0)
    launched.record_failure(CheckpointError("another run is writing here"), 2)
    time.sleep(600)
    """
    code, _, errors = finish(start(program, SECONDS_TO_FAIL="0.3"))
    assert (code, errors.splitlines()[0]) == (2, "error: another run is writing here")


def test_ranks_that_only_know_of_a_loss_elsewhere_are_ended_too(start):
    """As where the rank that failed is on another node."""
    program = """
    if rank == 0:
        launched.record_failure(CollectiveError("rank 7 failed in reading"), 1)
        sys.exit(1)
    time.sleep(600)
    """
    code, _, errors = finish(start(program, SECONDS_TO_EXPLAIN="0.3"))
    assert (code, errors.splitlines()[0]) == (1, "error: rank 7 failed in reading")


def test_a_rank_that_hangs_after_its_failure_ends_the_run(start):
    program = """
    if rank == 1:
        launched.record_failure(CheckpointError("shard 7 is damaged"), 1)
    time.sleep(600)
    """
    code, _, errors = finish(start(program))
    assert (code, errors.splitlines()[0]) == (1, "error: shard 7 is damaged")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGSEGV, "SIGSEGV; native code crashed"),
        (
            signal.SIGBUS,
            "SIGBUS; a mapped file became shorter or could not be read, or its disk is full (/dev/shm has ",
        ),
        (signal.SIGILL, "SIGILL; this processor lacks an instruction"),
        (signal.SIGABRT, "SIGABRT; native code gave up"),
    ],
)
def test_a_crash_of_native_code_is_explained(start, number, words):
    code, _, errors = finish(
        start(f"if rank == 1:\n    os.kill(os.getpid(), {number:d})\ntime.sleep(600)", SECONDS_TO_EXPLAIN="3")
    )
    assert code == 128 + number
    assert errors.startswith(f"error: rank 1 was ended by {words}")
    if number == signal.SIGSEGV:
        assert "Fatal Python error: Segmentation fault" in errors


def test_only_the_last_life_is_quoted_from_an_appended_log(start, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_00001.log").write_text("a former life\n")
    _, _, errors = finish(start("if rank == 1:\n    print('this life', flush=True)\n    sys.exit(9)\ntime.sleep(600)"))
    assert "rank 1 left with exit code 9\n  this life" in errors
    assert "former" not in errors
    assert (tmp_path / "logs" / "rank_00001.log").read_text() == "a former life\nthis life\n"


@pytest.mark.parametrize("number", sorted(STOP_SIGNALS))
def test_signals_reach_every_rank(start, tmp_path, number):
    program = """
    def leave(number, frame):
        open(f"{os.environ['SHARED']}/got_{rank}_{signal.Signals(number).name}", "w").close()
        sys.exit(75)
    for number in STOP_SIGNALS:
        signal.signal(number, leave)
    open(f"{os.environ['SHARED']}/ready_{rank}", "w").close()
    time.sleep(600)
    """
    process = start(program)
    wait_for(lambda: len(list(tmp_path.glob("ready_*"))) == 2)
    process.send_signal(number)
    assert finish(process)[0] == 75
    assert {path.name for path in tmp_path.glob("got_*")} == {f"got_0_{number.name}", f"got_1_{number.name}"}


READY = "open(f\"{os.environ['SHARED']}/ready_{rank}\", 'w').close()\ntime.sleep(600)"


def when_ready(process, tmp_path, num_ranks=2):
    wait_for(lambda: len(list(tmp_path.glob("ready_*"))) == num_ranks)
    return process


def test_ranks_that_do_not_listen_are_ended_by_a_signal(start, tmp_path):
    process = when_ready(start(READY), tmp_path)
    process.send_signal(signal.SIGUSR1)
    code, _, errors = finish(process)
    assert (code, errors) == (128 + signal.SIGUSR1, "stopped by SIGUSR1\n")


def test_ctrl_c_is_answered_once(start, tmp_path):
    program = """
    from megatron_7b.cli import main
    def wait(arguments):
        open(f"{os.environ['SHARED']}/ready_{rank}", "w").close()
        time.sleep(600)
    main._run = wait
    sys.exit(main.main([]))
    """
    process = when_ready(start(program), tmp_path)
    process.send_signal(signal.SIGINT)
    assert finish(process) == (130, "", "interrupted\n")


def test_a_run_that_is_stopped_before_its_ranks_listen_may_be_started_again(start, tmp_path):
    process = when_ready(start(READY, RESUMABLE="yes"), tmp_path)
    process.send_signal(signal.SIGTERM)
    code, _, errors = finish(process)
    assert (code, errors) == (75, "stopped by SIGTERM before the first step: the same command continues\n")


def test_when_one_rank_is_stopped_early_the_others_are_ended(start):
    """Slurm's script asks rank 0 alone; the others may be waiting for it until a timeout of half an hour."""
    program = """
    if rank == 0:
        launched.record_stop("stopped by SIGUSR1 before the first step: nothing to save")
        os._exit(75)
    time.sleep(600)
    """
    code, _, errors = finish(start(program, 3, RESUMABLE="yes"))
    assert (code, errors) == (75, "stopped by SIGUSR1 before the first step: nothing to save\n")


def test_ranks_that_do_not_follow_one_that_has_saved_are_ended(start):
    assert finish(start("if rank == 0:\n    os._exit(75)\ntime.sleep(600)"))[::2] == (75, "")


def test_ranks_that_lose_one_that_has_saved_do_not_make_a_failure_of_it(start):
    program = """
    if rank == 0:
        os._exit(75)
    launched.record_failure(RuntimeError("Connection closed by peer"), 1)
    sys.exit(1)
    """
    assert finish(start(program))[::2] == (75, "")


def test_a_failure_counts_though_others_have_saved(start):
    program = """
    if rank == 0:
        os._exit(75)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    assert finish(start(program))[0] == 137


def test_under_nohup_a_closed_terminal_ends_nothing(start, tmp_path):
    program = """
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    open(f"{os.environ['SHARED']}/ready_{rank}", "w").close()
    while not os.path.exists(f"{os.environ['SHARED']}/go"):
        time.sleep(0.02)
    """
    process = when_ready(start(program, ignored=[signal.SIGHUP]), tmp_path)
    process.send_signal(signal.SIGHUP)
    (tmp_path / "go").touch()
    assert finish(process)[::2] == (0, "")


def test_ctrl_z_holds_the_ranks_and_their_launcher(start, tmp_path):
    program = """
    with open(f"{os.environ['SHARED']}/pid.{rank}", "w") as file:
        file.write(str(os.getpid()))
    os.rename(f"{os.environ['SHARED']}/pid.{rank}", f"{os.environ['SHARED']}/ready_{rank}")
    while not os.path.exists(f"{os.environ['SHARED']}/go"):
        time.sleep(0.02)
    """
    process = when_ready(start(program), tmp_path)
    pids = [int(path.read_text()) for path in tmp_path.glob("ready_*")] + [process.pid]
    process.send_signal(signal.SIGTSTP)
    wait_for(lambda: [state(pid) for pid in pids] == ["T"] * 3)
    (tmp_path / "go").touch()
    process.send_signal(signal.SIGCONT)
    assert finish(process)[::2] == (0, "")


@pytest.mark.parametrize("how", ["kill", "terminate"])
def test_no_temporary_file_is_left_or_needed(start, tmp_path, how):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = when_ready(start(READY, TMPDIR=str(scratch), logs=False), tmp_path)
    assert list(scratch.iterdir()) == []
    getattr(process, how)()
    process.communicate()
    assert list(scratch.iterdir()) == []


def test_without_a_folder_for_logs_the_end_of_the_output_is_quoted(start):
    program = (
        "if rank == 1:\n    print('x' * 100_000)\n    print('last words', flush=True)\n    os._exit(9)\ntime.sleep(600)"
    )
    code, _, errors = finish(start(program, logs=False))
    assert code == 9
    assert errors.endswith("\n  last words\n")
    assert len(errors) < 70_000


def test_a_closed_terminal_changes_no_exit_code(start, tmp_path):
    """Nobody reads the launcher's words any more."""
    process = when_ready(start(READY.replace("time.sleep", "sys.exit(9)\ntime.sleep")), tmp_path)
    process.stderr.close()
    process.stdout.close()
    assert process.wait(timeout=60) == 9


def test_ranks_die_with_a_killed_launcher(start, tmp_path):
    process = start("open(f\"{os.environ['SHARED']}/pid_{os.getpid()}\", 'w').close()\ntime.sleep(600)")
    wait_for(lambda: len(list(tmp_path.glob("pid_*"))) == 2)
    pids = [int(path.name.removeprefix("pid_")) for path in tmp_path.glob("pid_*")]
    process.kill()
    process.communicate()
    wait_for(lambda: not any(is_running(pid) for pid in pids))


def state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return None


def is_running(pid):
    return state(pid) not in (None, "Z")


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
        "print(rank, dist.get_world_size(), os.environ['LOCAL_RANK'])\n"
        "dist.barrier()\ndist.destroy_process_group()\n"  # neither leaves while the other still connects
    )
    program = textwrap.dedent("""
        import sys
        from megatron_7b.runtime.process.launch import LaunchPlan, launch
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
    monkeypatch.delenv(launched.LAUNCHER, raising=False)
    launched.join_launcher()
    assert not launched.record_failure(RuntimeError("x"), 1)
