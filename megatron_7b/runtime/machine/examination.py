"""What this machine can do, line by line, and the command that fixes what is missing.

Libraries that are slow to import, or may crash, are tried in one subprocess with a time limit.
"""

import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from megatron_7b.runtime.machine import device_facts
from megatron_7b.runtime.machine.import_probe import Outcome, probe_imports

GIB = 2**30
MIN_FREE_DISK_GIB = 10
MIN_SHARED_MEMORY_GIB = 1
RESILIENCY_GLIBC = (2, 39)
"""What wheels of nvidia-resiliency-ext need from 0.5 on; elsewhere pip picks 0.4.1, which breaks megatron-core."""

Status = Literal["ok", "absent", "broken"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    status: Status
    """absent: missing but not needed; broken: needed and missing, or present and not working."""
    detail: str
    remedy: str | None = None
    """The command that fixes it."""
    required: bool = False
    """Whether training on this machine needs it."""


def examine_machine(timeout_seconds: float = 120.0) -> list[Finding]:
    """Return what this machine can do and what is missing, as `megatron-7b doctor` prints it.

    Args:
        timeout_seconds: Limit for trying the imports, which happens in another process.
    """
    return list(_examine(probe_imports(timeout_seconds)))


def is_ready(findings: Iterable[Finding]) -> bool:
    """Return whether nothing that training needs is broken."""
    return not any(finding.required and finding.status == "broken" for finding in findings)


def _examine(probe: Mapping[str, Outcome]) -> Iterator[Finding]:
    yield _interpreter()
    yield _processor()
    yield from _memory()
    yield _torch(probe["torch"])
    yield _gpu(probe["torch"])
    yield _megatron_core(probe["megatron.core"])
    yield from _resiliency()
    yield _extension("data extension", probe["megatron_7b.data._index"])
    yield _extension("kernel extension", probe["megatron_7b.runtime._kernels"])
    yield _transformer_engine(probe["transformer_engine.pytorch"], gpu=bool(probe["torch"].facts.get("devices")))
    yield _apex(probe["apex.multi_tensor_apply"])
    yield from _tokenizers()
    yield _slurm()
    yield _disk()


def _interpreter() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} at {sys.executable}", required=True)


def _processor() -> Finding:
    instructions = device_facts.bf16_instructions()
    bf16 = f"BF16 by {', '.join(instructions)}" if instructions else "no BF16 instructions: FP32 is faster here"
    cores = device_facts.available_cores()
    return Finding("processor", "ok", f"{device_facts.processor()}, {cores} cores, {bf16} ({platform.platform()})")


def _memory() -> Iterator[Finding]:
    yield Finding("memory", "ok", f"{device_facts.memory_bytes() / GIB:.1f} GiB")
    if Path("/dev/shm").is_dir():
        size = shutil.disk_usage("/dev/shm").total / GIB
        if size < MIN_SHARED_MEMORY_GIB:
            detail = f"/dev/shm has {size:.2f} GiB; NCCL between GPUs of one node needs more"
            yield Finding("shared memory", "broken", detail, "start the container with --shm-size=16g")
        else:
            yield Finding("shared memory", "ok", f"/dev/shm has {size:.1f} GiB")


def _torch(outcome: Outcome) -> Finding:
    remedy = 'pip install "torch>=2.11"'
    if outcome.error:
        return Finding("torch", "broken", outcome.error, remedy, required=True)
    found = str(outcome.facts["version"])
    cuda = outcome.facts.get("cuda")
    detail = f"{found}, built for {f'CUDA {cuda}' if cuda else 'the CPU only'}"
    if _numbers(found) < (2, 11):
        return Finding("torch", "broken", f"{detail}; 2.11 or later is needed", remedy, required=True)
    return Finding("torch", "ok", detail, required=True)


def _gpu(outcome: Outcome) -> Finding:
    devices = outcome.facts.get("devices")
    if isinstance(devices, list) and devices:
        return Finding("gpu", "ok", f"{len(devices)} x {devices[0]}")
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        answer = _ask(*query)
        if answer.returncode == 0 and answer.stdout.strip():
            detail = f"{answer.stdout.splitlines()[0]} is present, but torch cannot use it"
            return Finding("gpu", "broken", detail, "update the driver, or install a torch built for an older CUDA")
    return Finding("gpu", "absent", "none; training runs on the CPU over gloo")


