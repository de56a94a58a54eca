"""Rules for the model, its layout over ranks and its number formats."""

from collections.abc import Iterator

from megatron_7b.config.options import get_value, options
from megatron_7b.config.problems import Problem
from megatron_7b.config.rule import LAYOUT, Case, Rule, adder_to, nearest_divisors, nearest_multiples
from megatron_7b.config.stages import divide_layers

RULES: list[Rule] = []
rule = adder_to(RULES)

# Model -------------------------------------------------------------------------------------------------------------


@rule("model.hidden_size", "model.num_attention_heads", "model.kv_channels")
def _heads_share_the_hidden_size(case: Case) -> Iterator[Problem]:
    model = case.config.model
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        yield case.problem(
            "model.num_attention_heads",
            f"must divide model.hidden_size = {model.hidden_size} (nearest: "
            f"{nearest_divisors(model.hidden_size, model.num_attention_heads)}), or set model.kv_channels",
        )


@rule("model.architecture", "model.hidden_size", "model.num_attention_heads", "model.kv_channels")
def _rotary_needs_even_heads(case: Case) -> Iterator[Problem]:
    model = case.config.model
    width = model.head_width
    if width % 2 and model.traits.position_embedding_type == "rope":
        path = "model.kv_channels" if model.kv_channels else "model.num_attention_heads"
        yield case.problem(path, f"heads are {width} wide; rotary embeddings turn pairs, so the width must be even")


@rule("model.num_attention_heads", "model.num_query_groups")
def _groups_divide_heads(case: Case) -> Iterator[Problem]:
    model = case.config.model
    groups = model.num_query_groups
    if groups and model.num_attention_heads % groups:
        yield case.problem(
            "model.num_query_groups",
            f"must divide model.num_attention_heads = {model.num_attention_heads}; nearest: "
            f"{nearest_divisors(model.num_attention_heads, groups)}",
        )


@rule("model.rope_scaling")
def _rope_frequencies_are_ordered(case: Case) -> Iterator[Problem]:
    scaling = case.config.model.rope_scaling
    if scaling and scaling.low_freq_factor >= scaling.high_freq_factor:
        yield case.problem(
            "model.rope_scaling.low_freq_factor",
            f"must be below model.rope_scaling.high_freq_factor = {scaling.high_freq_factor}",
        )


@rule("data.seq_length", "model.max_position_embeddings", "model.architecture")
def _sequence_fits_positions(case: Case) -> Iterator[Problem]:
    model = case.config.model
    limit = model.max_position_embeddings
    if case.config.data.seq_length > limit and model.traits.position_embedding_type != "relative":
        yield case.problem("data.seq_length", f"must be at most model.max_position_embeddings = {limit}")


# Parallel layout ---------------------------------------------------------------------------------------------------


@rule(*LAYOUT)
def _layout_divides_ranks(case: Case) -> Iterator[Problem]:
    if case.world_size is None or case.world_size % case.model_parallel_size == 0:
        return
    parallel = case.config.parallel
    tp, pp, cp = (get_value(parallel, path.removeprefix("parallel.")) for path in LAYOUT)
    yield Problem(
        "number of ranks",
        case.world_size,
        f"must be a multiple of tp * pp * cp = {tp} * {pp} * {cp} = {case.model_parallel_size}; nearest: "
        f"{nearest_multiples(case.model_parallel_size, case.world_size)}",
    )


@rule("parallel.tensor_model_parallel_size", "model.num_attention_heads", "model.num_query_groups")
def _tensor_parallel_splits_heads(case: Case) -> Iterator[Problem]:
    model, tp = case.config.model, case.config.parallel.tensor_model_parallel_size
    groups = model.query_groups
    name = "num_query_groups" if model.num_query_groups else "num_attention_heads"
    if groups % tp:
        yield case.problem(
            "parallel.tensor_model_parallel_size",
            f"must divide model.{name} = {groups}; nearest: {nearest_divisors(groups, tp)}",
        )


@rule("parallel.tensor_model_parallel_size", "model.ffn_hidden_size")
def _tensor_parallel_splits_ffn(case: Case) -> Iterator[Problem]:
    ffn, tp = case.config.model.ffn_hidden_size, case.config.parallel.tensor_model_parallel_size
    if ffn % tp:
        yield case.problem(
            "parallel.tensor_model_parallel_size",
            f"must divide model.ffn_hidden_size = {ffn}; nearest: {nearest_divisors(ffn, tp)}",
        )


