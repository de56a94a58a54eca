"""How far a run scales: the first choice for several numbers of devices."""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace

from megatron_7b.config.schema import ModelConfig, RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.planning.candidate import Candidate
from megatron_7b.planning.devices import Device
from megatron_7b.planning.planner import plan


@dataclass(frozen=True, kw_only=True)
class ScalingRow:
    """One number of devices.

    Attributes:
        gpus: How many.
        same_batch: First choice with the run's own global batch (strong scaling); None if nothing fits or divides it.
        grown_batch: First choice if the batch grows with the devices, from that of the first row (weak scaling).
    """

    gpus: int
    same_batch: Candidate | None
    grown_batch: Candidate | None

    def as_dict(self) -> dict[str, object]:
        """Return both as JSON."""
        return {
            "gpus": self.gpus,
            "same_batch": self.same_batch.as_dict() if self.same_batch else None,
            "grown_batch": self.grown_batch.as_dict() if self.grown_batch else None,
        }


def scale(
    config: RunConfig,
    counts: Sequence[int],
    *,
    device: Callable[[int], Device],
    given: Set[str] = frozenset(),
    share: float = 1.0,
    teacher: ModelConfig | None = None,
) -> list[ScalingRow]:
    """Return the first choices of a run on several numbers of devices.

    Args:
        config: The run; its global batch is that of the least number.
        counts: Numbers of devices.
        device: What each is, given how many there are.
        given: As for `plan`.
        share: The `predicted_share` of `plan`.
        teacher: As for `plan`.

    Raises:
        ConfigError: A number is below 1, or the configuration is impossible.
    """

    def best(gpus: int, batch: int) -> Candidate | None:
        grown = replace(config, training=replace(config.training, global_batch_size=batch))
        try:
            found = plan(
                grown, gpus=gpus, gpu=device(gpus), given=given, predicted_share=share, teacher=teacher, limit=1
            )
            return found.best
        except ConfigError as error:
            if "no layout divides" not in str(error):
                raise
            return None

    batch, least = config.training.global_batch_size, min(counts)

    def grown(gpus: int) -> int:
        """Return the batch that is to the number of devices as the run's to the least; of whole samples on each."""
        return -(-batch // least) * gpus if batch * gpus % least else batch * gpus // least

    return [ScalingRow(gpus=gpus, same_batch=best(gpus, batch), grown_batch=best(gpus, grown(gpus))) for gpus in counts]
