"""A layout for the machine at hand: what `--config auto` stands for. Imports no torch.

Number formats stay those of the run. All ranks of a run that another launcher has started come to the same choice,
since it depends only on what the machine is, not on what is free at the moment.
"""

import csv
import dataclasses
import shutil
import subprocess
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace

from megatron_7b.config.schema import ModelConfig, RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.planning.candidate import Candidate
from megatron_7b.planning.devices import GPUS, Device, gpu_called, this_processor
from megatron_7b.planning.layouts import FORMATS
from megatron_7b.planning.planner import plan
from megatron_7b.runtime.machine.device_facts import available_cores, may_have_gpu, memory_bytes
from megatron_7b.runtime.machine.host_memory import available_memory
from megatron_7b.runtime.machine.peak_rates import peak_tflops

AUTO = "auto"
"""The name among the values of `--config`."""

_GAIN_OF_MORE_RANKS = 1.02
"""Processes on a CPU must make a run faster by this much to be preferred to threads."""
_MOST_RANKS_OF_CPU = 16


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A layout for this machine.

    Attributes:
        world_size: Ranks of the run.
        settings: Options by dotted path.
        summary: What was chosen, in a line.
    """

    world_size: int
    settings: dict[str, object]
    summary: str


def choose_layout(
    config: RunConfig,
    *,
    world_size: int | None = None,
    given: Set[str] = frozenset(),
    predicted_share: float = 1.0,
    teacher: ModelConfig | None = None,
    is_starting: bool = True,
) -> Choice:
    """Return the first choice of a plan for this machine. Collective: none.

    Args:
        config: The run.
        world_size: Ranks of the whole run; None takes all GPUs, or as many processes as its cores make fastest.
        given: Options that stay as they are.
        predicted_share: As for `plan`.
        teacher: As for `plan`.
        is_starting: This process will start the ranks, so that what is free now counts; ranks take what is there.

    Raises:
        ConfigError: Nothing fits, or the configuration is impossible.
    """
    gpus = [] if config.runtime.device == "cpu" or not may_have_gpu() else find_gpus()
    if gpus:
        devices = iter([(world_size or len(gpus), gpus[0])])
    elif config.runtime.device == "cuda":
        raise ConfigError(
            "--config auto: runtime.device is cuda, but nvidia-smi lists no GPU here",
            hint="give the layout yourself; `megatron-7b plan --gpus N --gpu NAME` finds one for another machine",
        )
    else:
        devices = _processors(world_size, memory=available_memory() if is_starting else memory_bytes())
    best: Candidate | None = None
    reason = "no layout divides it"
    for ranks, device in devices:
        try:
            found = plan(
                config, gpus=ranks, gpu=device, given=given | set(FORMATS), predicted_share=predicted_share,
                teacher=teacher, limit=1,
            )  # fmt: skip
        except ConfigError as error:
            if "no layout divides" not in str(error):
                raise
            continue
        candidate = found.candidates[0]
        if not candidate.fits:
            reason = candidate.limit
        elif best is None or candidate.time.total * _GAIN_OF_MORE_RANKS < best.time.total:
            best = candidate
    if best is None:
        raise ConfigError(
            f"--config auto: this run fits at no layout of this machine: {reason}",
            hint="megatron-7b plan --gpu cpu says what it needs, and with other --gpu and --gpus what would hold it",
        )
    return Choice(world_size=best.world_size, settings=best.settings(), summary=_summary(best))


def _summary(best: Candidate) -> str:
    training, ranks = best.config.training, best.world_size
    return (
        f"{best.name} on {ranks} rank{'s' if ranks > 1 else ''}, micro batch {training.micro_batch_size} × "
        f"{best.num_microbatches}, recompute {best.recompute}; about {best.memory.total / 1e9:.1f} GB a rank"
    )


def _processors(world_size: int | None, *, memory: int) -> Iterator[tuple[int, Device]]:
    """Yield numbers of processes, and the share that each has of this machine."""
    numbers = range(1, min(available_cores(), _MOST_RANKS_OF_CPU) + 1) if world_size is None else (world_size,)
    for number in numbers:
        yield number, this_processor(number, memory=memory)


def find_gpus() -> list[Device]:
    """Return the GPUs of this machine, as nvidia-smi lists them; empty if it is not there or does not answer."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    return gpus_of(answer.stdout)


def gpus_of(listing: str) -> list[Device]:
    """Return the devices of lines `name, MiB`.

    Raises:
        ConfigError: A GPU is of a kind whose rates are not known.
    """
    rows = [row for row in csv.reader(listing.splitlines(), skipinitialspace=True) if len(row) == 2]
    devices = [_known(name, int(mebibytes)) for name, mebibytes in rows if mebibytes.strip().isdigit()]
    return [replace(device, node_size=len(devices)) for device in devices]


def _known(name: str, mebibytes: int) -> Device:
    """Return the device of the table that a name means, or the one most alike with the name's own rates."""
    memory = mebibytes * 2**20 - 600 * 2**20  # which the driver keeps
    known = gpu_called(name)
    if known is not None:
        return replace(known, title=name, memory_bytes=memory)
    bf16 = peak_tflops(name, "bf16")
    if bf16 is None:
        raise ConfigError(
            f"--config auto: the rates of {name} are not known",
            hint="give the layout yourself; `megatron-7b plan --gpu-memory` with the GPU most alike finds one",
        )
    fp8 = peak_tflops(name, "fp8")
    flops = {"bf16": bf16 * 1e12, "fp32": bf16 * 0.5e12} | ({"fp8": fp8 * 1e12} if fp8 else {})
    return dataclasses.replace(GPUS["l40s"], name=name.lower(), title=name, memory_bytes=memory, flops=flops)
