"""What a rank of a training run holds at its peak, by kind.

Parameters, gradients and optimizer state are counted; activations follow from what each layer keeps for its backward
pass; the rest (process, libraries, communication) is measured: docs/planning.md has the errors.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

from megatron_7b.config.schema import RunConfig
from megatron_7b.model.memory import bytes_per_parameter
from megatron_7b.parallel import ParallelLayout
from megatron_7b.planning.counts import Group, ModelCounts
from megatron_7b.planning.devices import Device

_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""Of logits at a time, in FP32, where output layer and loss are one: `model.fused_loss` has the same."""

# Measured on a CPU, as memory of ranks without pages of files: docs/planning.md.
_PROCESS_BYTES = 425_000_000
"""The interpreter with torch, megatron-core and the kernels of a first step."""
_HEAP_GROWTH, _HEAP_LAYERS = 1.1, 0.6
"""What the C library's heap grows by for activations that come and go: a multiple of them, and of those of a layer."""
_BESIDE_VOCABULARY = 1.0
"""Work space for the output layer, as a multiple of it in FP32."""
_LEAST_BESIDE_LOGITS = 0.8
"""However small the activations are, the heap grows by as much for them, as a multiple of the logits."""
_RECOMPUTED_LAYERS, _RECOMPUTED_SHARE = 2.7, 0.39
"""Full recompute leaves gaps in the heap: so many layers, and this share of what the layers of a stage would keep."""
_EXPERTS_GROWTH = {2: 1.45, 4: 0.7}
"""Of what experts keep, by the bytes of a number, the heap grows by as much more: their shares of the tokens differ."""
_GLOO_BYTES = 20_000_000
"""Of a group of ranks, in which small data is exchanged; of others see `_gloo`."""

