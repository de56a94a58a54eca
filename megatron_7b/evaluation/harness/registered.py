"""Checkpoints under the name `megatron_7b` among the models of lm-evaluation-harness, once this module is imported.

import megatron_7b.evaluation.harness.registered
lm_eval.simple_evaluate(model="megatron_7b", model_args="checkpoint=runs/a", tasks=["my_task"])
"""

import os
from typing import Any

from lm_eval.api.registry import register_model

from megatron_7b.errors import ConfigError
from megatron_7b.evaluation.harness.language_model import MegatronLM
from megatron_7b.generation.copies import Copies
from megatron_7b.generation.session import open_session

_PRECISIONS = {"float32": "fp32", "fp32": "fp32", "bfloat16": "bf16", "bf16": "bf16"}


@register_model("megatron_7b")
class CheckpointLM(MegatronLM):
    """A checkpoint that the harness opens by itself, in a process of its own.

    Args:
        checkpoint: A step folder, `RUN/checkpoints/latest` or a run folder, of any layout.
        tokenizer: Instead of the one that the checkpoint carries.
        dtype: float32 or bfloat16.
        batch_size: Texts that share a forward pass; `auto` is 16.
        device: `cpu`; anything else takes what there is.
        others: What else the harness hands to every model.

    Raises:
        CheckpointError: There is no complete checkpoint.
        ConfigError: An argument is wrong, or there are several ranks: the harness leads one alone.
    """

    def __init__(
        self,
        checkpoint: str,
        tokenizer: str | None = None,
        dtype: str = "float32",
        batch_size: int | str = 16,
        device: str | None = None,
        **others: Any,
    ) -> None:
        unknown = sorted(others.keys() - {"max_batch_size"})
        if unknown:
            raise ConfigError(
                f"model_args has {', '.join(unknown)}, expected checkpoint, tokenizer, dtype, batch_size or device"
            )
        if dtype not in _PRECISIONS:
            raise ConfigError(f"dtype is {dtype!r}, expected float32 or bfloat16")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "the harness's own command works with one rank", hint="use `megatron-7b evaluate --tasks` for several"
            )
        # The harness names a GPU unless it is told otherwise, whether there is one or not.
        overrides = {
            "precision.params_dtype": _PRECISIONS[dtype],
            "runtime.device": "cpu" if device == "cpu" else "auto",
        }
        size = 16 if str(batch_size).startswith("auto") else int(batch_size)
        session = open_session(checkpoint, tokenizer=tokenizer, overrides=overrides, max_batch_size=size)
        super().__init__(Copies(session), lambda *_: None)
