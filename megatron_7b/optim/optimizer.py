"""Optimizers on megatron-core's: parameter groups, gradient buffers, and steps that can be skipped."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_7b.config.schema import RunConfig
from megatron_7b.model.builder import described_parameters
from megatron_7b.model.parameters import Parameter
from megatron_7b.optim.held import held_parameters, take_parameters, without_parameters
from megatron_7b.optim.host_adam import HostAdam
from megatron_7b.optim.matrices import MatrixExchange, MatrixPart
from megatron_7b.optim.muon import Muon
from megatron_7b.optim.rank_allocation import RankAllocator
from megatron_7b.parallel.groups import process_groups


@dataclass(frozen=True)
class StepOutcome:
    """Result of an update.

    Attributes:
        grad_norm: Global L2 norm of the gradients before clipping.
        skipped: The norm was not finite: parameters and optimizer state are as before.
    """

    grad_norm: float
    skipped: bool


def wrap_data_parallel(
    chunks: list[torch.nn.Module], config: RunConfig, groups: ProcessGroupCollection
) -> list[DistributedDataParallel]:
    """Give each model chunk gradient buffers that are reduced over the replicas.

    Collective: none.
    """
    parallel = config.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.precision.grad_reduce_in_fp32,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        fp8_param_gather=config.precision.fp8_param_gather,
        check_for_nan_in_grad=False,  # a gradient that is not finite skips the step instead of ending the run
    )
    wrapped = [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=ddp_config,
            module=chunk,
            disable_bucketing=index > 0,  # later chunks' gradients are ready first only in the first chunk's shadow
            pg_collection=groups,
        )
        for index, chunk in enumerate(chunks)
    ]
    core_config: Any = chunks[0].config
    core_config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        _single_or_list(core_config, "no_sync_func", [chunk.no_sync for chunk in wrapped])
        _single_or_list(core_config, "grad_sync_func", [chunk.start_grad_sync for chunk in wrapped])
    return wrapped


@torch.no_grad()
def gather_parameters(chunks: Sequence[torch.nn.Module]) -> None:
    """Bring the parameters of all replicas up to date before they are read other than by a forward pass.

    With `parallel.overlap_param_gather` an update leaves each rank with its own share of the new parameters; the rest
    arrives when the next forward pass asks for it.

    Collective: the data-parallel group.
    """
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _single_or_list(config: Any, name: str, functions: list[Any]) -> None:
    """Set a hook of the pipeline schedules, which take one function, or one per chunk."""
    setattr(config, name, functions[0] if len(functions) == 1 else functions)


class Optimizer:
    """The optimizer that a configuration names, over this rank's trainable parameters.

    Args:
        chunks: Model chunks with gradient buffers.
        config: The run.
        params_dtype: Working dtype of the parameters.

    Attributes:
        name: As the configuration has it.
        num_updates: How many it has done; Adam's bias correction depends on it.

    Collective: all ranks.
    """

    def __init__(self, chunks: list[DistributedDataParallel], config: RunConfig, params_dtype: torch.dtype) -> None:
        settings = config.optimizer
        self.name, self.num_updates = settings.name, 0
        self._lr, self._clip_grad, self._weight_decay = settings.lr, settings.clip_grad, settings.weight_decay
        core_config = _core_config(config, params_dtype)
        self._decoupled_grad = core_config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        matrices = _matrices(chunks) if self.name == "muon" else {}
        self.core: MegatronOptimizer = get_megatron_optimizer(
            core_config,
            chunks,
            config_overrides=_group_overrides(config, matrices),
            use_gloo_process_groups=False,
        )
        for part in self.parts:
            if part.optimizer is None:  # megatron-core has found nothing to train
                continue
            if self.name == "sgd":
                part.optimizer = _gradient_descent(part, config)
            elif self.name == "muon":
                part.optimizer = _muon(part, matrices, config, process_groups())
            elif keeps_moments_on_host(config, part):
                part.optimizer = HostAdam(part.param_groups, decoupled=self.name == "adamw")
        for inner in self.torch_optimizers():
            adam = inner.adamw if isinstance(inner, Muon) else inner
            if isinstance(adam, torch.optim.Adam) and not isinstance(adam, HostAdam):
                _use_fused_kernel(adam)
        self._ranks = RankAllocator(self.parts, chunks, config) if config.adapter.method == "adalora" else None

    @property
    def parts(self) -> list[MegatronOptimizer]:
        """megatron-core's optimizers, each over some of the parameters."""
        return list(getattr(self.core, "chained_optimizers", [self.core]))

    def torch_optimizers(self) -> Iterator[torch.optim.Optimizer]:
        """Yield the inner optimizers that keep their state as torch's do, unlike Adam of Transformer Engine or apex."""
        for part in self.parts:
            if isinstance(getattr(part, "optimizer", None), torch.optim.Adam | torch.optim.SGD | Muon):
                yield part.optimizer

    @torch.no_grad()
    def step(self, learning_rate: float) -> StepOutcome:
        """Update the parameters from the accumulated gradients, or change nothing if these are not finite.

        Args:
            learning_rate: For this update; groups with a peak of their own follow in proportion.

        Collective: the model-parallel group, and the data-parallel one with the distributed optimizer, Muon or AdaLoRA.
        """
        for group in self.core.param_groups:
            group["lr"] = learning_rate * (group["max_lr"] / self._lr if self._lr else 1.0)
            group["weight_decay"] = self._weight_decay * group["wd_mult"]
        if self._ranks is not None:
            self._ranks.add_gradients()
        found_inf = self.core.prepare_grads()
        grad_norm = float(self.core.get_grad_norm())
        if found_inf or not _is_finite(grad_norm):
            return StepOutcome(grad_norm, skipped=True)
        parameters = self.core.get_parameters()
        if self._clip_grad > 0.0 and parameters:
            clip_grad_by_total_norm_fp32(
                parameters, self._clip_grad, grad_norm, use_decoupled_grad=self._decoupled_grad
            )
        self.core.step_with_ready_grads()
        self.num_updates += 1
        if self._ranks is not None:
            self._ranks.after_update(self.num_updates)
        return StepOutcome(grad_norm, skipped=False)

    def zero_grad(self) -> None:
        """Clear all gradients."""
        self.core.zero_grad()

    def set_num_updates(self, num_updates: int) -> None:
        """Set how many updates were done: torch keeps it per parameter, Transformer Engine and apex per group."""
        self.num_updates = num_updates
        ours = list(self.torch_optimizers())
        for inner in ours:
            for tensor, state in inner.state.items():
                if "step" in state:
                    state["step"] = torch.tensor(float(num_updates), device=tensor.device)
        for part in self.parts:
            if part.optimizer is not None and part.optimizer not in ours:
                for group in part.optimizer.param_groups:
                    group["step"] = num_updates