# On a GPU.
_NCCL_BYTES = 400_000_000
"""Of a communicator."""
_CUDA_BYTES = 1_200_000_000
"""CUDA's context, workspaces of the products, and what the allocator cannot use."""
_GRAPHS_SHARE = 0.8
"""Of what the layers keep for a microbatch, CUDA graphs hold this much more: seen once (docs/planning.md)."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes that one rank holds at its peak.

    Attributes:
        parameters: Working parameters.
        gradients: The buffer that they are accumulated in.
        optimizer: Main parameters and moments.
        activations: What the layers keep for the backward pass, of all microbatches that are under way.
        logits: Of the output layer, with what the loss makes of them.
        nccl: Buffers of communication.
        graphs: What CUDA graphs hold beside the activations that they make.
        context: The process itself: libraries, CUDA's context, workspaces, fragmentation.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    nccl: int
    graphs: int
    context: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))

    def as_dict(self) -> dict[str, int]:
        """Return the bytes by kind, and their sum as `total`."""
        return {**{field.name: getattr(self, field.name) for field in fields(self)}, "total": self.total}


def working_width(config: RunConfig, device: Device) -> int:
    """Return the bytes of a working parameter, and of an activation: 2 or 4."""
    has_native_bf16 = device.type == "cuda" or device.flops["bf16"] > device.flops["fp32"]
    return bytes_per_parameter(config.precision, has_native_bf16=has_native_bf16)


def rank_memory(
    config: RunConfig, counts: ModelCounts, layout: ParallelLayout, device: Device, *, predicted_share: float = 1.0
) -> RankMemory:
    """Return what one rank holds at its peak.

    Args:
        config: The run; the vocabulary's size is known.
        counts: Its parameters.
        layout: Position of the rank.
        device: What it computes on.
        predicted_share: How many tokens pass the output layer, for each that is read.
    """
    parameters, gradients, optimizer = _held_state(config, counts, layout, device)
    logits = _logits(config, layout, device, predicted_share) if layout.is_last_stage else 0
    kept, working = _activations(config, layout, device, predicted_share)
    graphs = 0
    if device.type == "cuda" and config.runtime.cuda_graph_impl != "none":
        graphs = round(_GRAPHS_SHARE * kept / microbatches_under_way(config, layout))
    sizes = (layout.tp_size, layout.pp_size, layout.cp_size, layout.ep_size, layout.dp_size * layout.cp_size)
    groups = sum(size > 1 for size in sizes)
    if device.type == "cuda":
        # Logits are gone before the layers are gone through backwards.
        activations, nccl, context = kept + max(0, working - logits), groups * _NCCL_BYTES, _CUDA_BYTES
    else:
        activations, nccl = kept + working, groups * _GLOO_BYTES + _gloo(config, layout, parameters, gradients)
        outside = 4 * counts.elements(layout, "outside", lambda group: group.part != "layers" and group.is_multiplied)
        context = _PROCESS_BYTES + round(_BESIDE_VOCABULARY * outside)
        activations = max(activations, round(_LEAST_BESIDE_LOGITS * logits))
    return RankMemory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        nccl=nccl,
        graphs=graphs,
        context=context,
    )


def _gloo(config: RunConfig, layout: ParallelLayout, parameters: int, gradients: int) -> int:
    """Return what gloo's threads hold beside a rank's tensors, as measured: copies of what is exchanged at once."""
    size, width = 0, 2 if config.precision.params_dtype != "fp32" else 4
    if layout.dp_size * layout.cp_size > 1 and config.parallel.use_distributed_optimizer:
        size += gradients + parameters
    if layout.cp_size > 1:
        size += 50_000_000
    if layout.ep_size > 1:  # tokens that go to their experts and back, and their gradients
        tokens = config.training.micro_batch_size * config.data.seq_length // (layout.cp_size * layout.tp_size)
        layers = layout.layers_of(config.model.num_layers, layout.pp_rank)
        size += 4 * layers * tokens * config.model.moe_router_topk * config.model.hidden_size * width
    if config.parallel.sequence_parallel:  # the states that are gathered for each linear layer, and their gradients
        tokens = config.training.micro_batch_size * config.data.seq_length // layout.cp_size
        layers = config.model.num_layers // layout.pp_size
        size += min(13 * layers, 150) * tokens * config.model.hidden_size * width
    elif layout.tp_size > 1:
        size += 40_000_000
    return size


def _held_state(config: RunConfig, counts: ModelCounts, layout: ParallelLayout, device: Device) -> tuple[int, int, int]:
    """Return the bytes of parameters, gradients and optimizer state."""
    precision, optimizer, width = config.precision, config.optimizer, working_width(config, device)

    def held(name: str, counted: Callable[[Group], bool]) -> int:
        return counts.elements(layout, name, counted)

    parameters = width * held("all", lambda _group: True)
    if precision.fp8 != "none":  # beside the weights, or in their place: they and their transposes, a byte each
        matrices = held("matrices", lambda group: group.is_layer_matrix)
        parameters += (2 - (width if precision.fp8_param_gather else 0)) * matrices
    if config.adapter.method == "qlora":  # of 64 elements, 36 bytes are held
        frozen = held("frozen matrices", lambda group: group.is_layer_matrix and not group.is_trained)
        parameters -= frozen * width - frozen * 36 // 64
    trained = held("trained", lambda group: group.is_trained)
    experts = held("trained experts", lambda group: group.is_trained and group.is_expert)
    gradients = trained * (4 if precision.grad_reduce_in_fp32 else width)
    per_element = _state_width(config, width, device)
    state, of_experts = (trained - experts) * per_element, experts * per_element
    if optimizer.name == "muon" and not config.parallel.use_distributed_optimizer:
        matrices = held("trained matrices", lambda group: group.is_trained and group.is_layer_matrix)
        state -= 4 * matrices  # which have one tensor where others have two
    if config.parallel.use_distributed_optimizer:
        replicas = layout.dp_size * layout.cp_size
        state, of_experts = state // replicas, of_experts // (replicas // layout.ep_size)
    return parameters, gradients, state + of_experts


def _state_width(config: RunConfig, width: int, device: Device) -> int:
    """Return the bytes that the optimizer keeps for each trained element, if replicas do not share them."""
    optimizer, precision, parallel = config.optimizer, config.precision, config.parallel
    moment = 2 if precision.optimizer_state_dtype == "bf16" else 4
    match optimizer.name:
        case "sgd":
            moments = 1 if optimizer.sgd_momentum else 0
        case "muon" if parallel.use_distributed_optimizer:
            moments = 1
        case _:
            moments = 2
    if keeps_moments_on_host(config, device):
        moments = 0
    if config.adapter.method == "adalora":
        moments += 2
    main = 0 if width == 4 else 4
    if moment == 2 and precision.fp8 == "none":
        # Transformer Engine's optimizer keeps the half of a main parameter that a BF16 one lacks; of FP32 ones a copy.
        main = 2 if width == 2 else 4
    return main + moments * moment


def keeps_moments_on_host(config: RunConfig, device: Device) -> bool:
    """Return whether the moments are not in the memory that is planned."""
    return config.optimizer.cpu_offload and device.type == "cuda"


def layer_bytes_per_token(config: RunConfig, layout: ParallelLayout, device: Device) -> float:
    """Return what one layer keeps per token of a rank's part of the sequence, if it is not recomputed as a whole."""
    model, width, tp = config.model, working_width(config, device), layout.tp_size
    divided = tp if config.parallel.sequence_parallel else 1
    h, d = model.hidden_size, model.head_width
    n, g = model.num_attention_heads * d / tp, model.query_groups * d / tp
    has_rotary = model.traits.position_embedding_type == "rope"
    again = recomputed_modules(config)
    # Inputs of both norms; projections; turned queries and keys; what the inner linear layer gives.
    elements = 2 * h / divided + n + 2 * g + (n + g if has_rotary else 0)
    # What linear layers take: FP8 keeps it in one byte.
    of_linear, kept, taken = h / divided + n, 0.0, 0.0
    if not again & {"mlp", "moe"}:
        of_linear += h / divided
        kept, taken = _mlp_elements(config, layout, divided)
    elements += kept + (of_linear + taken) / (width if config.precision.fp8 != "none" else 1)
    extra = 4 * model.num_attention_heads / tp  # logarithms of the sums of exponentials, in FP32
    if model.hidden_dropout:
        extra += 2 * h / divided * (width if device.type == "cpu" else 1)  # masks: on a CPU, numbers like the others
        elements += 2 * h / divided
    has_scores = model.traits.kind == "encoder_decoder" or (device.type == "cpu" and model.attention_dropout > 0)
    if has_scores and "core_attn" not in again:  # they are there as a whole: probabilities, and with dropout its mask
        heads = model.num_attention_heads / tp
        elements += heads * config.data.seq_length * (2 if model.attention_dropout else 1)
    return elements * width + extra


