"""A private, real Slurm of several nodes on this one host, for the tests.

Each node is a `slurmd` inside its own mount, host-name and process namespaces, so that it has a name that resolves, its
own /dev/shm, and dies as a whole. No systemd, no cgroups, no accounting; `munge` with its own key and socket. All
daemons run in the foreground as children that the kernel ends together with the test process. Needs root.
"""

import os
import re
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "munged", "unshare", "setpriv")
INSTALL = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins"


def reason_to_skip() -> str | None:
    """Say why a private Slurm cannot run here, or None where it can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)} here ({INSTALL})"
    if os.geteuid() != 0:
        return "a private Slurm with several nodes on one host needs root"
    if subprocess.run(["unshare", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True).returncode != 0:
        return "this machine allows no new namespaces (unshare failed)"
    return None


class Cluster:
    """Handle of a running cluster: submits jobs and reads their state."""

    def __init__(self, folder: Path, node_names: list[str]) -> None:
        self.folder = folder
        self.node_names = node_names
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))
        } | {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str | Path, environment: Mapping[str, str] | None = None) -> str:
        """Run a client command (`scontrol …`) and return its output; CalledProcessError where it fails."""
        completed = subprocess.run(
            [str(part) for part in command],
            env={**self.environment, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=30,
        )
        if completed.returncode != 0:
            raise AssertionError(f"{command} exited {completed.returncode}: {completed.stdout}{completed.stderr}")
        return completed.stdout + completed.stderr

    def submit(self, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> int:
        """Submit with `sbatch ARGUMENTS…`; return the job's number."""
        return int(self.run("sbatch", "--parsable", *arguments, environment=environment).split(";")[0])

    def job(self, job_id: int) -> dict[str, str]:
        """Return what `scontrol show job` knows about a job."""
        shown = self.run("scontrol", "--oneliner", "show", "job", str(job_id))
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)


def free_ports(count: int) -> list[int]:
    """Return TCP ports that nothing listens on at this moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def slurm_version() -> tuple[int, int]:
    """Return (major, minor) of the installed Slurm."""
    shown = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"(\d+)\.(\d+)", shown)
    assert match is not None, shown
    return int(match[1]), int(match[2])


def write_configuration(folder: Path, node_names: list[str], cpus: int) -> None:
    """Write slurm.conf, cgroup.conf, the nodes' /etc/hosts and the first process of a node."""
    controller_port, *node_ports = free_ports(1 + len(node_names))
    host = socket.gethostname().split(".")[0]
    nodes = [
        f"NodeName={name} NodeHostname={name} NodeAddr=127.0.1.{index} Port={port} CPUs={cpus} Gres=gpu:8 State=UNKNOWN"
        for index, (name, port) in enumerate(zip(node_names, node_ports, strict=True), start=1)
    ]
    # FirstJobId: anywhere, so that two clusters on one machine get different rendezvous ports.
    # cred_expire: how long a requeued job is held back; two minutes by default, five seconds at least.
    (folder / "slurm.conf").write_text(
        f"""\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
FirstJobId={1 + controller_port % 10000}
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
SlurmdTimeout=10
PropagateResourceLimits=NONE
MailProg=/bin/true
"""
        + "\n".join(nodes)
        + f"\nPartitionName=batch Nodes={','.join(node_names)} Default=YES State=UP\n"
    )
    # GPUs that can be asked for: as far as Slurm sees, any character device is one.
    (folder / "gres.conf").write_text(f"Name=gpu Count=8 File={folder}/gpu[0-7]\n")
    for index in range(8):
        os.mknod(folder / f"gpu{index}", stat.S_IFCHR | 0o600, Path("/dev/null").stat().st_rdev)
    # No cgroup plugin is in use, yet slurmd wants to know which one it is not using.
    (folder / "cgroup.conf").write_text(f"CgroupPlugin={'disabled' if slurm_version() >= (23, 11) else 'cgroup/v1'}\n")
    hosts = "".join(f"127.0.1.{index} {name}\n" for index, name in enumerate(node_names, start=1))
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.0.1 {host}\n{hosts}")
    # Process 1 of a node: waits for ever, so that orphans are reaped.
    (folder / "node.sh").write_text(
        f"""\
hostname "$1" && mount --bind {folder}/hosts /etc/hosts && mount -t tmpfs tmpfs /dev/shm || exit 1
slurmd -D -f {folder}/slurm.conf -N "$1" &
while :; do wait; sleep 0.2; done
"""
    )


@contextmanager
def child(*command: str | Path, log: Path, environment: Mapping[str, str], gently: bool) -> Iterator[None]:
    """Run a daemon in the foreground; end it on leaving, and let the kernel end it if this process dies first."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *map(str, command)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield
    finally:
        if gently:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
        process.kill()
        process.wait()


@contextmanager
def running_cluster(folder: Path, *, nodes: int = 2, cpus: int = 8) -> Iterator[Cluster]:
    """Start a cluster of `nodes` nodes (n1, n2, …), each of `cpus` pretended cores, and stop it on leaving.

    Args:
        folder: Empty folder for configuration, state and logs; short, since it holds a socket (limit 107 bytes).
        nodes: Number of nodes.
        cpus: Cores that each node claims to have; nothing is bound to them.
    """
    node_names = [f"n{index}" for index in range(1, nodes + 1)]
    munge = folder / "munge"
    for each in (munge, folder / "state"):
        each.mkdir(mode=0o755)
    (munge / "key").write_bytes(os.urandom(128))
    (munge / "key").chmod(0o600)
    write_configuration(folder, node_names, cpus)
    cluster = Cluster(folder, node_names)
    with ExitStack() as stack:

        def start(*command: str | Path, log: str, gently: bool = True) -> None:
            stack.enter_context(child(*command, log=folder / log, environment=cluster.environment, gently=gently))

        start(
            *("munged", "--foreground", "--force", "--num-threads=2", f"--key-file={munge}/key"),
            *(f"--socket={munge}/socket", f"--pid-file={munge}/pid", f"--log-file={munge}/log"),
            *(f"--seed-file={munge}/seed",),
            log="munged.out",
        )
        await_condition(lambda: (munge / "socket").exists(), folder)
        start("slurmctld", "-D", "-f", folder / "slurm.conf", log="slurmctld.out")
        for name in node_names:
            start(
                *("unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"),
                *("bash", folder / "node.sh", name),
                log=f"{name}.out",
                gently=False,  # a power cut: the namespaces go with their first process
            )
        await_condition(lambda: count_idle(cluster) == nodes, folder)
        yield cluster


def count_idle(cluster: Cluster) -> int:
    """Return how many nodes wait for work; 0 while the controller does not answer."""
    shown = subprocess.run(
        ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"], env=cluster.environment, capture_output=True, text=True
    )
    return len(shown.stdout.split())


def await_condition(condition: Callable[[], bool], folder: Path, *, seconds: float = 20.0) -> None:
    """Return once `condition` holds; AssertionError with the ends of the daemons' logs after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            logs = [f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(folder.glob("*.[lo][ou][gt]"))]
            raise AssertionError("the private Slurm did not come up\n" + "\n".join(logs))
        time.sleep(0.05)
