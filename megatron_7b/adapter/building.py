"""From the section `adapter` of a configuration to an adapter: the one table of methods."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec

from megatron_7b.adapter.bottleneck.method import build_bottleneck
from megatron_7b.adapter.low_rank.method import build_low_rank
from megatron_7b.adapter.targets import check_modules_to_save
from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.model.adapter import Adapter
from megatron_7b.model.kinds import parameter_table

BUILDERS: Mapping[str, Callable[[RunConfig], Adapter]] = {
    "lora": build_low_rank,
    "dora": build_low_rank,
    "adalora": build_low_rank,
    "qlora": build_low_rank,
    "bottleneck": build_bottleneck,
}
"""What builds the adapter of each method."""


def build_adapter(config: RunConfig) -> Adapter | None:
    """Return the adapter that a configuration asks for; None if there is none.

    Collective: none.

    Raises:
        ConfigError: The model has no layer or module of a name that is given.
    """
    method = config.adapter.method
    if method == "none":
        return None
    if method not in BUILDERS:
        raise ConfigError(
            f"adapter.method is {method!r}, which this version does not have", hint=f"there are {', '.join(BUILDERS)}"
        )
    if method == "qlora" and find_spec("bitsandbytes") is None:
        raise ConfigError(
            "adapter.method is 'qlora', whose four-bit weights need bitsandbytes, which is not installed",
            hint="pip install 'megatron-7b[qlora]'; adapter.method lora needs nothing, and more memory",
        )
    adapter = BUILDERS[method](config)
    table = parameter_table(config.model, config.model.vocab_size or 1)
    adapter.own_names(table)  # refuses names that do not exist
    check_modules_to_save(table, config.adapter)
    return adapter
