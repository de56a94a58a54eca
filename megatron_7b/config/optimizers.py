"""The optimizers that a configuration may name, and which fields of its section belong to each."""

from dataclasses import dataclass

_ADAM = ("adam_beta1", "adam_beta2", "adam_eps")


@dataclass(frozen=True, kw_only=True)
class OptimizerTraits:
    """What follows from the name of an optimizer.

    Attributes:
        summary: What it does, in a few words.
        fields: Those of the section `optimizer` that only it and some others have.
        has_moments: Its state is Adam's two moments for every parameter, which Transformer Engine can keep in BF16.
    """

    summary: str
    fields: tuple[str, ...]
    has_moments: bool = False


OPTIMIZERS: dict[str, OptimizerTraits] = {
    "adamw": OptimizerTraits(summary="AdamW: decoupled weight decay", fields=_ADAM, has_moments=True),
    "adam": OptimizerTraits(summary="Adam: weight decay in the gradient (L2)", fields=_ADAM, has_moments=True),
    "sgd": OptimizerTraits(
        summary="gradient descent with momentum, weight decay in the gradient (L2)",
        fields=("sgd_momentum", "sgd_nesterov"),
    ),
    "muon": OptimizerTraits(
        summary="Muon: orthogonalized momentum for the matrices of layers, AdamW for all else; decoupled weight decay",
        fields=(
            *("muon_momentum", "muon_nesterov", "muon_num_ns_steps", "muon_scale_mode", "muon_extra_scale_factor"),
            *("muon_matmul_dtype", "muon_adamw_lr", *_ADAM),
        ),
    ),
}
"""By name. All have the fields that none of them lists: learning rates, their schedule, weight decay, clipping."""

NAME = "optimizer.name"
OWN_FIELDS = tuple(dict.fromkeys(f"optimizer.{field}" for traits in OPTIMIZERS.values() for field in traits.fields))
"""Dotted paths of the fields that not all of them have."""


def fields_of_others(name: object) -> frozenset[str]:
    """Return the dotted paths of the fields that only other optimizers have; none if there is no such optimizer."""
    if not isinstance(name, str) or name not in OPTIMIZERS:
        return frozenset()
    return frozenset(OWN_FIELDS).difference(f"optimizer.{field}" for field in OPTIMIZERS[name].fields)


def why_not_of(path: str, name: str) -> str:
    """Say to which optimizers a field belongs, and which fields the chosen one has.

    Args:
        path: Dotted path of a field of other optimizers.
        name: The chosen one.
    """
    owners = [owner for owner, traits in OPTIMIZERS.items() if path.partition(".")[2] in traits.fields]
    own = ", ".join(f"optimizer.{field}" for field in OPTIMIZERS[name].fields)
    return f"belongs to {NAME} {' | '.join(owners)}, not to {name}, whose own options are {own}"
