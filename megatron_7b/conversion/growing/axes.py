"""What each dimension of each parameter of a model is, read off its parameter table. Imports no torch."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from megatron_7b.config.schema import ModelConfig
from megatron_7b.model.kinds import parameter_table
from megatron_7b.model.parameters import Parameter, ParameterTable

type Axis = Literal["written", "read", "scale", "shift", "units", "heads", "head", "fixed"]
"""Of the residual stream: channels that a parameter writes, reads, or, in a norm, scales or shifts. Hidden units of an
MLP; channels of attention heads, or one entry for each head; everything that growing leaves alone: tokens, positions,
channels within a head."""


def find_axes(model: ModelConfig, vocab_size: int) -> dict[str, tuple[Axis, ...]]:
    """Return by name what the dimensions of a model's parameters are.

    Which size a dimension follows is seen from the tables of two models that differ in that size only, so the names of
    parameters do not matter, and a size that happens to equal another confuses nothing.

    Args:
        model: Shape of the model.
        vocab_size: True vocabulary size.
    """
    groups = model.query_groups
    base = replace(model, kv_channels=model.head_width, num_query_groups=groups)
    table = parameter_table(base, vocab_size)
    follows = {
        "stream": replace(base, hidden_size=2 * base.hidden_size),
        "units": replace(base, ffn_hidden_size=2 * base.ffn_hidden_size),
        "heads": replace(base, num_attention_heads=2 * base.num_attention_heads, num_query_groups=2 * groups),
    }
    sizes: dict[str, list[str]] = {name: ["fixed"] * len(parameter.shape) for name, parameter in table.items()}
    for size, larger in follows.items():
        for name, parameter in parameter_table(larger, vocab_size).items():
            for dim, (before, after) in enumerate(zip(table[name].shape, parameter.shape, strict=True)):
                if before != after:
                    sizes[name][dim] = size
    looked_up = {name for name, _ in itertools.takewhile(lambda row: row[1].init != "ones", table.items())}
    return {name: _axes(table, parameter, sizes[name], name in looked_up) for name, parameter in table.items()}


def _axes(table: ParameterTable, parameter: Parameter, sizes: list[str], is_looked_up: bool) -> tuple[Axis, ...]:
    """Say which way the residual stream goes through a parameter.

    Args:
        table: All parameters.
        parameter: This one.
        sizes: Which sizes of the model its dimensions follow.
        is_looked_up: It comes before the first norm, in the order of the forward pass: it is an embedding, if anything.
    """
    stream: tuple[Axis, ...]
    match len(sizes), parameter.init:
        case 1, "ones":
            stream = ("scale",)
        case 1, _:
            stream = ("shift" if _is_of_norm(table, parameter) else "written",)
        case _ if sizes[0] == "fixed":  # a row per token, position or kind of sentence, or per class that is predicted
            stream = ("fixed", "written" if is_looked_up else "read")
        case _:  # [out, in]
            stream = ("written", "read")
    # A matrix of scores by distance, not of channels: nothing of the stream goes through it.
    heads: Axis = "head" if sizes == ["fixed", "heads"] else "heads"
    named: Mapping[str, Axis] = {"units": "units", "heads": heads, "fixed": "fixed"}
    return tuple(named.get(size, through) for size, through in zip(sizes, stream, strict=True))


def _is_of_norm(table: ParameterTable, bias: Parameter) -> bool:
    weight = table.get(bias.name.removesuffix("bias") + "weight")
    return weight is not None and len(weight.shape) == 1
