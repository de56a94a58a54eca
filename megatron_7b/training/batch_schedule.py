"""The global batch as a pure function of the consumed samples: constant, or ramped up in equal increments.

The ramp is counted in samples and not in steps because consumed samples are the only state of the data stream: from that
one number a resumed run knows both what it reads next and how large its next batch is, whatever its layout.
"""

from megatron_7b.config.schema import TrainingConfig
from megatron_7b.errors import ConfigError


def global_batch_size(consumed_samples: int, config: TrainingConfig) -> int:
    """Return how many samples the next step takes, over all ranks.

    With a ramp-up of `(start, increment, samples)` the batch is `start` at first and grows by `increment` after every
    equal share of `samples`, so that it reaches `global_batch_size` once `samples` samples have been consumed.

    Args:
        consumed_samples: Samples that all earlier steps took.
        config: Batch sizes and ramp-up.

    Returns:
        The number of samples, at most `config.global_batch_size`.

    Raises:
        ConfigError: The ramp-up does not lead from its start to the full size in whole increments.

    Source: the meaning of Megatron-LM's --rampup-batch-size.
    """
    if config.rampup_batch_size is None:
        return config.global_batch_size
    check_rampup(config)
    start, increment, ramp_samples = config.rampup_batch_size
    num_increments = (config.global_batch_size - start) // increment
    if consumed_samples >= ramp_samples:
        return config.global_batch_size
    # In integers: a share of the ramp need not be a whole number of samples.
    return start + increment * (consumed_samples * num_increments // ramp_samples)


def num_microbatches(batch_size: int, micro_batch_size: int, data_parallel_size: int) -> int:
    """Return how many microbatches each data-parallel rank runs for one step.

    Args:
        batch_size: Global batch of the step, in samples.
        micro_batch_size: Samples per microbatch and rank.
        data_parallel_size: Number of data-parallel ranks.

    Returns:
        batch_size / (micro_batch_size · data_parallel_size).

    Raises:
        ConfigError: The division leaves a remainder.
    """
    samples_at_once = micro_batch_size * data_parallel_size
    if batch_size < 1 or batch_size % samples_at_once:
        below = batch_size - batch_size % samples_at_once
        raise ConfigError(
            f"a global batch of {batch_size} samples cannot be split over {data_parallel_size} data-parallel ranks "
            f"in microbatches of {micro_batch_size}",
            hint=f"every global batch must be a multiple of {samples_at_once}; "
            f"the nearest are {below or samples_at_once} and {below + samples_at_once}",
        )
    return batch_size // samples_at_once


def check_rampup(config: TrainingConfig) -> None:
    """Check that the ramp-up arrives at the full batch size.

    Raises:
        ConfigError: Start or increment is not positive, the start is beyond the full size, or the increments miss it.
    """
    if config.rampup_batch_size is None:
        return
    start, increment, ramp_samples = config.rampup_batch_size
    if start < 1 or increment < 1 or ramp_samples < 0 or start > config.global_batch_size:
        raise ConfigError(
            f"training.rampup_batch_size is ({start}, {increment}, {ramp_samples}); expected a start between 1 and "
            f"training.global_batch_size ({config.global_batch_size}), a positive increment and a number of samples"
        )
    if (config.global_batch_size - start) % increment:
        raise ConfigError(
            f"training.rampup_batch_size grows from {start} in increments of {increment} and never reaches "
            f"training.global_batch_size {config.global_batch_size}",
            hint=f"choose an increment that divides {config.global_batch_size - start}",
        )


def consumed_samples_after(num_steps: int, config: TrainingConfig) -> int:
    """Return how many samples the first `num_steps` steps of a run take.

    Only the steps of the ramp are walked through, the rest is one multiplication.
    """
    consumed = 0
    for step in range(num_steps):
        batch_size = global_batch_size(consumed, config)
        if batch_size == config.global_batch_size:
            return consumed + (num_steps - step) * batch_size
        consumed += batch_size
    return consumed