@rule("parallel.sequence_parallel", "parallel.tensor_model_parallel_size")
def _sequence_parallel_needs_tensor_parallel(case: Case) -> Iterator[Problem]:
    parallel = case.config.parallel
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield case.problem(
            "parallel.sequence_parallel",
            "shards activations over tensor-parallel ranks: set parallel.tensor_model_parallel_size above 1",
        )


@rule(
    "data.seq_length",
    "parallel.context_parallel_size",
    "parallel.sequence_parallel",
    "parallel.tensor_model_parallel_size",
)
def _sequence_splits_evenly(case: Case) -> Iterator[Problem]:
    parallel, seq_length = case.config.parallel, case.config.data.seq_length
    cp = parallel.context_parallel_size
    tp = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    # Context parallelism gives each rank one piece of the front half and one of the back, to even out causal work.
    pieces = (2 * cp if cp > 1 else 1) * tp
    if seq_length % pieces:
        terms = ["2 * parallel.context_parallel_size"] if cp > 1 else []
        terms += ["parallel.tensor_model_parallel_size (under sequence_parallel)"] if tp > 1 else []
        yield case.problem(
            "data.seq_length",
            f"must be a multiple of {' * '.join(terms)} = {pieces}; nearest: {nearest_multiples(pieces, seq_length)}",
        )


_STAGES = ("parallel.pipeline_model_parallel_size", "parallel.virtual_pipeline_model_parallel_size")


@rule("model.num_layers", *_STAGES)
def _stages_have_layers(case: Case) -> Iterator[Problem]:
    layers = case.config.model.num_layers
    virtual = case.config.parallel.virtual_pipeline_model_parallel_size
    if layers < case.chunks:
        yield case.problem(
            "parallel.pipeline_model_parallel_size",
            f"{f'times virtual_pipeline_model_parallel_size = {virtual} ' if virtual else ''}"
            f"must be at most model.num_layers = {layers}, so that every stage has a layer",
        )


@rule("model.num_layers", "model.architecture", *_STAGES)
def _encoders_split_layers_evenly(case: Case) -> Iterator[Problem]:
    layers, model = case.config.model.num_layers, case.config.model
    if model.traits.kind == "encoder" and case.chunks <= layers and layers % case.chunks:
        yield case.problem(
            "parallel.pipeline_model_parallel_size",
            f"must divide model.num_layers = {layers} in {model.architecture}; only the stages of decoders may be "
            f"uneven; nearest: {nearest_divisors(layers, case.chunks)}",
        )


@rule("parallel.pipeline_model_parallel_layout", "model.num_layers", "model.architecture", *_STAGES)
def _layout_is_of_these_stages(case: Case) -> Iterator[Problem]:
    path, layout = "parallel.pipeline_model_parallel_layout", case.config.parallel.pipeline_model_parallel_layout
    layers, model = case.config.model.num_layers, case.config.model
    if not layout:
        return
    if model.traits.kind != "decoder":
        yield case.problem(path, f"only applies to decoders, not to {model.architecture}")
    elif case.chunks == 1:
        yield case.problem(path, "needs parallel.pipeline_model_parallel_size above 1")
    elif len(layout) != case.chunks or sum(layout) != layers or min(layout) < 1:
        usual = ", ".join(map(str, divide_layers(layers, case.chunks)))
        yield case.problem(
            path,
            f"must be {case.chunks} numbers of at least 1 that add up to model.num_layers = {layers}, one for each "
            f"stage; if left out: {usual}",
        )


@rule("parallel.pipeline_model_parallel_size", "parallel.virtual_pipeline_model_parallel_size")
def _virtual_stages_need_a_pipeline(case: Case) -> Iterator[Problem]:
    parallel = case.config.parallel
    virtual = parallel.virtual_pipeline_model_parallel_size
    if virtual is None:
        return
    path = "parallel.virtual_pipeline_model_parallel_size"
    if virtual == 1:
        yield case.problem(path, "must be at least 2, or none for the plain schedule")
    elif parallel.pipeline_model_parallel_size == 1:
        yield case.problem(path, "needs parallel.pipeline_model_parallel_size above 1")


@rule("data.reset_attention_mask", "parallel.context_parallel_size", "model.transformer_impl", "runtime.device")
def _documents_are_cut_by_local_layers_only(case: Case) -> Iterator[Problem]:
    # Transformer Engine would need each document padded to a multiple of 2 * cp, which moves every later token.
    cp, impl = case.config.parallel.context_parallel_size, case.config.model.transformer_impl
    uses_engine = impl == "transformer_engine" or (impl == "auto" and case.config.runtime.device == "cuda")
    if case.config.data.reset_attention_mask and cp > 1 and uses_engine:
        yield case.problem(
            "data.reset_attention_mask",
            f"with parallel.context_parallel_size = {cp}, documents are cut apart, which Transformer Engine does not "
            "take: set model.transformer_impl to local, or one of these to False or 1",
        )


