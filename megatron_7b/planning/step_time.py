"""How long a step takes, by part, as arithmetic: rates of the device, work of the model, bytes on the links.

A matrix product takes the longer of its arithmetic and its memory traffic; element-wise work is traffic alone;
communication counts as far as nothing is computed meanwhile. The slowest pipeline stage sets the pace: the last one,
which has the output layer, if it has as many layers as the others. docs/planning.md says which runs the rates were
fitted to, and how far the others are off.
"""

from dataclasses import dataclass, fields

from megatron_7b.config.schema import RunConfig
from megatron_7b.config.stages import divide_layers
from megatron_7b.model.kinds import kind_of
from megatron_7b.parallel import ParallelLayout
from megatron_7b.planning.communication import Links
from megatron_7b.planning.counts import Group, ModelCounts
from megatron_7b.planning.devices import Device
from megatron_7b.planning.layouts import layout_of
from megatron_7b.planning.memory import cross_entropy_impl, keeps_moments_on_host, recomputed_modules, working_width

_SMALL_DIMENSION = {"cuda": 128, "cpu": 32}
"""Matrix products reach half of their rate, by each of their dimensions, where it is this small."""
_SHORT_SEQUENCE = {"cuda": 1024, "cpu": 0}
"""Attention reaches half of its rate at this length."""
_LOSS_BYTES_PER_LOGIT = {"full": 80, "te": 40, "chunked": 40}
"""On a GPU. Measured by one profile: Transformer Engine's kernel takes half of the time; the last is a guess."""
_LOSS_BYTES_PER_LOGIT_ON_CPU = 12
_OPTIMIZER_BYTES = 34
"""Read and written per element of a rank's share: gradient, main parameter, two moments, working parameter, norm."""
_OPTIMIZER_BYTES_BF16 = 24
"""The same with BF16 moments, of a main parameter the half that the working one lacks."""
_HOST_BANDWIDTH = 40e9
"""Bytes/s in each direction between a GPU and its machine's memory: a guess, of PCIe 5's 64."""
_HOST_SECONDS = {"cuda": 0.8e-3, "cpu": 0.4e-3}
"""That a processor takes to start the kernels of one layer, forward and backward; more with FP8."""
_SHARE_BETWEEN_KERNELS = {"bf16": 0.02, "fp8": 0.06, "fp32": 0.02}
"""Of the time that kernels take, nothing runs for as long as this."""
_OVERLAP = 0.85
"""Of what could be overlapped, this much is: the rest slows down what it runs beside."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step by part, on the rank that all others wait for.

    Attributes:
        matrix_products: Of layers and output layer, forward and backward.
        attention: Scores and weighted values.
        memory_bound: Norms, activations, residuals, rotary embedding, loss.
        recompute: The forward passes that are done a second time.
        tensor_parallel: Communication of tensor and sequence parallelism that nothing hides.
        context_parallel: Of keys and values between context-parallel ranks.
        expert_parallel: Of tokens to their experts and back.
        pipeline: Activations between stages, and waiting at both ends of a step (the bubble).
        data_parallel: Gradients and updated parameters, as far as nothing hides them.
        optimizer: The update of this rank's share.
        host: Time in which the device waits for the processor that starts its kernels.
    """

    matrix_products: float
    attention: float
    memory_bound: float
    recompute: float
    tensor_parallel: float
    context_parallel: float
    expert_parallel: float
    pipeline: float
    data_parallel: float
    optimizer: float
    host: float

    @property
    def total(self) -> float:
        """All of them."""
        return float(sum(getattr(self, field.name) for field in fields(self)))

    def as_dict(self) -> dict[str, float]:
        """Return the seconds by part, and their sum as `total`."""
        return {**{field.name: getattr(self, field.name) for field in fields(self)}, "total": self.total}


@dataclass(frozen=True, kw_only=True)
class _Compute:
    """Seconds of one microbatch, forward and backward."""

    products: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    mlp: float = 0.0
    """Of these, what is of the MLP, which can be computed again by itself."""

    @property
    def total(self) -> float:
        return self.products + self.attention + self.memory


