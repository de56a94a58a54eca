"""Rules for the optimizer and the schedule of its learning rate."""

from collections.abc import Iterator

from megatron_7b.config.optimizers import NAME, OPTIMIZERS, OWN_FIELDS, fields_of_others, why_not_of
from megatron_7b.config.options import get_value, options
from megatron_7b.config.problems import Problem
from megatron_7b.config.rule import Case, Rule, adder_to

RULES: list[Rule] = []
rule = adder_to(RULES)


@rule(NAME, *OWN_FIELDS)
def _options_belong_to_the_optimizer(case: Case) -> Iterator[Problem]:
    """For a configuration that was made in Python; what is read has been compared with the names that were given."""
    name = case.config.optimizer.name
    for path in sorted(fields_of_others(name)):
        if get_value(case.config, path) != options()[path].default:
            yield case.problem(path, why_not_of(path, name))


@rule(NAME, "optimizer.sgd_momentum", "optimizer.sgd_nesterov")
def _nesterov_needs_momentum(case: Case) -> Iterator[Problem]:
    optimizer = case.config.optimizer
    if optimizer.name == "sgd" and optimizer.sgd_nesterov and optimizer.sgd_momentum == 0:
        yield case.problem("optimizer.sgd_nesterov", "needs optimizer.sgd_momentum above 0")


@rule(NAME, "precision.optimizer_state_dtype")
def _narrow_state_is_adams(case: Case) -> Iterator[Problem]:
    name, path = case.config.optimizer.name, "precision.optimizer_state_dtype"
    if case.config.precision.optimizer_state_dtype != "fp32" and not OPTIMIZERS[name].has_moments:
        yield case.problem(path, f"needs {NAME} {_with_moments()}, not {name}, which keeps its state in FP32")


@rule(NAME, "optimizer.cpu_offload", "precision.optimizer_state_dtype", "adapter.method")
def _moments_in_host_memory_are_adams(case: Case) -> Iterator[Problem]:
    config, path = case.config, "optimizer.cpu_offload"
    if not config.optimizer.cpu_offload:
        return
    if not OPTIMIZERS[config.optimizer.name].has_moments:
        yield case.problem(path, f"needs {NAME} {_with_moments()}, not {config.optimizer.name}")
    if config.precision.optimizer_state_dtype != "fp32":
        yield case.problem(path, "needs precision.optimizer_state_dtype fp32: Transformer Engine's optimizer stays put")
    if config.adapter.is_used:
        yield case.problem(path, f"needs adapter.method none, not {config.adapter.method}, whose state is small")


def _with_moments() -> str:
    return " | ".join(name for name, traits in OPTIMIZERS.items() if traits.has_moments)


@rule("optimizer.lr", "optimizer.min_lr")
def _learning_rate_falls(case: Case) -> Iterator[Problem]:
    if case.config.optimizer.min_lr > case.config.optimizer.lr:
        yield case.problem("optimizer.min_lr", f"must be at most optimizer.lr = {case.config.optimizer.lr}")


@rule(
    "optimizer.lr_decay_style",
    "optimizer.lr_warmup_steps",
    "optimizer.lr_warmup_fraction",
    "optimizer.lr_decay_steps",
    "optimizer.lr_wsd_decay_steps",
    "training.train_steps",
)
def _schedule_phases_fit(case: Case) -> Iterator[Problem]:
    optimizer, train_steps = case.config.optimizer, case.config.training.train_steps
    end = optimizer.lr_decay_steps or train_steps
    end_name = "optimizer.lr_decay_steps" if optimizer.lr_decay_steps else "training.train_steps"
    # A run that is shorter than its warm-up is a try-out, and possible; a decay that ends before it begins is not.
    warmup_steps = optimizer.warmup_steps(train_steps)
    if optimizer.lr_warmup_fraction is None and optimizer.lr_decay_steps is not None and warmup_steps >= end:
        yield case.problem("optimizer.lr_warmup_steps", f"must be below optimizer.lr_decay_steps = {end}")
    if optimizer.lr_wsd_decay_steps is None:
        return
    path, room = "optimizer.lr_wsd_decay_steps", end - warmup_steps
    if optimizer.lr_decay_style != "wsd":
        yield case.problem(path, f"only applies with optimizer.lr_decay_style wsd, not {optimizer.lr_decay_style}")
    elif optimizer.lr_wsd_decay_steps > room > 0:
        yield case.problem(path, f"must be at most {room}, the steps between warm-up and {end_name} = {end}")