@rule("parallel.overlap_param_gather", "parallel.overlap_grad_reduce", "parallel.use_distributed_optimizer")
def _overlap_needs_sharded_optimizer(case: Case) -> Iterator[Problem]:
    parallel = case.config.parallel
    needed = [name for name in ("use_distributed_optimizer", "overlap_grad_reduce") if not getattr(parallel, name)]
    if parallel.overlap_param_gather and needed:
        yield case.problem(
            "parallel.overlap_param_gather", f"needs {' and '.join(f'parallel.{name} True' for name in needed)}"
        )


@rule(
    "parallel.recompute_granularity",
    "parallel.recompute_num_layers",
    "model.num_layers",
    "parallel.pipeline_model_parallel_layout",
    *_STAGES,
)
def _recompute_fits_a_stage(case: Case) -> Iterator[Problem]:
    parallel = case.config.parallel
    layers = min(parallel.stage_layers(case.config.model.num_layers))
    if parallel.recompute_granularity == "full" and parallel.recompute_num_layers > max(layers, 1):
        yield case.problem(
            "parallel.recompute_num_layers", f"must be at most {layers}, the layers of the smallest stage"
        )


@rule("parallel.recompute_granularity", "parallel.recompute_num_layers", "parallel.recompute_method")
def _recompute_options_are_used(case: Case) -> Iterator[Problem]:
    parallel = case.config.parallel
    for name in ("recompute_num_layers", "recompute_method"):
        default = options()[f"parallel.{name}"].default
        if parallel.recompute_granularity != "full" and getattr(parallel, name) != default:
            yield case.problem(f"parallel.{name}", "only applies with parallel.recompute_granularity full")


RECOMPUTE_MODULES = ("core_attn", "mlp", "moe")
"""What selective recompute knows. megatron-core's `layernorm` needs Transformer Engine, which fuses norms."""


@rule(
    "parallel.recompute_modules",
    "parallel.recompute_granularity",
    "model.architecture",
    "model.num_moe_experts",
)
def _recomputed_modules_are_there(case: Case) -> Iterator[Problem]:
    path, modules, model = "parallel.recompute_modules", case.config.parallel.recompute_modules, case.config.model
    if case.config.parallel.recompute_granularity != "selective":
        if modules != options()[path].default:
            yield case.problem(path, "only applies with parallel.recompute_granularity selective")
        return
    if unknown := [name for name in modules if name not in RECOMPUTE_MODULES]:
        yield case.problem(path, f"{' and '.join(unknown)}: expected some of {', '.join(RECOMPUTE_MODULES)}")
    elif not modules:
        yield case.problem(path, f"expected some of {', '.join(RECOMPUTE_MODULES)}, or recompute_granularity none")
    elif "moe" in modules and model.num_moe_experts is None:
        yield case.problem(path, "moe needs a mixture of experts (model.num_moe_experts); mlp is that of dense layers")
    elif "mlp" in modules and model.num_moe_experts is not None:
        yield case.problem(path, "mlp is that of dense layers, of which a mixture of experts has none: moe is its own")
    elif "mlp" in modules and model.traits.add_bias_linear:
        # megatron-core's checkpoint of an MLP returns its bias, whose gradient would then compute it again without end.
        yield case.problem(path, f"mlp needs linear layers without biases, not {model.architecture}")


# Precision ---------------------------------------------------------------------------------------------------------


def obstacle_to_transformer_engine(case: Case) -> str | None:
    """Return what in the configuration keeps Transformer Engine out, or None."""
    if case.config.model.transformer_impl == "local":
        return "set model.transformer_impl to auto or transformer_engine"
    if case.config.runtime.device == "cpu":
        return "it has no CPU kernels: set runtime.device to auto or cuda"
    return None


@rule("model.transformer_impl", "runtime.device")
def _transformer_engine_needs_a_gpu(case: Case) -> Iterator[Problem]:
    if case.config.model.transformer_impl == "transformer_engine" and case.config.runtime.device == "cpu":
        yield case.problem("model.transformer_impl", "Transformer Engine has no CPU kernels: set auto or local")