def _megatron_core(outcome: Outcome) -> Finding:
    remedy = 'pip install "megatron-core~=0.19.0"'
    installed = _version("megatron-core")
    if installed is not None and _numbers(installed) != (0, 19):
        return Finding("megatron-core", "broken", f"{installed}; 0.19 is needed", remedy, required=True)
    if outcome.error:
        resiliency = _version("nvidia-resiliency-ext")
        if resiliency and _numbers(resiliency) < (0, 5):
            remedy = "pip uninstall -y nvidia-resiliency-ext"
        return Finding("megatron-core", "broken", outcome.error, remedy, required=True)
    return Finding("megatron-core", "ok", str(installed), required=True)


def _resiliency() -> Iterator[Finding]:
    """Look at it only if it is installed: nothing here needs it."""
    installed = _version("nvidia-resiliency-ext")
    if installed is None:
        return
    glibc = device_facts.glibc_version()
    if _numbers(installed) >= (0, 5):
        yield Finding("nvidia-resiliency-ext", "ok", installed)
        return
    reason = f"{installed} breaks `import megatron.core`"
    if glibc is not None and glibc < RESILIENCY_GLIBC:
        reason += f"; 0.5 needs glibc 2.39, here is {glibc[0]}.{glibc[1]}"
        remedy = "pip uninstall -y nvidia-resiliency-ext"
    else:
        remedy = 'pip install "nvidia-resiliency-ext>=0.5"'
    yield Finding("nvidia-resiliency-ext", "broken", reason, remedy, required=True)


def _extension(name: str, outcome: Outcome) -> Finding:
    if not outcome.error:
        return Finding(name, "ok", str(outcome.facts.get("file", "")), required=True)
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    remedy = "make setup" if compiler else "install a C++ compiler (apt-get install g++), then: make setup"
    return Finding(name, "broken", outcome.error, remedy, required=True)


def _transformer_engine(outcome: Outcome, *, gpu: bool) -> Finding:
    remedy = 'pip install --no-build-isolation "megatron-7b[gpu]"'
    if not outcome.found:
        detail = "not installed; layers are torch-native, without FP8 and context parallelism"
        return Finding("transformer-engine", "absent", detail, remedy if gpu else None)
    if outcome.error:
        return Finding("transformer-engine", "broken", outcome.error, remedy)
    return Finding("transformer-engine", "ok", str(outcome.facts.get("version", "")))


def _apex(outcome: Outcome) -> Finding:
    installed = _version("apex")
    if outcome.found and not outcome.error:
        return Finding("apex", "ok", installed or "installed")
    if outcome.found:
        return Finding("apex", "broken", str(outcome.error), "pip uninstall -y apex")
    if installed is not None:
        return Finding("apex", "broken", "PyPI's package of that name is not NVIDIA's", "pip uninstall -y apex")
    return Finding("apex", "absent", "not needed; Transformer Engine or torch take its place")


def _tokenizers() -> Iterator[Finding]:
    engines = {
        "tokenizers": "Hugging Face tokenizers",
        "sentencepiece": "SentencePiece models",
        "tiktoken": "tiktoken files",
        "fastokens": "faster encoding",
        "gigatoken": "fastest encoding",
    }
    for package, purpose in engines.items():
        needed = package == "tokenizers"
        installed = _version(package)
        if installed is not None and find_spec(package) is not None:
            yield Finding(package, "ok", f"{installed}, {purpose}", required=needed)
        else:
            status: Status = "broken" if needed else "absent"
            yield Finding(package, status, f"not installed: {purpose}", f"pip install {package}", required=needed)


def _slurm() -> Finding:
    if shutil.which("sbatch") is None:
        return Finding("slurm", "absent", "no sbatch here")
    answer = _ask("sinfo", "--noheader", "--format=%D nodes in %P")
    if answer.returncode != 0:
        return Finding("slurm", "absent", "sbatch is there, but no cluster answers: see `sinfo`")
    return Finding("slurm", "ok", ", ".join(answer.stdout.split("\n")[:-1]))


def _disk() -> Finding:
    free = device_facts.free_disk_bytes(Path.cwd()) / GIB
    detail = f"{free:.0f} GiB free at {Path.cwd()}"
    if free < MIN_FREE_DISK_GIB:
        return Finding("disk", "broken", f"{detail}; a 7B checkpoint with its optimizer takes 95", "free some space")
    return Finding("disk", "ok", detail)


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a quick command of the system; a hang counts as a failure."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, returncode=1, stdout="", stderr=str(error))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, int]:
    """Return major and minor of a version such as 2.14.1+cu130."""
    major, minor, *_ = [*text.split("."), "0"]
    return int(major), int("".join(character for character in minor if character.isdigit()) or 0)
