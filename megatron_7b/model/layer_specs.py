"""The classes that a layer is built from: Transformer Engine's, or torch-native ones."""

import functools
import importlib.util
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.model.kinds.kind import TransformerImpl
from megatron_7b.model.local_layers import RMSNorm, ScaledDotProductAttention, SwiGLU
from megatron_7b.runtime.device import DeviceType


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
        return "transformer_engine", "requested" if wanted != "auto" else "installed"
    asking = {
        "model.transformer_impl": (wanted, wanted == "transformer_engine"),
        "parallel.context_parallel_size": (size := config.parallel.context_parallel_size, size > 1),
        "precision.fp8": (fp8 := config.precision.fp8, fp8 != "none"),
    }
    unmet = [f"{path} is {value!r}" for path, (value, is_unmet) in asking.items() if is_unmet]
    if unmet:
        reason = missing or "model.transformer_impl is local"
        raise ConfigError(
            f"{' and '.join(unmet)}, which needs Transformer Engine, but {reason}",
            hint="leave it at its default, or on a machine with a GPU: pip install 'megatron_7b[gpu]'",
        )
    return "local", "requested" if missing is None else f"no Transformer Engine: {missing}"


def build_stack_spec(impl: TransformerImpl, *, qk_layernorm: bool) -> ModuleSpec:
    """Return the spec of megatron-core's HybridStack for dense decoder layers (`*` attention, `-` MLP)."""
    kernels = _transformer_engine_kernels() if impl == "transformer_engine" else _local_kernels()
    qk_norm = kernels["norm"] if qk_layernorm else None
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=kernels["norm_linear"],
            core_attention=kernels["attention"],
            linear_proj=kernels["row_linear"],
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    mlp = functools.partial(
        MLP.as_mlp_submodule,
        submodules=MLPSubmodules(
            linear_fc1=kernels["norm_linear"],
            linear_fc2=kernels["row_linear"],
            activation_func=kernels["activation"],  # used where TransformerConfig.use_te_activation_func asks for it
        ),
    )
    # Transformer Engine's linear layers contain the norm before them; the torch-native ones do not.
    norm = IdentityOp if impl == "transformer_engine" else kernels["norm"]
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    self_attention=attention,
                    self_attn_bda=get_bias_dropout_add,
                    sharded_state_dict_keys_map={"self_attention.linear_qkv.layer_norm_": "input_layernorm."},
                    input_layernorm=norm,
                ),
            ),
            mlp_layer=ModuleSpec(
                module=MLPLayer,
                submodules=TransformerLayerSubmodules(
                    mlp=mlp,
                    mlp_bda=get_bias_dropout_add,
                    sharded_state_dict_keys_map={"mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm."},
                    pre_mlp_layernorm=norm,
                ),
            ),
        ),
    )


def _local_kernels() -> dict[str, Any]:
    return {
        "norm": RMSNorm,
        "norm_linear": ColumnParallelLinear,
        "row_linear": RowParallelLinear,
        "attention": ScaledDotProductAttention,
        "activation": SwiGLU,
    }


def _transformer_engine_kernels() -> dict[str, Any]:
    from megatron.core.extensions.transformer_engine import (
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    return {
        "norm": TENorm,
        "norm_linear": TELayerNormColumnParallelLinear,
        "row_linear": TERowParallelLinear,
        "attention": TEDotProductAttention,
        "activation": None,
    }
