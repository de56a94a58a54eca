"""The global batch as a pure function of the consumed samples: constant, or ramped up in equal increments.

The ramp is counted in samples and not in steps because consumed samples are the only state of the data stream: from
that one number a resumed run knows both what it reads next and how large its next batch is, whatever its layout.
"""

from megatron_7b.config.schema import TrainingConfig


def global_batch_size(consumed_samples: int, config: TrainingConfig) -> int:
    """Return how many samples the next step takes, over all ranks.

    With a ramp-up of `(start, increment, samples)` the batch is `start` at first and grows by `increment` after every
    equal share of `samples`, so that it reaches `global_batch_size` once `samples` samples have been consumed.

    Args:
        consumed_samples: Samples that all earlier steps took.
        config: Batch sizes and ramp-up; `config.check_config` has seen to it that the ramp-up arrives at the full size.

    Source: the meaning of Megatron-LM's --rampup-batch-size.
    """
    if config.rampup_batch_size is None:
        return config.global_batch_size
    start, increment, ramp_samples = config.rampup_batch_size
    num_increments, rest = divmod(config.global_batch_size - start, increment)
    assert rest == 0, f"{config.rampup_batch_size} misses {config.global_batch_size}"
    if consumed_samples >= ramp_samples:
        return config.global_batch_size
    # In integers: a share of the ramp need not be a whole number of samples.
    return start + increment * (consumed_samples * num_increments // ramp_samples)


def consumed_samples_after(num_steps: int, config: TrainingConfig, *, consumed: int = 0) -> int:
    """Return how many samples a run has taken after `num_steps` more steps.

    Only the steps of the ramp are walked through, the rest is one multiplication.

    Args:
        num_steps: Steps from there on; negative counts as none.
        config: Batch sizes and ramp-up, which need not be those of the steps before.
        consumed: Samples that earlier steps took.
    """
    for step in range(num_steps):
        batch_size = global_batch_size(consumed, config)
        if batch_size == config.global_batch_size:
            return consumed + (num_steps - step) * batch_size
        consumed += batch_size
    return consumed