def _core_config(config: RunConfig, params_dtype: torch.dtype) -> CoreOptimizerConfig:
    """Return megatron-core's configuration: of Adam, which other optimizers then take the place of."""
    settings = config.optimizer
    state_dtype = torch.bfloat16 if config.precision.optimizer_state_dtype == "bf16" else torch.float32
    return CoreOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        decoupled_weight_decay=settings.name != "adam",
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=0.0,  # `step` clips, with the norm that it has computed
        params_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        # Decides who holds the FP32 main parameters where Adam's moments are kept in BF16.
        fp8_recipe=None if config.precision.fp8 == "none" else config.precision.fp8_recipe,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
        use_precision_aware_optimizer=state_dtype != torch.float32,
        exp_avg_dtype=state_dtype,
        exp_avg_sq_dtype=state_dtype,
    )


def _group_overrides(config: RunConfig, matrices: dict[torch.nn.Parameter, Parameter]) -> dict[ParamKey, Any]:
    """Return what distinguishes parameter groups: no weight decay of norms and biases, and Muon's matrices."""
    overrides = {_key("norm_or_bias", _is_norm_or_bias): ParamGroupOverride(wd_mult=0.0)}
    if config.optimizer.name == "muon":
        adamw: Any = ParamGroupOverride(max_lr=config.optimizer.muon_adamw_lr or config.optimizer.lr)
        overrides[_key("matrix", lambda parameter: parameter in matrices)] = {"muon": True}
        overrides[_key("no_matrix", lambda parameter: parameter not in matrices)] = adamw
    return overrides


def _key(name: str, predicate: Callable[[torch.nn.Parameter], bool]) -> ParamKey:
    return ParamKey(predicate=ParamPredicate(name=name, fn=predicate))


def _matrices(chunks: Sequence[DistributedDataParallel]) -> dict[torch.nn.Parameter, Parameter]:
    """Return this rank's trainable matrices of layers, each with the whole one that it is a part of."""
    return {
        parameter: row
        for chunk in chunks
        for row, parameter in described_parameters(chunk.module)
        if row.is_layer_matrix and parameter.requires_grad
    }


def keeps_moments_on_host(config: RunConfig, part: MegatronOptimizer) -> bool:
    """Return whether the moments of an optimizer are kept away from its parameters, which are on a GPU."""
    tensors = (tensor for group in part.param_groups for tensor in group["params"])
    return config.optimizer.cpu_offload and any(tensor.is_cuda for tensor in tensors)


def _gradient_descent(part: MegatronOptimizer, config: RunConfig) -> torch.optim.SGD:
    """Return torch's SGD over the groups of one of megatron-core's optimizers, with its momentum allocated."""
    momentum, nesterov = config.optimizer.sgd_momentum, config.optimizer.sgd_nesterov
    sgd = torch.optim.SGD(without_parameters(part.param_groups), momentum=momentum, nesterov=nesterov, fused=True)
    take_parameters(sgd, part.param_groups)
    if momentum:
        for group in sgd.param_groups:
            for tensor in group["params"]:
                sgd.state[tensor] = {"momentum_buffer": torch.zeros_like(tensor)}
    return sgd


def _muon(
    part: MegatronOptimizer,
    matrices: dict[torch.nn.Parameter, Parameter],
    config: RunConfig,
    groups: ProcessGroupCollection,
) -> Muon:
    """Return Muon over the groups of one of megatron-core's optimizers. Collective: the ranks of this stage."""
    names, parts = {}, []
    for held in held_parameters(part):
        if row := matrices.get(held.parameter):
            names[held.main] = row.name
            shard = groups.tp.rank() if row.tp_dim is not None else 0
            parts.append(MatrixPart(row.name, shard, held.start, held.start + held.main.numel()))
    device = next(iter(matrices)).device if matrices else torch.device("cpu")
    exchange = MatrixExchange(
        list(matrices.values()), parts, tp_size=groups.tp.size(), group=groups.tp_dp_cp, device=device
    )
    return Muon(part.param_groups, names=names, exchange=exchange, model=config.model, settings=config.optimizer)


def _is_norm_or_bias(parameter: torch.nn.Parameter) -> bool:
    return parameter.dim() == 1


def _is_finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _use_fused_kernel(adam: torch.optim.Adam) -> None:
    """Switch torch's Adam to its fused kernel, and allocate its state now.

    megatron-core builds it without `fused`, and reads `step` from a state that exists only after the first update,
    so a checkpoint could not be loaded into a fresh run.
    """
    for group in adam.param_groups:
        group["fused"], group["foreach"] = True, False
        for parameter in group["params"]:
            adam.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
