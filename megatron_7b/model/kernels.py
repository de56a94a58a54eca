"""The classes that layers are built from: Transformer Engine's, or torch-native ones."""

import functools
import importlib.util
from dataclasses import dataclass
from typing import Literal

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp

from megatron_7b.config.architectures import Architecture
from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.model.local_layers import LayerNorm, RMSNorm, ScaledDotProductAttention, SwiGLU
from megatron_7b.runtime.machine.device import DeviceType

type TransformerImpl = Literal["transformer_engine", "local"]


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What a layer spec is made of. An adapter or a quantised base replaces some of it, for any kind of model.

    Attributes:
        norm: A norm by itself.
        norm_before_linear: The norm where `norm_linear` follows: nothing if that contains it.
        norm_linear: Linear layer sharded along its outputs, with the norm before it if the implementation fuses them.
        column_linear: The same without a norm.
        row_linear: Linear layer sharded along its inputs.
        attention: Core attention.
        activation: Module between the linear layers of an MLP; None: `TransformerConfig.activation_func`.
    """

    norm: type
    norm_before_linear: type
    norm_linear: type
    column_linear: type
    row_linear: type
    attention: type
    activation: type | None


def select_kernels(impl: TransformerImpl, traits: Architecture) -> Kernels:
    """Return the classes of an implementation that fit an architecture."""
    return _transformer_engine_kernels() if impl == "transformer_engine" else _local_kernels(traits)


def _local_kernels(traits: Architecture) -> Kernels:
    norm = RMSNorm if traits.normalization == "RMSNorm" else LayerNorm
    is_swiglu = traits.activation == "silu" and traits.gated_linear_unit
    return Kernels(
        norm=norm,
        norm_before_linear=norm,
        norm_linear=ColumnParallelLinear,
        column_linear=ColumnParallelLinear,
        row_linear=RowParallelLinear,
        attention=ScaledDotProductAttention,
        activation=SwiGLU if is_swiglu else None,
    )


def _transformer_engine_kernels() -> Kernels:
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    return Kernels(
        norm=TENorm,
        norm_before_linear=IdentityOp,
        norm_linear=TELayerNormColumnParallelLinear,
        column_linear=TEColumnParallelLinear,
        row_linear=TERowParallelLinear,
        attention=TEDotProductAttention,
        activation=None,
    )


def why_no_transformer_engine(device_type: DeviceType) -> str | None:
    """Return why Transformer Engine cannot be used, or None where it can."""
    return "it needs a GPU" if device_type == "cpu" else _why_no_import()


@functools.cache
def _why_no_import() -> str | None:
    if importlib.util.find_spec("transformer_engine") is None:
        return "it is not installed"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # noqa: BLE001 - its import compiles, loads libraries and asks the driver: anything may fail
        return f"its import failed: {error}"
    return None


def resolve_transformer_impl(config: RunConfig, device_type: DeviceType) -> tuple[TransformerImpl, str]:
    """Return the layer implementation to use, and the reason for it in words.

    Raises:
        ConfigError: Transformer Engine was requested, by name or by an option that needs it, and cannot be used here.
    """
    wanted = config.model.transformer_impl
    missing = why_no_transformer_engine(device_type) if wanted != "local" else None
    if wanted != "local" and missing is None:
        if config.data.reset_attention_mask and config.parallel.context_parallel_size > 1:
            raise ConfigError(
                "data.reset_attention_mask is True with parallel.context_parallel_size "
                f"{config.parallel.context_parallel_size}, but Transformer Engine does not take documents that are cut",
                hint="set model.transformer_impl to local, which takes them, or one of these to False or 1",
            )
        if config.model.window_size is not None and config.parallel.context_parallel_size > 1:
            raise ConfigError(
                f"model.window_size is {config.model.window_size} with parallel.context_parallel_size "
                f"{config.parallel.context_parallel_size}, but Transformer Engine's ranks pass keys on without windows",
                hint="set model.transformer_impl to local, which knows them, or one of these to none or 1",
            )
        return "transformer_engine", "requested" if wanted != "auto" else "installed"
    asking = {
        "model.transformer_impl": (wanted, wanted == "transformer_engine"),
        "precision.fp8": (fp8 := config.precision.fp8, fp8 != "none"),
        "runtime.cuda_graph_impl": (graphs := config.runtime.cuda_graph_impl, graphs != "none"),
        "runtime.cross_entropy_impl": (loss := config.runtime.cross_entropy_impl, loss == "te"),
    }
    unmet = [f"{path} is {value!r}" for path, (value, is_unmet) in asking.items() if is_unmet]
    if unmet:
        reason = missing or "model.transformer_impl is local"
        raise ConfigError(
            f"{' and '.join(unmet)}, which needs Transformer Engine, but {reason}",
            hint="leave it at its default, or on a machine with a GPU: pip install 'megatron_7b[gpu]'",
        )
    return "local", "requested" if missing is None else f"no Transformer Engine: {missing}"
