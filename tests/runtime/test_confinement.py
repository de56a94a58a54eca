"""Programs that mean harm: each does what it can, and gets nowhere."""

import os
import platform
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from megatron_7b.errors import ConfigError
from megatron_7b.runtime.confinement import running
from megatron_7b.runtime.confinement.inside import Isolation
from megatron_7b.runtime.confinement.running import Limits, ProgramTests, Verdict, check_isolation, run_program
from megatron_7b.runtime.confinement.system_calls import allowed_calls, limited_calls

TESTS = ProgramTests("assert f(1) == 2  # planted-secret", ("f",))

pytestmark = pytest.mark.skipif(
    not running.isolation_here().is_enough, reason=f"no isolation here: {running.isolation_here().problems}"
)

RETURNS_2 = "def f(x):\n    {}\n    return 2\n"
"""Passes if what it tries first is possible."""

HARMFUL = {
    "ends before its tests": "import os; os._exit(0)",
    "ends in its test": "import os\ndef f(x): os._exit(0)",
    "ends as it is imported": "raise SystemExit(0)",
    "ends well at its end": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit(0)",
    "equals everything": "class E:\n    def __eq__(s, o): return True\ndef f(x): return E()",
    "equals everything as a number": "class E(int):\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\n"
    "def f(x): return E(7)",
    "replaces what compares": "import builtins\nbuiltins.AssertionError = builtins.abs = None\ndef f(x): return 3",
    "answers for its judge": "import os\ndef f(x):\n    for d in range(64):\n"
    "        try: os.write(d, b'\\0' * 7 + b'\\2[]')\n"
    "        except OSError: pass\n    for d in range(64):\n        try: os.write(d, b'{\"passed\": true}\\n')\n"
    "        except OSError: pass\n    os._exit(0)",
    "forks for ever": "import os\ndef f(x):\n    while True: os.fork()",
    "starts threads": RETURNS_2.format("import threading; threading.Thread(target=print).start()"),
    "runs a shell": "import os\ndef f(x): return 2 if os.system('true') == 0 else 1",
    "replaces itself": RETURNS_2.format("import os; os.execv('/bin/true', ['true'])"),
    "kills who started it": RETURNS_2.format("import os; os.kill(os.getppid(), 9)"),
    "kills everybody": RETURNS_2.format("import os; os.kill(-1, 9)"),
    "signals through a pipe": RETURNS_2.format("import fcntl, os; fcntl.fcntl(os.pipe()[0], 8, os.getppid())"),
    "reads passwords": RETURNS_2.format("open('/etc/passwd').read()"),
    "reads the environment": RETURNS_2.format("open('/proc/self/environ').read()"),
    "reads that of others": RETURNS_2.format("import os; open(f'/proc/{os.getppid()}/environ').read()"),
    "lists a folder": RETURNS_2.format("import os; os.listdir('/')"),
    "lists the folder around it": RETURNS_2.format("import os; os.listdir('..')"),
    "changes rights": RETURNS_2.format("import os; os.chmod('.', 0o777); os.chmod('/tmp', 0o777)"),
    "links out": RETURNS_2.format("import os; os.symlink('/etc/passwd', 'a'); open('a').read()"),
    "takes memory": RETURNS_2.format("a = [0] * 10**10"),
    "fills the disk": RETURNS_2.format("[open(str(n), 'wb').write(bytes(10**7)) for n in range(50)]"),
    "answers too much": "def f(x): return 'x' * 10**8",
    "nests without end": "def f(x):\n    a = []\n    for _ in range(10**5): a = [a]\n    return a",
    "crashes": "import ctypes\ndef f(x): ctypes.string_at(0)",
    "says that nothing is isolated": "import os\nfor d in range(3, 64):\n    try:\n        os.lseek(d, 0, 0)\n"
    "    except OSError: pass\n    try: os.write(d, b'{\"calls\": false}\\n')\n    except OSError: pass\n"
    "def f(x): return 3",
    "reads what is installed beside Python": "import os, sysconfig\ndef f(x):\n"
    "    home = os.path.join(sysconfig.get_path('stdlib'), 'site-packages')\n"
    "    files = [os.path.join(*one) for one in os.scandir(home) if not one.is_dir()]\n"
    "    files += [os.path.join(one, name) for one in os.scandir(home) if one.is_dir() for name in os.listdir(one)]\n"
    "    for file in files: open(file).close()\n    return 2 if files else 1",
}

