"""Imported once by the fork server: everything that ranks and commands would otherwise import again."""

import isal.igzip  # noqa: F401
import megatron.core.models.mimo.optimizer  # noqa: F401  # megatron-core's own optimizer imports it, late
import pyarrow.parquet  # noqa: F401
import pytest  # noqa: F401
import torch.utils.serialization.config  # noqa: F401

import megatron_7b.checkpoint.open_model  # noqa: F401
import megatron_7b.checkpoint.save  # noqa: F401
import megatron_7b.checkpoint.weights  # noqa: F401
import megatron_7b.cli.commands.preprocess  # noqa: F401
import megatron_7b.data.preprocess.job  # noqa: F401
import megatron_7b.data.preprocess.pipeline  # noqa: F401
import megatron_7b.data.upkeep.merge  # noqa: F401
import megatron_7b.evaluation.corpus_loss  # noqa: F401
import megatron_7b.generation.engine  # noqa: F401
import megatron_7b.training.loop  # noqa: F401
