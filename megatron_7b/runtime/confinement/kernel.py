"""What the kernel does to confine a process: namespaces, a list of system calls (seccomp), rights to files (Landlock).

Each function changes the calling process, once and for all. They are called through ctypes, because Python has no
functions for them.

Source: seccomp(2), landlock(7), namespaces(7), capset(2).
"""

import contextlib
import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable
from pathlib import Path

from megatron_7b.runtime.confinement.system_calls import AUDIT_ARCHITECTURES, allowed_calls, limited_calls

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SIGKILL = 9
_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWNET = 0x20000, 0x08000000, 0x10000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 2, 4, 8, 0x4000, 1 << 18
_NOBODY = 65534

_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # of BPF: a word of the data, a comparison, the verdict
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
_CALL, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # where they are in the kernel's seccomp_data

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on all machines
_READ_FILES, _LIST = 1 << 2, 1 << 3
_FILE_RIGHTS = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15
_RIGHTS_BY_VERSION = {1: 13, 2: 14, 3: 15, 4: 15}
_ALL_RIGHTS = 16
"""How many rights of files Landlock knows, by the version of its interface; from 5 on all of these."""


def leave_with_parent(parent: int) -> None:
    """Have the kernel end this process when the one that started it ends.

    Args:
        parent: Process id of that one.

    Raises:
        SystemExit: It has ended already.
    """
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(1)


def hide_from_others() -> None:
    """Have no other process of this user look into this one; after `enter_namespaces`, as it takes `/proc/self`."""
    _prctl(_PR_SET_DUMPABLE, 0)


def enter_namespaces() -> None:
    """Enter own namespaces: a network without interfaces, own mounts, and a user without rights outside.

    Raises:
        OSError: The machine does not let its users do so.
    """
    user, group = os.geteuid(), os.getegid()
    _check(_libc().unshare(_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWNS))
    Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
    Path("/proc/self/uid_map").write_text(f"{_NOBODY} {user} 1", encoding="ascii")
    Path("/proc/self/gid_map").write_text(f"{_NOBODY} {group} 1", encoding="ascii")


def mount_private_folder(folder: Path, num_bytes: int) -> None:
    """Put a file system in memory over a folder, seen by this process alone and gone with it.

    Raises:
        OSError: This process has no namespace of mounts, or no rights in it.
    """
    libc = _libc()
    _check(libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None))
    options = f"size={num_bytes},nr_inodes=4096,mode=0700".encode()
    _check(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options))


def drop_capabilities() -> None:
    """Give up whatever the superuser may do.

    Raises:
        OSError: The kernel knows another interface.
    """
    header = struct.pack("=Ii", 0x20080522, 0)
    _check(_libc().capset(header, bytes(24)))


def restrict_files(readable: Iterable[Path], listable: Iterable[Path], writable: Iterable[Path]) -> int:
    """Take all rights to files away, but for some and what is below them.

    Newer kernels also forbid TCP, signals to processes outside, and abstract sockets. No kernel hides whether a path
    exists, and how large it is.

    Args:
        readable: Files, and folders with all that they hold, to read.
        listable: Folders whose names of files may be read, not the files.
        writable: Folders for everything.

    Returns:
        The version of the kernel's interface.

    Raises:
        OSError: The kernel has no Landlock.
    """
    libc = _libc()
    version = _check(libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1))
    rights = (1 << _RIGHTS_BY_VERSION.get(version, _ALL_RIGHTS)) - 1
    attributes = struct.pack("=QQQ", rights, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = _check(libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0))
    for paths, allowed in ((readable, _READ_FILES | _LIST), (listable, _LIST), (writable, rights)):
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                _allow_below(rules, path, allowed & rights)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _check(libc.syscall(_RESTRICT_SELF, rules, 0))
    os.close(rules)
    return version


def restrict_calls() -> None:
    """Refuse every system call that `system_calls` does not allow.

    Raises:
        OSError: The kernel has no seccomp, or the machine is another than those of the table.
    """
    machine = platform.machine()
    if machine not in AUDIT_ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no table of system calls for {machine}")
    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, AUDIT_ARCHITECTURES[machine]),
        refuse,
        (_LOAD, 0, 0, _CALL),
    ]
    for number in allowed_calls(machine):
        program += [(_EQUAL, 0, 1, number), allow]
    for number, argument, values in limited_calls(machine):
        checks = [step for value in values for step in ((_EQUAL, 0, 1, value), allow)]
        load = (_LOAD, 0, 0, _FIRST_ARGUMENT + 8 * argument)
        program += [(_EQUAL, 0, len(checks) + 2, number), load, *checks, refuse]
    program.append(refuse)
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    described = struct.pack(
        "HxxxxxxP" if ctypes.sizeof(ctypes.c_void_p) == 8 else "HxxP", len(program), ctypes.addressof(code)
    )
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_SECCOMP, 2, described)


def _allow_below(rules: int, path: Path, rights: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not path.is_dir():
            rights &= _FILE_RIGHTS
        _check(_libc().syscall(_ADD_RULE, rules, 1, struct.pack("=Qi", rights, place), 0))
    finally:
        os.close(place)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, first: int, second: bytes | None = None) -> None:
    _check(_libc().prctl(option, ctypes.c_ulong(first), second, ctypes.c_ulong(0), ctypes.c_ulong(0)))


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