KNOWN_CALLS = sorted({*allowed_calls("x86_64"), *(number for number, *_ in limited_calls("x86_64")), 335, 336})
"""On x86_64, with the two by which the kernel's own probes return, which end a process."""
NATIVE = {
    "every call that is not on the list": f"import ctypes, errno\ndef f(x):\n"
    "    library, answers = ctypes.CDLL(None, use_errno=True), set()\n"
    f"    for number in set(range(600)) - set({KNOWN_CALLS}):\n"
    "        for wide in (0, 1 << 30):  # those of x32\n"
    "            library.syscall(ctypes.c_long(wide + number), 0, 0, 0, 0, 0, 0)\n"
    "            answers.add(ctypes.get_errno())\n    return 1 if answers == {errno.EPERM} else 2",
    "a call as programs of 32 bits make it": "import ctypes, mmap\ndef f(x):\n"
    "    code = mmap.mmap(-1, 4096, prot=7, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
    "    code.write(bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]))  # getpid\n"
    "    call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))\n"
    "    return 2 if call() > 0 else 1",
}
CATCHING = {
    "whatever is raised": ("import os\ndef f(x): os._exit(0)", "try:\n    f(1)\nexcept:\n    pass\n"),
    "the end of an iteration": ("def f(x): raise StopIteration", "for one in map(f, [1]):\n    assert one == 2"),
}

SLOW = {
    "runs for ever": "def f(x):\n    while True: pass",
    "sleeps": "import time\ndef f(x): time.sleep(60)",
    "heeds no signal": "import signal\nfor s in (1, 2, 3, 14, 15, 24): signal.signal(s, signal.SIG_IGN)\n"
    "def f(x):\n    while True: pass",
    "writes for ever": "def f(x):\n    while True: print('x' * 10**6)",
}


@pytest.mark.parametrize("name", HARMFUL)
def test_harm_fails(name: str) -> None:
    verdict = run_program(HARMFUL[name], TESTS, Limits(seconds=20))
    assert not verdict.passed
    assert verdict.result.startswith("failed: ")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of calls and machine code are those of x86_64")
@pytest.mark.parametrize("name", NATIVE)
def test_the_list_of_calls_has_no_gap(name: str) -> None:
    assert not run_program(NATIVE[name], TESTS, Limits(seconds=20)).passed


@pytest.mark.parametrize("name", CATCHING)
def test_tests_that_catch_too_much_let_nobody_pass(name: str) -> None:
    program, tests = CATCHING[name]
    assert not run_program(program, ProgramTests(tests, ("f",)), Limits(seconds=20)).passed


def test_what_a_program_says_steers_no_terminal() -> None:
    program = "def f(x): raise ValueError('\\x1b[2J\\ud800 猫\\n')"
    assert run_program(program, TESTS, Limits(seconds=20)).result == r"failed: ValueError: \x1b[2J\ud800 猫\n"


def test_libraries_of_a_cluster_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Python itself is found by LD_LIBRARY_PATH; nothing else of these folders can be read."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    for name in ("liba.so.1", "secret"):
        (tmp_path / name).write_text(name)
    attempt = "import os; assert 'LD_LIBRARY_PATH' not in os.environ; open({!r}).close()"
    can_read = [
        run_program(RETURNS_2.format(attempt.format(str(tmp_path / name))), TESTS, Limits(seconds=20)).passed
        for name in ("liba.so.1", "secret")
    ]
    assert can_read == [True, False]


