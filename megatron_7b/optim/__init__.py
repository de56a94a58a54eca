"""AdamW over megatron-core's optimizers, and learning-rate schedules as pure functions of the step."""