@rule(
    "runtime.cuda_graph_impl",
    "runtime.device",
    "model.transformer_impl",
    "model.architecture",
    "model.num_moe_experts",
    "parallel.recompute_granularity",
    "data.reset_attention_mask",
    "adapter.method",
    "distillation.teacher",
)
def _graphs_repeat_the_same_kernels(case: Case) -> Iterator[Problem]:
    config, path = case.config, "runtime.cuda_graph_impl"
    if config.runtime.cuda_graph_impl == "none":
        return
    if obstacle := obstacle_to_transformer_engine(case):
        yield case.problem(path, f"needs Transformer Engine; {obstacle}")
    elif config.model.traits.kind != "decoder" or config.model.num_moe_experts is not None:
        yield case.problem(path, f"needs a decoder without experts, not {config.model.architecture}")
    elif config.parallel.recompute_granularity == "full":
        yield case.problem(path, "needs parallel.recompute_granularity none or selective: graphs hold whole layers")
    elif config.data.reset_attention_mask:
        yield case.problem(path, "needs data.reset_attention_mask False: every batch would have other documents")
    elif config.adapter.is_used or config.distillation.teacher is not None:
        yield case.problem(path, "needs adapter.method none and no distillation.teacher")


@rule("precision.fp8", "precision.params_dtype", "model.transformer_impl", "runtime.device")
def _fp8_needs_bf16_and_transformer_engine(case: Case) -> Iterator[Problem]:
    precision = case.config.precision
    if precision.fp8 == "none":
        return
    if precision.params_dtype == "fp32":
        yield case.problem("precision.params_dtype", f"precision.fp8 {precision.fp8} works on bf16: set bf16 or auto")
    if obstacle := obstacle_to_transformer_engine(case):
        yield case.problem("precision.fp8", f"needs Transformer Engine; {obstacle}")


@rule("precision.fp8", "precision.fp8_recipe", "precision.fp8_param_gather", "parallel.use_distributed_optimizer")
def _fp8_parameters_need_fp8_and_sharding(case: Case) -> Iterator[Problem]:
    config = case.config
    if not config.precision.fp8_param_gather:
        return
    if config.precision.fp8 == "none":
        yield case.problem("precision.fp8_param_gather", "needs precision.fp8 hybrid or e4m3")
    if not config.parallel.use_distributed_optimizer:
        yield case.problem("precision.fp8_param_gather", "needs parallel.use_distributed_optimizer True")
    if config.precision.fp8_recipe == "mxfp8":
        yield case.problem("precision.fp8_param_gather", "needs precision.fp8_recipe tensorwise or blockwise")


@rule(
    "precision.fp8",
    "precision.fp8_recipe",
    "model.hidden_size",
    "model.ffn_hidden_size",
    "parallel.tensor_model_parallel_size",
)
def _fp8_widths_fit_the_tensor_cores(case: Case) -> Iterator[Problem]:
    precision, model = case.config.precision, case.config.model
    tp = case.config.parallel.tensor_model_parallel_size
    block = 32 if precision.fp8_recipe == "mxfp8" else 16
    if precision.fp8 == "none":
        return
    for name in ("hidden_size", "ffn_hidden_size"):
        width = getattr(model, name)
        if width % (block * tp):
            yield case.problem(
                f"model.{name}",
                f"FP8 ({precision.fp8_recipe}) needs a multiple of {block} * tp = {block * tp}; nearest: "
                f"{nearest_multiples(block * tp, width)}",
            )


@rule(
    "precision.fp8",
    "data.seq_length",
    "training.micro_batch_size",
    "parallel.sequence_parallel",
    "parallel.tensor_model_parallel_size",
    "parallel.context_parallel_size",
)
def _fp8_rows_fit_the_tensor_cores(case: Case) -> Iterator[Problem]:
    config = case.config
    shards = config.parallel.context_parallel_size
    shards *= config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1
    rows = config.data.seq_length * config.training.micro_batch_size
    if config.precision.fp8 != "none" and rows % (16 * shards):
        yield case.problem(
            "data.seq_length",
            f"times micro_batch_size = {rows} tokens; FP8 needs a multiple of {16 * shards} (16 per rank that shares "
            "the sequence)",
        )


@rule(
    "precision.optimizer_state_dtype", "parallel.use_distributed_optimizer", "model.transformer_impl", "runtime.device"
)
def _bf16_moments_need_the_precision_aware_optimizer(case: Case) -> Iterator[Problem]:
    path = "precision.optimizer_state_dtype"
    if case.config.precision.optimizer_state_dtype == "fp32":
        return
    if not case.config.parallel.use_distributed_optimizer:
        yield case.problem(path, "needs parallel.use_distributed_optimizer True")
    if obstacle := obstacle_to_transformer_engine(case):
        yield case.problem(path, f"needs Transformer Engine's optimizer; {obstacle}")
