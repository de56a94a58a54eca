"""Imported once by the fork server: everything that ranks and commands would otherwise import again."""

import isal.igzip  # noqa: F401
import pyarrow.parquet  # noqa: F401
import torch  # noqa: F401

import megatron_7b.cli.preprocess  # noqa: F401
import megatron_7b.data.merge  # noqa: F401
import megatron_7b.model.builder  # noqa: F401
import megatron_7b.optim.optimizer  # noqa: F401
import megatron_7b.training.step  # noqa: F401
