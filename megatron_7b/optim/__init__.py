"""AdamW, Adam, SGD and Muon over megatron-core's optimizers, and learning rates as pure functions of the step."""