def recomputed_modules(config: RunConfig) -> frozenset[str]:
    """Return what of each layer the backward pass computes again."""
    parallel = config.parallel
    return frozenset(parallel.recompute_modules if parallel.recompute_granularity == "selective" else ())


def _mlp_elements(config: RunConfig, layout: ParallelLayout, divided: int) -> tuple[float, float]:
    """Return what an MLP, or the experts that a token uses, keep per token: as it is, and as input of linear layers."""
    model = config.model
    outer = 2 if model.traits.gated_linear_unit else 1
    if model.num_moe_experts is None:
        inner = model.ffn_hidden_size / layout.tp_size
        return outer * inner, inner
    # A copy of the token for each of its experts, their inner states, and their outputs.
    topk, inner = model.moe_router_topk, model.expert_width / layout.tp_size
    states = model.hidden_size / divided
    return topk * (outer * inner + states) + 3 * model.num_moe_experts, topk * (inner + states)


def _activations(config: RunConfig, layout: ParallelLayout, device: Device, predicted_share: float) -> tuple[int, int]:
    """Return the bytes that are kept of all microbatches under way on a stage, and those that come and go beside."""
    model, parallel, training = config.model, config.parallel, config.training
    width = working_width(config, device)
    tokens = training.micro_batch_size * config.data.seq_length / layout.cp_size
    divided = layout.tp_size if parallel.sequence_parallel else 1
    layers = float(layout.layers_of(model.num_layers, layout.pp_rank))
    if model.traits.kind == "encoder_decoder":  # the decoder reads another number of tokens, and attends twice
        layers += 1.5 * model.decoder_layers * predicted_share
    of_layer = tokens * layer_bytes_per_token(config, layout, device)
    of_input = tokens * model.hidden_size * width / divided
    kept, working = layers * of_layer, 0.0
    if parallel.recompute_granularity == "full":
        if parallel.recompute_method == "uniform":
            groups = layers / parallel.recompute_num_layers
            kept, working = groups * of_input, parallel.recompute_num_layers * of_layer
        else:
            recomputed = min(parallel.recompute_num_layers * layout.num_chunks, layers)
            kept, working = recomputed * of_input + (layers - recomputed) * of_layer, of_layer
    elif recomputed_modules(config) & {"mlp", "moe"}:
        working = tokens * width * sum(_mlp_elements(config, layout, divided))
    if device.type == "cpu":  # what comes and goes is in the growth of the heap
        if parallel.recompute_granularity == "full":
            gaps = _RECOMPUTED_LAYERS + _RECOMPUTED_SHARE * layers
            return round(gaps * of_layer), 0
        held = (kept + 2 * of_input) * microbatches_under_way(config, layout)
        growth = 0.0
        if model.num_moe_experts is not None:
            growth = _EXPERTS_GROWTH[width] * layers * tokens * width * sum(_mlp_elements(config, layout, divided))
        return round(_HEAP_GROWTH * held + _HEAP_LAYERS * of_layer + growth), 0
    # Gradients of the widest activations of one layer, while it is gone through backwards.
    widest = 3 * model.ffn_hidden_size / layout.tp_size + 2 * model.hidden_size
    working += tokens * widest * width
    kept += 2 * of_input  # before the first layer and after the last
    return round(kept * microbatches_under_way(config, layout)), round(working)