def test_users_who_are_not_root_have_namespaces_too() -> None:
    """What hides a process also takes `/proc/self` from it, which the way into a namespace leads through."""
    code = (
        "import os, encodings.ascii\nfrom megatron_7b.runtime.confinement import kernel\n"
        "if os.geteuid() == 0:\n    os.setgid(65534); os.setuid(65534); kernel._prctl(4, 1)\n"
        f"kernel.leave_with_parent({os.getpid()})\ntry:\n    kernel.enter_namespaces()\n"
        "except OSError as error:\n    print(error.strerror, error.filename)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if done.stdout and "/proc" not in done.stdout:
        pytest.skip(f"this machine has none for them: {done.stdout}")
    assert not done.stdout


def test_programs_end_with_who_started_them() -> None:
    code = (
        "from megatron_7b.runtime.confinement.running import *\n"
        f"run_program({SLOW['sleeps']!r}, ProgramTests('f(1)', ('f',)), Limits(seconds=60))"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2]) as outside:
        children: list[psutil.Process] = []
        while len(children) < 2 and outside.poll() is None:
            children = psutil.Process(outside.pid).children()
        time.sleep(0.3)
        outside.kill()
    assert len(children) == 2
    assert psutil.wait_procs(children, timeout=10)[1] == []


@pytest.mark.parametrize("name", SLOW)
def test_time_is_limited(name: str) -> None:
    assert run_program(SLOW[name], TESTS, Limits(seconds=1)) == Verdict(False, "timed out")


def test_what_programs_need_works() -> None:
    """They have the standard library and a folder of their own, of which nothing is left."""
    program = (
        "import collections, hashlib, json, math, random, re, tempfile\ndef f(x):\n"
        "    with tempfile.TemporaryFile(dir='.') as file: file.write(b'x')\n"
        "    return collections.Counter(str(x))['1'] + int(hashlib.md5(b'').digest()[0] > 0)\n"
    )
    if not running.isolation_here().folder:
        program = program.replace("with tempfile.TemporaryFile(dir='.') as file: file.write(b'x')", "pass")
    assert run_program(program, TESTS, Limits(seconds=20)) == Verdict(True, "passed")


def test_the_network_is_out_of_reach() -> None:
    """A server on this very machine hears nothing, by the socket module or by the C library."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.1)
        address = server.getsockname()
        connecting = f"import socket; socket.create_connection({address!r}, 1).close()"
        native = "import ctypes; assert ctypes.CDLL(None).socket(2, 1, 0) >= 0"
        for attempt in (connecting, native):
            assert not run_program(RETURNS_2.format(attempt), TESTS, Limits(seconds=20)).passed
        with pytest.raises(TimeoutError):
            server.accept()


def test_nothing_is_written_and_no_secret_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "planted-secret")
    target = tmp_path / "results.jsonl"
    target.write_text("mine")
    target.chmod(0o666)
    tmp_path.chmod(0o777)
    for attempt in (f"open({str(target)!r}, 'w').write('theirs')", f"open({str(tmp_path / 'new')!r}, 'w').close()"):
        assert not run_program(RETURNS_2.format(attempt), TESTS, Limits(seconds=20)).passed
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]
    assert target.read_text() == "mine"
    looking = (
        "import gc, os, sys\ndef f(x):\n    assert 'A_SECRET' not in os.environ\n"
        "    frame, seen = sys._getframe(1), ''\n"
        "    while frame: seen += repr(frame.f_locals) + repr(frame.f_code.co_consts); frame = frame.f_back\n"
        "    for one in gc.get_objects():\n        if type(one) in (dict, list, tuple): seen += repr(one)[:2000]\n"
        "    return 2 if '-'.join(['planted', 'secret']) in seen else 1\n"
    )
    assert run_program(looking, TESTS, Limits(seconds=20)).result == "failed: AssertionError"


def test_many_at_once_leave_nothing_behind() -> None:
    """Neither files, nor descriptors, nor processes that nobody waits for."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    children = set(psutil.Process().children(recursive=True))  # of other tests
    threads = [
        threading.Thread(target=run_program, args=(program, TESTS, Limits(seconds=1)))
        for program in (SLOW["sleeps"], HARMFUL["crashes"], RETURNS_2.format("pass"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
    assert set(psutil.Process().children(recursive=True)) <= children


def test_without_isolation_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "isolation_here", lambda: Isolation(calls=True, problems={"files": "no Landlock"}))
    with pytest.raises(ConfigError, match=r"cannot keep programs from network and files \(files: no Landlock\)"):
        check_isolation(Limits())
    check_isolation(Limits(must_isolate=False))
    with pytest.raises(ConfigError, match="expected at least 128 MiB"):
        Limits(memory_bytes=2**20)
