"""Translation of a run's configuration into megatron-core's TransformerConfig."""

import functools
import importlib.util
from typing import Any

import torch
import torch.nn.functional as functional
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_7b.config.schema import ModelConfig, PrecisionConfig, RunConfig
from megatron_7b.model.kernels import TransformerImpl
from megatron_7b.runtime.machine.device import DeviceType, has_native_bf16

_ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


def params_dtype(precision: PrecisionConfig, device_type: DeviceType) -> torch.dtype:
    """Return the working dtype of the parameters; `auto` is BF16 where the hardware multiplies it natively."""
    if precision.params_dtype == "auto":
        return torch.bfloat16 if has_native_bf16(device_type) else torch.float32
    return torch.bfloat16 if precision.params_dtype == "bf16" else torch.float32


def build_transformer_config(
    config: RunConfig, *, device_type: DeviceType, impl: TransformerImpl, core_layers_per_layer: int
) -> TransformerConfig:
    """Return the TransformerConfig of a run.

    Args:
        config: The run.
        device_type: Where to compute.
        impl: The classes that layers are built from.
        core_layers_per_layer: How many layers megatron-core counts where the configuration counts one.
    """
    model, parallel, precision = config.model, config.parallel, config.precision
    dtype = params_dtype(precision, device_type)
    on_gpu = device_type == "cuda"
    traits = model.traits
    is_swiglu = traits.activation == "silu" and traits.gated_linear_unit
    is_interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    recompute = parallel.recompute_granularity
    cross_entropy = config.cross_entropy_impl(has_transformer_engine=impl == "transformer_engine")
    return TransformerConfig(
        num_layers=model.num_layers * core_layers_per_layer,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_width,
        softmax_scale=traits.softmax_scale,
        **_windows(model, core_layers_per_layer),
        normalization=traits.normalization,
        layernorm_epsilon=model.norm_epsilon,
        activation_func=_ACTIVATIONS[traits.activation],
        gated_linear_unit=traits.gated_linear_unit,
        add_bias_linear=traits.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        init_method_std=model.init_method_std,
        perform_initialization=False,  # `initialization` fills every parameter, independent of the layout
        use_cpu_initialization=not on_gpu,
        # Parallelism
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_dtype=dtype,
        batch_p2p_comm=on_gpu and not is_interleaved,  # megatron-core refuses both of these together
        overlap_p2p_comm=on_gpu and is_interleaved,
        calculate_per_token_loss=True,
        deterministic_mode=on_gpu and config.runtime.deterministic,
        **_experts(config, on_gpu=on_gpu),
        # Numbers
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp8=None if precision.fp8 == "none" else precision.fp8,
        fp8_recipe=precision.fp8_recipe,
        fp8_param=precision.fp8_param_gather,
        # Kernels
        # For megatron-core's own layers; `builder` turns on what Transformer Engine's do by themselves.
        gradient_accumulation_fusion=not on_gpu or _has_apex_weight_gradient(),
        bias_activation_fusion=on_gpu and is_swiglu,  # megatron-core's fused GELU is the approximate one
        use_te_activation_func=not on_gpu and is_swiglu,  # on a CPU the layer spec's own
        bias_dropout_fusion=on_gpu,
        apply_rope_fusion=on_gpu and impl == "transformer_engine",
        masked_softmax_fusion=False,
        cross_entropy_loss_fusion=cross_entropy == "te",
        cross_entropy_fusion_impl="te",
        cuda_graph_impl=config.runtime.cuda_graph_impl if on_gpu else "none",
        # Recompute
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method=parallel.recompute_method if recompute == "full" else None,
        recompute_num_layers=parallel.recompute_num_layers * core_layers_per_layer if recompute == "full" else None,
        recompute_modules=list(parallel.recompute_modules) if recompute == "selective" else None,
    )


def _windows(model: ModelConfig, core_layers_per_layer: int) -> dict[str, Any]:
    """Return what says which layers attend to a window; nothing if none does.

    megatron-core counts the tokens before a token, not the token itself.
    """
    if model.window_size is None:
        return {}
    has_window = [int(window is not None) for window in model.layer_windows for _ in range(core_layers_per_layer)]
    return {"window_size": (model.window_size - 1, 0), "window_attn_skip_freq": has_window}


def _experts(config: RunConfig, *, on_gpu: bool) -> dict[str, Any]:
    """Return the settings of a mixture of experts; none for other models."""
    model, parallel = config.model, config.parallel
    if model.num_moe_experts is None:
        return {}
    # Tensor ranks would exchange tokens in numbers that differ, which gloo cannot.
    is_even = not on_gpu and parallel.tensor_model_parallel_size > 1
    return {
        "num_moe_experts": model.num_moe_experts,
        "moe_ffn_hidden_size": model.expert_width,
        "moe_router_topk": model.moe_router_topk,
        "moe_router_pre_softmax": model.moe_router_pre_softmax,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if model.moe_aux_loss_coeff else "none",
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_token_dispatcher_type": "allgather" if is_even else "alltoall",
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
    }


def _has_apex_weight_gradient() -> bool:
    """Return whether apex is there, with which megatron-core adds weight gradients inside the matrix product."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
