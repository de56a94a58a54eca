"""Imported once by the fork server of `ranks`: everything that a rank would otherwise import again."""

import torch  # noqa: F401

import megatron_7b.model.builder  # noqa: F401
import megatron_7b.optim.optimizer  # noqa: F401
import megatron_7b.training.step  # noqa: F401
