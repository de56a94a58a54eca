#!/usr/bin/env python3
"""Run `pip install …` and say what it is doing, how much is left and how long it takes.

    .venv/bin/python tools/dev/install.py --extras "test dev" --log .venv/setup.log --steps 2/5 -- pip install …

On a terminal one line moves; in a file there is a line per large download, and one every half minute. Everything that
pip prints goes to the log. Only the standard library is there when this runs.
"""

import argparse
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

LARGE_MB = 10.0
SECONDS_BETWEEN_LINES = 30.0
PHASES = ("downloading", "compiling the C++ extension", "unpacking")
_UNITS = {"kB": 1e-3, "MB": 1.0, "GB": 1e3}
_FILE = re.compile(r"\s*(Downloading|Using cached) (\S+) \(([\d.]+) (kB|MB|GB)\)")
_LOCAL_FILE = re.compile(r"\s*Processing (/\S+\.whl)")
_CHUNK = re.compile(r"\s*Progress (\d+) of (\d+)")
_PIN = re.compile(r"^(\S+)==\S+  # (\w+)(?:, ([\d.]+) MB)?", re.MULTILINE)


def expected_megabytes(lock: str, extras: list[str]) -> float:
    """Return about how much a fresh installation with these extras downloads, from the comments of the lock file."""
    return sum(float(size or 0) for _, group, size in _PIN.findall(lock) if group in ("base", *extras))


class Progress:
    """What pip has done so far, from the lines that it prints."""

    def __init__(self, expected_mb: float) -> None:
        self.expected_mb = expected_mb
        self.phase = PHASES[0]
        self.file = ""
        self.file_mb = self.file_done_mb = 0.0
        self.before_mb = 0.0
        """Downloads that are complete, taken from pip's cache or not."""
        self.packages: list[str] = []
        """What pip is about to unpack, in its order."""
        self.started = time.monotonic()
        self.finished: list[tuple[str, float]] = []
        """Phases that are over, and their seconds."""
        self._phase_started = self.started

    @property
    def megabytes(self) -> float:
        """Megabytes so far, those of the file that is being downloaded included."""
        return self.before_mb + self.file_done_mb

    @property
    def extent(self) -> str:
        """How much there is to do in this phase, as far as it is known when it begins."""
        if self.phase == PHASES[0]:
            return f" about {self.expected_mb:,.0f} MB (less what pip has kept from before)" if self.expected_mb else ""
        return f" {len(self.packages)} packages" if self.phase == PHASES[2] else ""

    def enter(self, phase: str) -> None:
        """Begin a phase, unless it has begun."""
        if phase != self.phase:
            now = time.monotonic()
            self.finished.append((self.phase, now - self._phase_started))
            self.phase, self._phase_started = phase, now

    def read(self, line: str) -> str | None:
        """Take a line of pip's; return what a log should say of it, if anything."""
        if match := _CHUNK.match(line):
            self.file_done_mb = min(self.file_mb, int(match[1]) / 1e6)
            return None
        if match := _FILE.match(line):
            said = self._begin_file(match[2], float(match[3]) * _UNITS[match[4]])
            self.file_done_mb = self.file_mb if match[1] == "Using cached" else 0.0
            return said
        if (match := _LOCAL_FILE.match(line)) and Path(match[1]).is_file():
            return self._begin_file(Path(match[1]).name, Path(match[1]).stat().st_size / 1e6)
        if re.match(r"\s*Building (editable|wheel) for \S+ .*: started", line):
            self._end_file()
            self.enter(PHASES[1])
            return None
        if match := re.match(r"Installing collected packages: (.*)", line):
            self._end_file()
            self.packages = match[1].split(", ")
            self.enter(PHASES[2])
            return None
        return None

    def describe(self, unpacked: int = 0) -> str:
        """Return one line: the phase, how far it is, and what is left."""
        seconds = time.monotonic() - self._phase_started
        elapsed = format_seconds(seconds)
        if self.phase == PHASES[2]:
            return f"unpacking: {min(unpacked, len(self.packages))} of {len(self.packages)} packages · {elapsed} so far"
        if self.phase == PHASES[1]:
            return f"{self.phase} · {elapsed} so far"
        if not self.megabytes and not self.file:
            return f"finding out what is needed · {elapsed} so far"
        left_mb = max(0.0, self.expected_mb - self.megabytes)
        rate = self.megabytes / max(1e-3, seconds)
        left = f", about {format_seconds(left_mb / rate)} left" if rate > 0 and left_mb > 1 else ""
        now = f" · {self.file} {self.file_mb:.0f} MB" if self.file_mb >= LARGE_MB else ""
        whole = f" of about {self.expected_mb:,.0f}" if left_mb > 1 else ""
        return f"downloading: {self.megabytes:,.0f}{whole} MB{left}{now} · {elapsed} so far"

    def _begin_file(self, name: str, megabytes: float) -> str | None:
        self._end_file()
        if name.endswith(".metadata"):
            return None
        self.file, self.file_mb = "-".join(name.split("-")[:2]), megabytes
        return self.describe() if megabytes >= LARGE_MB else None

    def _end_file(self) -> None:
        self.before_mb += self.file_mb
        self.file, self.file_mb, self.file_done_mb = "", 0.0, 0.0


