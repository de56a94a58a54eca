"""What to change if a run fits at no layout: changes that were tried, one by one, and fit."""

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, replace

from megatron_7b.config.schema import ModelConfig, RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.planning.candidate import Candidate
from megatron_7b.planning.devices import GPUS, Device
from megatron_7b.planning.planner import plan

_MOST_GPUS = 64
"""Times as many are tried at most."""
_SHORTEST = 1024


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One change with which the run fits.

    Attributes:
        change: In words, with the option.
        candidate: The first choice then.
    """

    change: str
    candidate: Candidate


def what_would_fit(
    config: RunConfig,
    *,
    gpus: int,
    device: Device,
    given: Set[str] = frozenset(),
    predicted_share: float = 1.0,
    teacher: ModelConfig | None = None,
) -> list[Advice]:
    """Return changes of the run or of the devices with which it fits, the mildest first.

    Args:
        config: The run, which fits at no layout.
        gpus: Ranks.
        device: Of each.
        given: As for `plan`.
        predicted_share: As for `plan`.
        teacher: As for `plan`.
    """

    def best(config: RunConfig, gpus: int, device: Device) -> Candidate | None:
        try:
            return plan(
                config, gpus=gpus, gpu=device, given=given, predicted_share=predicted_share, teacher=teacher, limit=1
            ).best
        except ConfigError:  # a number of ranks that divides nothing, or a change that a rule forbids
            return None

    found = []
    for change, changed in _changes(config):
        if candidate := best(changed, gpus, device):
            found.append(Advice(change=change, candidate=candidate))
    found += _more_gpus(lambda number: best(config, number, device), gpus, device)
    for larger in GPUS.values():
        if larger.memory_bytes > device.memory_bytes and (candidate := best(config, gpus, larger)):
            found.append(Advice(change=f"--gpu {larger.name}: {larger.title}", candidate=candidate))
            break
    return found


def _changes(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    if not config.optimizer.cpu_offload:
        offloaded = replace(config, optimizer=replace(config.optimizer, cpu_offload=True))
        yield "--optimizer.cpu-offload True: moments in host memory", offloaded
    length = config.data.seq_length // 2
    if length >= _SHORTEST:
        changed_data = replace(config.data, seq_length=length)
        yield f"--data.seq-length {length}: shorter samples", replace(config, data=changed_data)


def _more_gpus(best: Callable[[int], Candidate | None], gpus: int, device: Device) -> Iterator[Advice]:
    if device.type == "cpu":
        return
    number = gpus
    while number < gpus * _MOST_GPUS:
        number *= 2
        if candidate := best(number):
            yield Advice(change=f"--gpus {number}: more of them", candidate=candidate)
            return
