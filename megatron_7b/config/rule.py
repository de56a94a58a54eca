"""What a rule is: a small check of a configuration, with the options that it reads."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from megatron_7b.config.options import get_value
from megatron_7b.config.problems import Problem
from megatron_7b.config.schema import RunConfig

LAYOUT = (
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.context_parallel_size",
)
"""The options that decide how many ranks hold one copy of the model."""


@dataclass(frozen=True)
class Case:
    """A configuration with the number of ranks that it shall run on, if that is known."""

    config: RunConfig
    world_size: int | None

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.config.parallel.model_parallel_size

    @cached_property
    def data_parallel_size(self) -> int:
        """Copies of the model; 1 if the number of ranks is not known or does not fit."""
        return max((self.world_size or 0) // self.model_parallel_size, 1)

    @cached_property
    def samples_per_microbatch(self) -> int:
        """Samples that all data-parallel ranks take in together."""
        return self.config.training.micro_batch_size * self.data_parallel_size

    @cached_property
    def chunks(self) -> int:
        """Pipeline stages, virtual ones counted apart."""
        return self.config.parallel.num_stages

    def problem(self, path: str, message: str) -> Problem:
        """Return a problem with the option at `path`, its value filled in."""
        return Problem(path, get_value(self.config, path), message)


@dataclass(frozen=True)
class Rule:
    """A check with the options that it reads."""

    reads: tuple[str, ...]
    check: Callable[[Case], Iterator[Problem]]


Check = Callable[[Case], Iterator[Problem]]


def adder_to(rules: list[Rule]) -> Callable[..., Callable[[Check], Check]]:
    """Return a decorator factory that appends checks to `rules`; `@rule("section.option")` names what one reads."""

    def rule(*reads: str) -> Callable[[Check], Check]:
        def add(check: Check) -> Check:
            rules.append(Rule(reads, check))
            return check

        return add

    return rule


def nearest_divisors(value: int, near: int) -> str:
    """Return the divisors of `value` next to `near`, below and above, as words: "2 or 4"."""
    divisors = [d for d in range(1, value + 1) if value % d == 0]
    below = [d for d in divisors if d < near][-1:]
    above = [d for d in divisors if d > near][:1]
    return " or ".join(str(d) for d in below + above)


def nearest_multiples(step: int, near: int) -> str:
    """Return the positive multiples of `step` next to `near`, as words: "12 or 16"."""
    below = near // step * step
    return " or ".join(str(m) for m in (below, below + step) if m > 0)