class StepTimer:
    """Predicts the steps of one model on one kind of device; what layouts share is computed once.

    Args:
        counts: The model's parameters.
        device: One rank's.
        predicted_share: How many tokens pass the output layer, for each that is read.
    """

    def __init__(self, counts: ModelCounts, device: Device, *, predicted_share: float = 1.0) -> None:
        self._counts, self._device, self._share = counts, device, predicted_share
        self._computed: dict[object, tuple[_Compute, _Compute]] = {}

    def step_time(self, config: RunConfig, layout: ParallelLayout) -> StepTime:
        """Return how long a step takes.

        Args:
            config: The run at this layout; the global batch is a multiple of what all replicas take at once.
            layout: Position of a rank of the last stage.
        """
        parallel, training, model = config.parallel, config.training, config.model
        links = Links(self._device, layout)
        layer, head = self._compute(config, layout)
        number = max(1, training.global_batch_size // (training.micro_batch_size * layout.dp_size))
        width = working_width(config, self._device)
        tokens = training.micro_batch_size * config.data.seq_length / layout.cp_size
        states = tokens * model.hidden_size * width
        # The MLP of a mixture gathers a copy of each token for every one of its experts.
        exchanged = states if model.num_moe_experts is None else states * (1 + model.moe_router_topk) / 2
        tensor = links.tensor_parallel_seconds(exchanged, layer.products)
        context = links.context_parallel_seconds(
            tokens * 2 * model.query_groups * model.head_width * width / layout.tp_size, layer.attention
        )
        expert = 0.0
        if model.num_moe_experts is not None:
            expert = links.expert_parallel_seconds(states * model.moe_router_topk / layout.tp_size)
        exposed, forward = tensor + context + expert, 2 / 3 * tensor + context / 3 + expert / 2
        chunks = self._chunks(layout)
        seconds = [size * (layer.total + exposed) + self._again(config, size, layer, forward) for size in chunks]
        seconds[-1] += head.total
        # Of the chunks that ranks compute at the same time, the slowest sets the pace; the last has the output layer.
        rounds = [range(first, first + layout.pp_size) for first in range(0, len(chunks), layout.pp_size)]
        slowest = [max(numbers, key=lambda number: seconds[number]) for numbers in rounds]
        layers, of_stage = sum(chunks[number] for number in slowest), sum(seconds[number] for number in slowest)
        again = sum(self._again(config, chunks[number], layer, forward) for number in slowest)
        if slowest[-1] < len(chunks) - 1:
            head = _Compute()
        pipeline = 0.0
        if layout.pp_size > 1:
            divided = layout.tp_size if parallel.sequence_parallel else 1
            pipeline = max(0.0, sum(seconds) - of_stage) / layout.num_chunks
            pipeline += links.pipeline_seconds(states / divided, number)
        busy = number * of_stage
        with_graphs = self._device.type == "cuda" and config.runtime.cuda_graph_impl != "none"
        gaps = busy * _SHARE_BETWEEN_KERNELS["bf16" if with_graphs else self._format(config)]
        starting = 0.0
        if not with_graphs:  # which start the kernels of a layer at once
            starting = number * layers * _HOST_SECONDS[self._device.type]
            starting *= 1.5 if config.precision.fp8 != "none" else 1.0
        data, update = self._update(config, layout, links, window=of_stage)
        return StepTime(
            matrix_products=number * (layers * layer.products + head.products),
            attention=number * layers * layer.attention,
            memory_bound=number * (layers * layer.memory + head.memory),
            recompute=number * again,
            tensor_parallel=number * layers * tensor,
            context_parallel=number * layers * context,
            expert_parallel=number * layers * expert,
            pipeline=pipeline,
            data_parallel=data,
            optimizer=update,
            host=max(gaps, starting - busy),
        )

    def head_layers(self, config: RunConfig) -> float:
        """Return how many layers take as long as the output layer with the loss."""
        layer, head = self._compute(config, layout_of(config, config.parallel.model_parallel_size))
        return head.total / layer.total

    def _compute(self, config: RunConfig, layout: ParallelLayout) -> tuple[_Compute, _Compute]:
        """Return what one layer and what the output layer take for a microbatch, forward and backward."""
        size = config.training.micro_batch_size
        sp = config.parallel.sequence_parallel
        key = (layout.tp_size, layout.cp_size, layout.ep_size, size, sp)
        if key not in self._computed:
            self._computed[key] = self._layer(config, layout), self._head(config, layout)
        return self._computed[key]

    def _tokens(self, config: RunConfig, layout: ParallelLayout) -> float:
        return config.training.micro_batch_size * config.data.seq_length / layout.cp_size

    def _layer(self, config: RunConfig, layout: ParallelLayout) -> _Compute:
        model, device, tokens = config.model, self._device, self._tokens(config, layout)
        num_layers = self._counts.num_layers
        products = of_mlp = 0.0
        for group, number in self._counts.multiplied():
            if group.part == "layers":  # a decoder beside an encoder reads only what is predicted
                read = tokens * self._share if group.is_head else tokens
                seconds = number / num_layers * self._product(config, layout, group, read)
                products += seconds
                of_mlp += seconds if group.is_mlp else 0.0
        attended = kind_of(model).attended_positions(model, config.data.seq_length, self._share) / num_layers
        flops = 3 * 4 * attended * model.num_attention_heads * model.head_width / layout.tp_size * tokens
        length = config.data.seq_length
        rate = device.flops["bf16" if working_width(config, device) == 2 else "fp32"]
        reached = device.efficiency.attention * length / (length + _SHORT_SEQUENCE[device.type])
        decoder_layers = num_layers - model.num_layers
        read = tokens * (model.num_layers + decoder_layers * self._share) / num_layers
        traffic, of_traffic = self._layer_traffic(config, layout)
        return _Compute(
            products=products,
            attention=flops / (rate * reached),
            memory=read * traffic / self._bandwidth,
            mlp=of_mlp + read * of_traffic / self._bandwidth,
        )

    def _head(self, config: RunConfig, layout: ParallelLayout) -> _Compute:
        tokens = self._tokens(config, layout) * self._share
        products = sum(
            number * self._product(config, layout, group, tokens, in_fp8=False)
            for group, number in self._counts.multiplied()
            if group.part != "layers"
        )
        logits = tokens * (config.model.vocab_size or 1) / layout.tp_size if not config.model.has_head else 0.0
        of_each = _LOSS_BYTES_PER_LOGIT[cross_entropy_impl(config, self._device)]
        if self._device.type == "cpu":
            of_each = _LOSS_BYTES_PER_LOGIT_ON_CPU
        return _Compute(products=products, memory=logits * of_each / self._bandwidth)

    def _product(
        self, config: RunConfig, layout: ParallelLayout, group: Group, tokens: float, *, in_fp8: bool = True
    ) -> float:
        """Return the seconds that one matrix takes, forward and backward."""
        device, width = self._device, working_width(config, self._device)
        outputs, inputs = (float(size) for size in (group.shape[0], group.shape[-1]))
        if group.tp_dim == 0:
            outputs /= layout.tp_size
        elif group.tp_dim == 1:
            inputs /= layout.tp_size
        rows, matrices = tokens * group.share_of_tokens, 1.0
        if group.is_expert:  # a rank has fewer experts, each of which takes tokens of all ranks that share them
            rows, matrices = rows * layout.ep_size, 1.0 / layout.ep_size
        in_fp8 = in_fp8 and config.precision.fp8 != "none" and "fp8" in device.flops
        kind = "fp8" if in_fp8 else "bf16" if width == 2 else "fp32"
        efficiency = device.efficiency.fp8_products if in_fp8 else device.efficiency.matrix_products
        for size in (rows, outputs, inputs):
            efficiency *= size / (size + _SMALL_DIMENSION[device.type])
        flops = 2 * rows * outputs * inputs
        traffic = (rows * (outputs + inputs) + outputs * inputs) * width
        seconds = max(flops / (device.flops[kind] * efficiency), traffic / self._bandwidth)
        if in_fp8:  # activations and their gradients are cast, and transposed for the weights' gradient
            seconds += rows * (outputs + inputs) * 2 / self._bandwidth / 3
        passes = 3 if group.is_trained else 2
        return matrices * passes * seconds

    @property
    def _bandwidth(self) -> float:
        return self._device.memory_bandwidth * self._device.efficiency.memory

    def _layer_traffic(self, config: RunConfig, layout: ParallelLayout) -> tuple[float, float]:
        """Return the bytes per token that a layer's element-wise work, forward and backward, moves; and of its MLP."""
        model, tp = config.model, layout.tp_size
        divided = tp if config.parallel.sequence_parallel else 1
        elements = 22 * model.hidden_size / divided
        if model.traits.position_embedding_type == "rope":
            elements += 4 * (model.num_attention_heads + model.query_groups) * model.head_width / tp
        per_inner = 8 if model.traits.gated_linear_unit else 6
        if model.num_moe_experts is None:
            of_mlp = per_inner * model.ffn_hidden_size / tp
        else:
            of_mlp = model.moe_router_topk * (per_inner * model.expert_width / tp + 12 * model.hidden_size / divided)
        width = working_width(config, self._device)
        return (elements + of_mlp) * width, of_mlp * width

    def _chunks(self, layout: ParallelLayout) -> tuple[int, ...]:
        """Return the layers of each pipeline stage, virtual ones apart; of an encoder-decoder those of both stacks."""
        num_stages = layout.pp_size * layout.num_chunks
        return layout.stages or divide_layers(self._counts.num_layers, num_stages)

    def _again(self, config: RunConfig, layers: int, layer: _Compute, exchanged: float) -> float:
        """Return the seconds in which a chunk of some layers does forward passes a second time.

        Args:
            config: The run.
            layers: Of the chunk.
            layer: What each takes, forward and backward.
            exchanged: Seconds of communication in its forward pass.
        """
        parallel, whole = config.parallel, layer.total / 3 + exchanged
        match parallel.recompute_granularity:
            case "none":
                return 0.0
            case "selective":
                modules = recomputed_modules(config)
                of_attention = layer.attention / 3 if "core_attn" in modules else 0.0
                of_mlp = layer.mlp / 3 + exchanged / 2 if modules & {"mlp", "moe"} else 0.0
                return layers * (of_attention + of_mlp)
            case _ if parallel.recompute_method == "uniform":
                return layers * whole
            case _:
                return min(layers, parallel.recompute_num_layers) * whole

    def _update(self, config: RunConfig, layout: ParallelLayout, links: Links, *, window: float) -> tuple[float, float]:
        """Return the exposed seconds of reducing gradients and gathering parameters, and those of the update."""
        parallel, precision, width = config.parallel, config.precision, working_width(config, self._device)
        trained = self._counts.elements(layout, "trained", lambda group: group.is_trained)
        experts = self._counts.elements(layout, "trained experts", lambda group: group.is_trained and group.is_expert)
        per_gradient = 4 if precision.grad_reduce_in_fp32 else width
        per_parameter = 1 if precision.fp8_param_gather else width

        def exchanged(per_element: int) -> float:
            of_experts = links.scatter_seconds(experts * per_element, experts=True)
            return links.scatter_seconds((trained - experts) * per_element) + of_experts

        owned, exposed = float(trained), 0.0
        replicas = layout.dp_size * layout.cp_size
        reduce = exchanged(per_gradient) if replicas > 1 else 0.0
        during_backward = window * 2 / 3 if parallel.overlap_grad_reduce else 0.0
        if parallel.use_distributed_optimizer:
            owned = (trained - experts) / replicas + experts / (replicas // layout.ep_size)
        if replicas > 1 and parallel.use_distributed_optimizer:
            exposed = _exposed(reduce, during_backward)
            exposed += _exposed(exchanged(per_parameter), window / 3 if parallel.overlap_param_gather else 0.0)
        elif replicas > 1:
            exposed = _exposed(2 * reduce, during_backward)
        is_narrow = precision.optimizer_state_dtype == "bf16"
        moved = owned * (_OPTIMIZER_BYTES_BF16 if is_narrow else _OPTIMIZER_BYTES) + trained * per_gradient
        update = moved / self._bandwidth
        if keeps_moments_on_host(config, self._device):  # both come while others leave
            update = max(update, 8 * owned / _HOST_BANDWIDTH)
        return exposed, update

    def _format(self, config: RunConfig) -> str:
        if config.precision.fp8 != "none":
            return "fp8"
        return "bf16" if working_width(config, self._device) == 2 else "fp32"


def _exposed(seconds: float, window: float) -> float:
    """Return how much of a transfer shows, if it may run beside `window` seconds of work."""
    return max(seconds - window * _OVERLAP, seconds * (1 - _OVERLAP)) if window else seconds
