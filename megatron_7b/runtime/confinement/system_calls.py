"""Which system calls a confined process may use, with their numbers per machine.

What is not in this table does not work inside: sockets, processes and threads, signals to others, tracing, changes of
owners and rights, mounts, keys, io_uring, and whatever kernels learn later.

Source: `asm/unistd_64.h` of x86_64, and `asm-generic/unistd.h`, which aarch64 uses; None: the machine has no such call.
"""

from collections.abc import Mapping

AUDIT_ARCHITECTURES: Mapping[str, int] = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""What the kernel calls a machine's system calls, by `platform.machine()`."""

_MACHINES = ("x86_64", "aarch64")

_ALLOWED: Mapping[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "open": (2, None), "openat": (257, 56), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291), "access": (21, None), "faccessat": (269, 48),
    "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78), "lseek": (8, 62), "mmap": (9, 222),
    "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214),
    "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "mkdir": (83, None),
    "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None),
    "renameat": (264, 38), "renameat2": (316, 276), "ftruncate": (77, 46), "truncate": (76, 45), "fsync": (74, 82),
    "fdatasync": (75, 83), "flock": (73, 32), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "pipe": (22, None), "pipe2": (293, 59), "eventfd2": (290, 19), "poll": (7, None), "ppoll": (271, 73),
    "select": (23, None), "pselect6": (270, 72), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
    "epoll_wait": (232, None), "epoll_pwait": (281, 22), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "sigaltstack": (131, 132), "restart_syscall": (219, 128), "futex": (202, 98),
    "get_robust_list": (274, 100), "set_robust_list": (273, 99), "rseq": (334, 293), "set_tid_address": (218, 96),
    "arch_prctl": (158, None), "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158), "getpgrp": (111, None),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getrusage": (98, 165), "times": (100, 153),
    "sysinfo": (99, 179), "uname": (63, 160), "umask": (95, 166), "statfs": (137, 43), "fstatfs": (138, 44),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101),
    "gettimeofday": (96, 169), "time": (201, None), "getrandom": (318, 278), "setitimer": (38, 103),
    "getitimer": (36, 102), "alarm": (37, None), "membarrier": (324, 283), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip

_LIMITED: Mapping[str, tuple[int, int]] = {"fcntl": (72, 25), "ioctl": (16, 29), "prlimit64": (302, 261)}

LIMITED_ARGUMENTS: Mapping[str, tuple[int, tuple[int, ...]]] = {
    # Duplicating, flags and locks; not F_SETOWN and F_SETSIG, by which a pipe sends signals to another process.
    "fcntl": (1, (0, 1, 2, 3, 4, 5, 6, 7, 1030)),
    # Asking a terminal for its form, flags of a file; not TIOCSTI, which types into a terminal.
    "ioctl": (1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),
    # Limits of the process itself.
    "prlimit64": (0, (0,)),
}
"""Calls that are allowed only with some values of one argument: which argument, counted from 0, and which values."""


def allowed_calls(machine: str) -> list[int]:
    """Return the numbers of the calls that are allowed whatever their arguments, on a machine of `_MACHINES`."""
    column = _MACHINES.index(machine)
    return [number for numbers in _ALLOWED.values() if (number := numbers[column]) is not None]


def limited_calls(machine: str) -> list[tuple[int, int, tuple[int, ...]]]:
    """Return number, argument and allowed values of the calls that are allowed only with these."""
    column = _MACHINES.index(machine)
    return [(_LIMITED[name][column], *rule) for name, rule in LIMITED_ARGUMENTS.items()]
