"""What both processes do as they begin: they take the limits upon themselves, and lock the doors."""

import contextlib
import json
import os
import resource
import sys
import sysconfig
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_PRIVATE_FOLDER_BYTES = 64 * 2**20
_LARGEST_FILE_BYTES = 16 * 2**20
_MAX_OPEN_FILES = 64
_READABLE = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"),
    *("/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom", "/dev/random", "/dev/zero"),
)
_PACKAGES = ("site-packages", "dist-packages")
LIBRARY_PATH = "LD_LIBRARY_PATH"
"""The one variable that these processes get: on clusters Python itself may need it."""


@dataclass(frozen=True)
class Isolation:
    """What a process is kept from, as far as the machine can.

    Attributes:
        calls: All system calls but those of a list: no sockets, processes, threads, or signals to others.
        files: All files but the standard library and the system's libraries, to read.
        network: It has a network of its own, without interfaces.
        folder: It has a folder in memory that it may write to.
        problems: Why something is not there.
    """

    calls: bool = False
    files: bool = False
    network: bool = False
    folder: bool = False
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def is_enough(self) -> bool:
        """Whether nothing gets out: neither network, nor files, nor processes."""
        return self.calls and self.files


def confine(*, cpu_seconds: int, memory_bytes: int, parent: int) -> Isolation:
    """Limit this process, whose working directory is an empty folder, and take its rights away as far as possible.

    Args:
        cpu_seconds: Of one core.
        memory_bytes: Of address space.
        parent: Process id of the one that started it, with which it ends.

    Raises:
        SystemExit: That one has ended.
    """
    folder, shared = Path.cwd(), os.environ.pop(LIBRARY_PATH, "")
    done: dict[str, bool] = {}
    problems: dict[str, str] = {}

    @contextlib.contextmanager
    def attempt(name: str) -> Any:
        try:
            yield
            done[name] = True
        except (OSError, AttributeError) as error:  # the latter: the C library has no such function
            problems[name] = str(error)

    set_limits(cpu_seconds, memory_bytes)
    if sys.platform == "linux":
        from megatron_7b.runtime.confinement import kernel

        kernel.leave_with_parent(parent)
        with attempt("network"):
            kernel.enter_namespaces()
        with attempt("folder"):
            if "network" not in done:
                raise OSError("there are no namespaces")
            kernel.mount_private_folder(folder, _PRIVATE_FOLDER_BYTES)
            os.chdir(folder)
        kernel.hide_from_others()
        with contextlib.suppress(OSError):
            kernel.drop_capabilities()
        with attempt("files"):
            library = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
            kernel.restrict_files(_readable(library, shared), library, [folder] if "folder" in done else [])
        with attempt("calls"):
            kernel.restrict_calls()
    else:
        problems["calls"] = problems["files"] = f"{sys.platform} has no such means"
    return Isolation(**done, problems=problems)


def _readable(library: list[Path], library_path: str) -> list[Path]:
    """Return what Python itself needs: its own modules without what was installed beside them, and shared libraries."""
    modules = [one for folder in library for one in folder.iterdir() if one.name not in _PACKAGES]
    homes = [Path(sys.base_prefix) / "lib", *(Path(one) for one in library_path.split(":") if one)]
    return [*map(Path, _READABLE), *modules, *(file for home in homes for file in home.glob("*.so*"))]


def set_limits(cpu_seconds: int, memory_bytes: int) -> None:
    """Limit time, memory, size of files and open files; what the system does not know is left out."""
    limits = {
        "RLIMIT_CPU": cpu_seconds,
        "RLIMIT_AS": memory_bytes,
        "RLIMIT_FSIZE": _LARGEST_FILE_BYTES,
        "RLIMIT_NOFILE": _MAX_OPEN_FILES,
        "RLIMIT_CORE": 0,
    }
    for name, value in limits.items():
        number = getattr(resource, name, None)
        if number is not None:
            _, most = resource.getrlimit(number)
            lowered = value if most == resource.RLIM_INFINITY else min(value, most)
            with contextlib.suppress(OSError, ValueError):  # macOS knows no limit of address space
                resource.setrlimit(number, (lowered, lowered))


def begin(task: dict[str, Any]) -> int:
    """Confine this process, say on standard output how well that went, and let go of its streams.

    Returns:
        A file descriptor of the former standard output.

    Raises:
        SystemExit: The task asks for isolation, and there is not enough of it.
    """
    nothing = os.open(os.devnull, os.O_RDWR)  # confined, it may be read only
    limits = {name: task[name] for name in ("cpu_seconds", "memory_bytes", "parent")}
    isolation = confine(**limits)
    told = os.dup(1)
    os.write(told, json.dumps(asdict(isolation)).encode() + b"\n")
    if task["must_isolate"] and not isolation.is_enough:
        raise SystemExit(1)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.close(nothing)
    return told
