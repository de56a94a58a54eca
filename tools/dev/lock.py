#!/usr/bin/env python3
"""Write requirements.lock: the exact versions that are installed in .venv, which are those that the tests ran with.

    .venv/bin/python tools/dev/lock.py       # after `LOCK=none make setup`, which takes the newest versions allowed

`make setup` passes the file to pip as constraints. Each line ends with a comment that tools/dev/install.py reads: which
extra of pyproject.toml needs the package (base: the project itself), and the size of its download in MB, for x86-64.
"""

import re
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
LOCK = REPOSITORY / "requirements.lock"
INSTALLATION_LOG = REPOSITORY / ".venv" / "setup.log"
EXTRAS = ("test", "dev", "prepare")
"""What `make setup` installs; the other extras are chosen by their users, and only limited by pyproject.toml."""
HEADER = """\
# The versions that are tested, for pip's -c: written by tools/dev/lock.py, read by `make setup`.
# name==version  # the extra that needs it (base: the project itself), size of its download on x86-64
"""


def closure(requirements: Iterable[str]) -> dict[str, str]:
    """Return {name: version} of everything installed that some requirements need, directly or indirectly."""
    found: dict[str, str] = {}
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        distribution = metadata.distribution(requirement.name)
        name = canonicalize_name(requirement.name)
        is_known = name in found
        found[name] = distribution.version.partition("+")[0]  # a local build, such as +cpu, fits the public version
        extras = ["", *requirement.extras] if not is_known else list(requirement.extras)
        waiting += [(Requirement(text), one) for one in extras for text in distribution.requires or ()]
    return found


def download_sizes(log: str) -> dict[str, float]:
    """Return MB by name==version from what pip said as it downloaded."""
    sizes = {}
    pattern = r"(?:Downloading|Using cached) (\S+?)-(\d[^-\s]*?)(?:-\S*\.whl|\.tar\.gz|\.zip) \(([\d.]+) (kB|MB|GB)\)"
    for name, version, number, unit in re.findall(pattern, log):
        factor = {"kB": 1e-3, "MB": 1.0, "GB": 1e3}[unit]
        sizes[f"{canonicalize_name(name)}=={version.partition('+')[0]}"] = float(number) * factor
    for path in re.findall(r"Processing (/\S+\.whl)", log):  # taken from a folder of this machine
        if (wheel := Path(path)).is_file():
            name, version = wheel.name.split("-")[:2]
            sizes[f"{canonicalize_name(name)}=={version.partition('+')[0]}"] = wheel.stat().st_size / 1e6
    return sizes


def render(project: dict[str, list[str]], sizes: dict[str, float]) -> str:
    """Return the text of the lock file; `project` maps base and each extra to its requirements."""
    lines: dict[str, str] = {}
    for group, requirements in project.items():
        for name, version in closure(requirements).items():
            pin = f"{name}=={version}"
            size = f", {sizes[pin]:.1f} MB" if pin in sizes else ""
            lines.setdefault(name, f"{pin}  # {group}{size}")
    return HEADER + "".join(f"{lines[name]}\n" for name in sorted(lines))


def main() -> int:
    """Write the file."""
    table = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = table["optional-dependencies"]
    project = {"base": [*table["dependencies"], "pip"], **{extra: extras[extra] for extra in EXTRAS}}
    sizes = {}
    if LOCK.exists():  # what was not downloaded anew keeps its size
        sizes = {pin: float(mb) for pin, mb in re.findall(r"^(\S+)  # .*?([\d.]+) MB$", LOCK.read_text(), re.MULTILINE)}
    if INSTALLATION_LOG.exists():
        sizes |= download_sizes(INSTALLATION_LOG.read_text(encoding="utf-8", errors="replace"))
    LOCK.write_text(render(project, sizes), encoding="utf-8")
    print(f"wrote {LOCK}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