class Screen:
    """One moving line on a terminal, or lines in a file now and then."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._prefix = stream, "setup: "
        self._moves = stream.isatty()
        self._last = time.monotonic()

    def say(self, text: str) -> None:
        """Write a line that stays."""
        self._stream.write(f"{self._wipe()}{self._prefix}{text}\n")
        self._stream.flush()
        self._last = time.monotonic()

    def tick(self, text: str) -> None:
        """Renew the moving line; in a file, say it if nothing was said for a while."""
        if self._moves:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"{self._wipe()}{(self._prefix + text)[:width]}")
            self._stream.flush()
        elif time.monotonic() - self._last > SECONDS_BETWEEN_LINES:
            self.say(text)

    def close(self) -> None:
        """Leave the cursor at the beginning of an empty line."""
        self._stream.write(self._wipe())
        self._stream.flush()

    @property
    def moves(self) -> bool:
        """Whether this is a terminal."""
        return self._moves

    def _wipe(self) -> str:
        return "\r\033[K" if self._moves else ""


def format_seconds(seconds: float) -> str:
    """90 as 1:30."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def count_unpacked(site_packages: Path) -> int:
    """How many packages an environment has."""
    return sum(1 for _ in site_packages.glob("*.dist-info"))


def remove_half_unpacked(site_packages: Path) -> list[str]:
    """Forget packages whose unpacking was interrupted, so that pip unpacks them again; return their names.

    pip writes INSTALLER after all other files of a package. Without this, it takes a package whose METADATA is there
    for complete.
    """
    half = [path for path in site_packages.glob("*.dist-info") if not (path / "INSTALLER").is_file()]
    for path in [*half, *site_packages.glob("~*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return [path.name.removesuffix(".dist-info") for path in half]


def run(
    command: list[str], progress: Progress, screen: Screen, log: TextIO, site_packages: Path, steps: tuple[int, int]
) -> int:
    """Run pip to its end and return its exit code; `steps` are the number of the first phase, and of all."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_pass_on, args=(process, lines), daemon=True).start()
    before = count_unpacked(site_packages)
    announced = ""
    while True:
        if progress.phase != announced and progress.phase in PHASES:
            announced = progress.phase
            number = f"[{steps[0] + PHASES.index(announced)}/{steps[1]}] " if steps[1] else ""
            screen.say(f"{number}{announced}{progress.extent}")
        try:
            line = lines.get(timeout=0.5)
        except queue.Empty:
            screen.tick(progress.describe(count_unpacked(site_packages) - before))
            continue
        if line is None:
            break
        if not _CHUNK.match(line):
            log.write(line)
            log.flush()
        said = progress.read(line)
        if said and not screen.moves:
            screen.say(said)
    progress.enter("done")
    screen.close()
    return process.wait()


def _pass_on(process: subprocess.Popen[str], lines: "queue.SimpleQueue[str | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def main() -> int:
    """Install, and print how long each phase took, or what pip said was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", default="", help="extras of pyproject.toml that are installed")
    parser.add_argument("--log", type=Path, required=True, help="file that gets everything that pip prints")
    parser.add_argument("--steps", default="0/0", metavar="K/N", help="number of the first phase, and of all steps")
    parser.add_argument("command", nargs="+", help="arguments of Python after -m")
    arguments = parser.parse_args()
    # Ctrl-C reaches pip as well, which ends with a code of its own after removing its temporary files.
    signal.signal(signal.SIGINT, lambda *_: None)
    lock = Path("requirements.lock")
    text = lock.read_text(encoding="utf-8") if lock.is_file() else ""
    progress = Progress(expected_megabytes(text, arguments.extras.split()))
    screen = Screen(sys.stdout)
    site_packages = Path(next(path for path in sys.path if path.endswith("site-packages")))
    if half := remove_half_unpacked(site_packages):
        screen.say(f"unpacking again what an interruption left half unpacked: {', '.join(half)}")
    first, _, total = arguments.steps.partition("/")
    with arguments.log.open("w", encoding="utf-8") as log:
        command = [sys.executable, "-um", *arguments.command]
        code = run(command, progress, screen, log, site_packages, (int(first), int(total)))
    if code == 0:
        phases = ", ".join(f"{phase} {format_seconds(took)}" for phase, took in progress.finished if took >= 1)
        screen.say(f"installed in {format_seconds(time.monotonic() - progress.started)}: {phases}")
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    os.environ["PYTHONUNBUFFERED"] = "1"
    sys.exit(main())
