"""The installation: what it says while it runs, what an interruption leaves, and the versions that it installs."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.assets import REPOSITORY

LOCK = (REPOSITORY / "requirements.lock").read_text(encoding="utf-8")


def load(name: str) -> ModuleType:
    """Import a script of tools/dev, which is no package."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "tools" / "dev" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


install = load("install")
lock = load("lock")


def test_the_lock_has_a_version_that_fits_for_every_requirement() -> None:
    pins = dict(re.findall(r"^([a-z0-9.-]+)==(\S+)  # \w+", LOCK, flags=re.MULTILINE))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *(text for extra in lock.EXTRAS for text in extras[extra])]:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_the_lock_names_packages_and_no_places() -> None:
    lines = [line for line in LOCK.splitlines() if not line.startswith("#")]
    assert len(lines) > 100
    assert all(re.fullmatch(r"[a-z0-9.-]+==[\w.]+  # (base|test|dev|prepare)(, [\d.]+ MB)?", line) for line in lines)


def test_sizes_are_read_from_what_pip_says(tmp_path: Path) -> None:
    wheel = tmp_path / "here-2.0-py3-none-any.whl"
    wheel.write_bytes(bytes(3_000_000))
    said = f"""\
  Downloading torch-2.14.1-cp312-cp312-manylinux_2_28_x86_64.whl (554.6 MB)
Downloading Some_Thing-1.2.post1.tar.gz (900 kB)
  Using cached big-3.0-py3-none-any.whl.metadata (29 kB)
Processing {wheel} (from x==1)
"""
    assert lock.download_sizes(said)["torch==2.14.1"] == 554.6
    assert lock.download_sizes(said)["some-thing==1.2.post1"] == 0.9
    assert lock.download_sizes(said)["here==2.0"] == 3.0
    assert install.expected_megabytes("a==1  # base, 5.0 MB\nb==2  # dev, 2.5 MB\nc==3  # test\n", ["dev"]) == 7.5


PIP_SAYS = """\
Collecting torch<2.15,>=2.11 (from megatron-7b==0.1.0)
  Downloading torch-2.14.1-cp312-cp312-manylinux_2_28_x86_64.whl.metadata (29 kB)
Downloading torch-2.14.1-cp312-cp312-manylinux_2_28_x86_64.whl (500.0 MB)
Progress 100000000 of 500000000
Progress 500000000 of 500000000
Using cached numpy-2.5.5-cp312-cp312-manylinux_2_27_x86_64.whl (100.0 MB)
Building wheels for collected packages: megatron-7b
  Building editable for megatron-7b (pyproject.toml): started
  Building editable for megatron-7b (pyproject.toml): finished with status 'done'
Installing collected packages: numpy, torch, megatron-7b
Successfully installed megatron-7b-0.1.0 numpy-2.5.5 torch-2.14.1
"""


def test_progress_says_how_much_is_left() -> None:
    progress = install.Progress(expected_mb=1000.0)
    phases, megabytes, said = [], [], []
    for line in PIP_SAYS.splitlines(keepends=True):
        said.append(progress.read(line))
        phases.append(progress.phase)
        megabytes.append(progress.megabytes)
    assert megabytes == [0, 0, 0, 100, 500, 600, 600, 600, 600, 600, 600]
    assert phases.index("compiling the C++ extension") == 7
    assert phases.index("unpacking") == 9
    assert progress.describe(2).startswith("unpacking: 2 of 3 packages")
    assert [line.split(" MB")[0] for line in said if line] == [
        "downloading: 0 of about 1,000",
        "downloading: 500 of about 1,000",
    ]


def test_a_package_whose_unpacking_was_interrupted_is_unpacked_again(tmp_path: Path) -> None:
    for name, files in (("whole-1.0", ["METADATA", "INSTALLER", "RECORD"]), ("half-2.0", ["METADATA"])):
        (tmp_path / f"{name}.dist-info").mkdir()
        for file in files:
            (tmp_path / f"{name}.dist-info" / file).touch()
    (tmp_path / "~orch").mkdir()  # what pip moves aside as it replaces a package
    assert install.remove_half_unpacked(tmp_path) == ["half-2.0"]
    assert [path.name for path in tmp_path.iterdir()] == ["whole-1.0.dist-info"]


def started_setup(tmp_path: Path, pip: str) -> "subprocess.Popen[str]":
    """Run the installer with a module of ours in pip's place."""
    (tmp_path / "pip_of_ours.py").write_text(pip)
    script = REPOSITORY / "tools" / "dev" / "install.py"
    return subprocess.Popen(
        [sys.executable, script, "--steps", "2/5", "--log", tmp_path / "log", "--", "pip_of_ours"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def test_steps_are_announced_and_timed(tmp_path: Path) -> None:
    process = started_setup(tmp_path, f"print({PIP_SAYS!r}, end='')")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    steps = [line for line in said.splitlines() if "/5]" in line]
    assert [line.partition("] ")[2].split(" about")[0] for line in steps] == [
        "downloading",
        "compiling the C++ extension",
        "unpacking 3 packages",
    ]
    assert said.splitlines()[-1].startswith("setup: installed in 0:0")
    assert "Progress" not in (tmp_path / "log").read_text()


def test_a_failure_keeps_its_code(tmp_path: Path) -> None:
    process = started_setup(tmp_path, "print('ERROR: no such version'); raise SystemExit(3)")
    process.communicate(timeout=60)
    assert process.returncode == 3
    assert "ERROR: no such version" in (tmp_path / "log").read_text()


@pytest.mark.skipif(not hasattr(signal, "SIGINT"), reason="needs signals")
def test_ctrl_c_ends_pip_and_then_us(tmp_path: Path) -> None:
    process = started_setup(
        tmp_path,
        "import pathlib, time\npathlib.Path('began').touch()\ntry:\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    pathlib.Path('cleaned up').touch()\n    raise SystemExit(130)\n",
    )
    while not (tmp_path / "began").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert (tmp_path / "cleaned up").exists()
