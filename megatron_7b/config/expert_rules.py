"""Rules for mixtures of experts."""

from collections.abc import Iterator

from megatron_7b.config.architectures import ARCHITECTURES
from megatron_7b.config.options import get_value
from megatron_7b.config.problems import Problem
from megatron_7b.config.rule import Case, Rule, adder_to, nearest_divisors
from megatron_7b.config.schema import RunConfig

RULES: list[Rule] = []
rule = adder_to(RULES)

_OF_EXPERTS = (
    "model.moe_router_topk",
    "model.moe_ffn_hidden_size",
    "model.moe_router_pre_softmax",
    "model.moe_aux_loss_coeff",
    "parallel.expert_model_parallel_size",
)
_DEFAULTS = RunConfig()


@rule("model.architecture", "model.num_moe_experts")
def _architecture_has_experts(case: Case) -> Iterator[Problem]:
    model = case.config.model
    having = [name for name, traits in ARCHITECTURES.items() if traits.has_experts]
    if model.traits.has_experts and model.num_moe_experts is None:
        yield case.problem("model.num_moe_experts", f"must be given for {model.architecture}; Mixtral 8x7B has 8")
    if not model.traits.has_experts and model.num_moe_experts is not None:
        yield case.problem(
            "model.num_moe_experts", f"must be none in {model.architecture}; only {', '.join(having)} have experts"
        )


@rule("model.architecture", *_OF_EXPERTS)
def _options_of_experts_need_them(case: Case) -> Iterator[Problem]:
    if case.config.model.traits.has_experts:
        return
    for path in _OF_EXPERTS:
        if get_value(case.config, path) != get_value(_DEFAULTS, path):
            yield case.problem(path, f"only applies to mixtures of experts, not to {case.config.model.architecture}")


@rule("model.moe_router_topk", "model.num_moe_experts")
def _tokens_use_some_experts(case: Case) -> Iterator[Problem]:
    model = case.config.model
    if model.num_moe_experts is not None and model.moe_router_topk > model.num_moe_experts:
        yield case.problem("model.moe_router_topk", f"must be at most model.num_moe_experts = {model.num_moe_experts}")


@rule("model.moe_router_topk", "model.moe_router_pre_softmax", "model.num_moe_experts")
def _routers_can_learn(case: Case) -> Iterator[Problem]:
    model = case.config.model
    if model.num_moe_experts is not None and model.moe_router_topk == 1 and not model.moe_router_pre_softmax:
        yield case.problem(
            "model.moe_router_topk",
            "must be at least 2: a single expert always weighs 1, from which its router learns nothing; or set "
            "model.moe_router_pre_softmax True",
        )


@rule("parallel.expert_model_parallel_size", "model.num_moe_experts")
def _ranks_share_experts_evenly(case: Case) -> Iterator[Problem]:
    size, experts = case.config.parallel.expert_model_parallel_size, case.config.model.num_moe_experts
    if experts is not None and experts % size:
        yield case.problem(
            "parallel.expert_model_parallel_size",
            f"must divide model.num_moe_experts = {experts}; nearest: {nearest_divisors(experts, size)}",
        )


@rule(
    "parallel.expert_model_parallel_size",
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.context_parallel_size",
)
def _experts_are_shared_by_replicas(case: Case) -> Iterator[Problem]:
    size, context = case.config.parallel.expert_model_parallel_size, case.config.parallel.context_parallel_size
    sharing = case.data_parallel_size * context
    if case.world_size is not None and case.world_size % case.model_parallel_size == 0 and sharing % size:
        yield case.problem(
            "parallel.expert_model_parallel_size",
            f"must divide the data- and context-parallel ranks, of which there are {sharing}; nearest: "
            f"{nearest_divisors(sharing, size)}",
        )


@rule("model.num_moe_experts", "model.moe_ffn_hidden_size", "parallel.tensor_model_parallel_size")
def _tensor_ranks_divide_experts(case: Case) -> Iterator[Problem]:
    model, tp = case.config.model, case.config.parallel.tensor_model_parallel_size
    if model.num_moe_experts is not None and model.moe_ffn_hidden_size is not None and model.expert_width % tp:
        yield case.problem(
            "parallel.tensor_model_parallel_size",
            f"must divide model.moe_ffn_hidden_size = {model.expert_width}; nearest: "
            f"{nearest_divisors(model.expert_width, tp)}",
        )


@rule("model.num_moe_experts", "adapter.method", "optimizer.name", "precision.fp8")
def _experts_are_trained_plainly(case: Case) -> Iterator[Problem]:
    config = case.config
    if config.model.num_moe_experts is None:
        return
    if config.adapter.method != "none":
        yield case.problem("adapter.method", "must be none for a mixture of experts: adapters know layers of one MLP")
    if config.optimizer.name == "muon":
        yield case.problem(
            "optimizer.name", "must be adamw, adam or sgd for a mixture of experts, whose matrices different ranks hold"
        )
    if config.precision.fp8 != "none":
        yield case.problem(
            "precision.fp8", "must be none for a mixture of experts, whose products have any number of rows"
        )
