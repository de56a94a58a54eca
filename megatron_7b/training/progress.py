"""How far the run of a folder has come, read from its newest checkpoint before anything is built."""

import dataclasses
from pathlib import Path

from megatron_7b.checkpoint import latest_checkpoint, read_config, read_manifest
from megatron_7b.checkpoint.manifest import Counters, optimizer_starts_afresh
from megatron_7b.config.schema import RunConfig
from megatron_7b.data.samples.blend import integer_weights, parse_blend
from megatron_7b.data.samples.sample_order import Reached, SampleOrder
from megatron_7b.errors import CheckpointError
from megatron_7b.training.batch_schedule import consumed_samples_after


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a start continues from."""

    counters: Counters = dataclasses.field(default_factory=Counters)
    reached: Reached | None = None
    """None for a fresh run."""

    def samples_at_end(self, config: RunConfig) -> int:
        """Samples that the whole run takes: those that were consumed, and those of the steps that are left."""
        return consumed_samples_after(
            config.training.train_steps - self.counters.step,
            config.training,
            consumed=self.counters.consumed_samples,
        )

    def tokens_left(self, config: RunConfig) -> int:
        """Tokens of the steps that are left."""
        return (self.samples_at_end(config) - self.counters.consumed_samples) * config.data.seq_length


def read_progress(checkpoints: Path, config: RunConfig) -> Progress:
    """Read the newest complete checkpoint's record.

    Args:
        checkpoints: Folder of all checkpoints of the run, which need not exist.
        config: Of this start.

    Raises:
        CheckpointError: It cannot be read, or another optimizer wrote it.

    Collective: none.
    """
    newest = latest_checkpoint(checkpoints)
    if newest is None:
        return Progress()
    manifest = read_manifest(newest)
    optimizer_starts_afresh(newest, manifest, config.optimizer.name, config.checkpoint.on_optimizer_change)
    consumed = manifest.counters.consumed_samples
    if manifest.sample_order is None:
        differences = tuple(_differences(read_config(newest), config))
        return Progress(manifest.counters, Reached(consumed, None, differences))
    try:
        order = SampleOrder.from_dict(manifest.sample_order)
        if not order.first_sample <= consumed <= (consumed if order.end is None else order.end):
            raise ValueError(f"samples {order.first_sample} to {order.end}, of which {consumed} were consumed")
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{newest} does not say in which order samples were read: {error!r}",
            hint="use the version of megatron_7b that wrote it, or move this checkpoint away",
        ) from error
    return Progress(manifest.counters, Reached(consumed, order))


def _differences(before: RunConfig, after: RunConfig) -> list[str]:
    """What decides on the order of samples and differs, in words; for a checkpoint that has no record of the order."""
    was, now = _deciding(before), _deciding(after)
    return [f"{name} is {now[name]}, the run had {was[name]}" for name in was if was[name] != now[name]]


def _deciding(config: RunConfig) -> dict[str, object]:
    data = config.data
    return {
        "data.seq_length": data.seq_length,
        "training.seed": config.training.seed,
        "data.split": data.split,
        "data.max_epochs": list(data.max_epochs),
        "the proportion of the sets of data.train": integer_weights([part.weight for part in parse_blend(data.train)]),
        "the number of sets of data.valid": len(parse_blend(data.valid)) if data.valid else 0,
    }