def microbatches_under_way(config: RunConfig, layout: ParallelLayout) -> float:
    """Return how many microbatches' activations a stage holds at once, in whole stages."""
    training, pp = config.training, layout.pp_size
    number = training.global_batch_size // (training.micro_batch_size * layout.dp_size)
    if layout.num_chunks == 1:
        return float(max(1, min(number, pp - layout.pp_rank)))
    chunks = 2 * (pp - layout.pp_rank - 1) + (layout.num_chunks - 1) * pp + 1
    return min(number * layout.num_chunks, chunks) / layout.num_chunks


def _logits(config: RunConfig, layout: ParallelLayout, device: Device, predicted_share: float) -> int:
    """Return the logits of a microbatch with what the loss needs beside them."""
    model, width = config.model, working_width(config, device)
    if model.has_head or not predicted_share:
        return 0
    rows = (model.vocab_size or 1) / layout.tp_size
    tokens = config.training.micro_batch_size * config.data.seq_length / layout.cp_size * predicted_share
    cross_entropy = cross_entropy_impl(config, device)
    if cross_entropy == "chunked":  # with the product that their gradient takes part in
        beside, chunk = tokens * model.hidden_size * width, min(4 * tokens * rows, _CHUNK_BYTES[device.type])
        if device.type == "cpu":
            return round(2 * chunk + beside)
        # In the working format, and what autograd gets in the place of the output layer's gradient.
        return round(chunk * width / 4 + beside + rows * model.hidden_size * width)
    return round(tokens * rows * (width + (4 if cross_entropy == "full" else width)))


def cross_entropy_impl(config: RunConfig, device: Device) -> Literal["full", "te", "chunked"]:
    """Return how the loss is computed: where Transformer Engine can be, it is taken to be there."""
    has_engine = device.type == "cuda" and config.model.transformer_impl != "local"
    return config.cross_entropy_impl(has_transformer_engine=has_engine)
