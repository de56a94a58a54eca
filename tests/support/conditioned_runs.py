"""A run in which rounding stays small, and how far number formats may take it: what tests on a CPU and a GPU share.

At this learning rate no gradient norm rises far above the others. Where one spikes, the next steps amplify whatever
was rounded before, and a comparison of formats says nothing: at seven times this rate FP32 with TF32 products is off by
2e-2 after ten steps, while its first loss is off by 2e-7.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from megatron_7b.config.schema import RunConfig
from tests.support.tiny_runs import run_steps, tiny_config

NUM_STEPS = 20
LARGEST_NORM = 4.0
"""Of all gradients; the first one is 2.4."""

REFERENCE: tuple[tuple[float, float], ...] = (
    (6.9529925, 2.421973), (6.8061724, 2.335306), (6.6858597, 2.246722), (6.5816505, 1.942085),
    (6.5028107, 1.722319), (6.4364498, 1.674845), (6.3887231, 1.639025), (6.3188575, 1.705578),
    (6.2563251, 1.749334), (6.1643365, 1.906503), (6.0763837, 1.949592), (5.9810535, 2.000857),
    (5.9046664, 2.230943), (5.8397356, 3.153818), (5.7603216, 1.889786), (5.7099931, 3.055985),
    (5.6259651, 1.809286), (5.5602460, 1.946452), (5.4892508, 2.137338), (5.4031644, 1.887817),
)  # fmt: skip
"""(loss, gradient norm) of each step in FP32 on a CPU; regenerated only on purpose."""


@dataclasses.dataclass(frozen=True)
class Format:
    """A number format of matrix products, and what follows from it.

    Rounding a factor is wrong by at most the unit roundoff u, relatively. Errors of many products average out in a mean
    over a thousand tokens, so a loss is much better than u; and while weights have their initial values, the logits are
    small beside the logarithm of the vocabulary, so the first loss is better still.

    Attributes:
        name: What it is called.
        unit_roundoff: Half the distance from 1 to the next number.
    """

    name: str
    unit_roundoff: float

    @property
    def of_first_loss(self) -> float:
        """Largest relative error of the first loss."""
        return self.unit_roundoff / 64

    @property
    def of_losses(self) -> float:
        """Largest relative error of any loss of the run."""
        return self.unit_roundoff

    @property
    def of_first_norm(self) -> float:
        """Largest relative error of the first gradient norm."""
        return self.unit_roundoff

    @property
    def of_gradients(self) -> float:
        """Largest error of each parameter's first gradient, as a whole, relative to that gradient's norm."""
        return 8 * self.unit_roundoff


# FP32 rounds at 2^-24; what differs between machines, the order of long sums, is worth some hundred such roundings.
FP32, TF32 = Format("fp32", 2.0**-15), Format("tf32", 2.0**-11)
BF16, FP8 = Format("bf16", 2.0**-9), Format("fp8", 2.0**-4)


def conditioned_config(
    impl: str, precision: dict[str, Any], parallel: dict[str, Any] | None = None, **sections: dict[str, Any]
) -> RunConfig:
    """Return a run at a rate without spikes, of a small model whose dimensions FP8 accepts (multiples of 16)."""
    config = tiny_config(
        model={
            "hidden_size": 128,
            "ffn_hidden_size": 256,
            "vocab_size": 1009,
            "make_vocab_size_divisible_by": 128,
            "transformer_impl": impl,
        },
        parallel=parallel or {},
        precision=precision,
        optimizer={"lr": 3e-4},
        data={"seq_length": 128},
    )
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    )


def first_gradients(core: Any) -> dict[str, torch.Tensor]:
    """Do one step and return every parameter's gradient before clipping, in FP32 on the CPU, by canonical name.

    Args:
        core: A model on one rank, with `optimizer.clip_grad` off.
    """
    from megatron_7b.model.builder import named_canonical_parameters

    assert core.config.optimizer.clip_grad == 0.0
    run_steps(core, range(1))
    chunks = [chunk.module for chunk in core.model]
    return {name: weight.main_grad.float().cpu() for name, weight in named_canonical_parameters(chunks)}


def check_curve(
    actual: Sequence[tuple[float, float]], reference: Sequence[tuple[float, float]], number_format: Format
) -> str:
    """Check every step's loss, and the first gradient norm; return the differences as a line."""
    losses = [abs(a[0] - b[0]) / b[0] for a, b in zip(actual, reference, strict=True)]
    norm = abs(actual[0][1] - reference[0][1]) / reference[0][1]
    line = f"{number_format.name}: loss {losses[0]:.1e} at first, {max(losses):.1e} at worst; first norm {norm:.1e}"
    assert losses[0] < number_format.of_first_loss, line
    assert max(losses) < number_format.of_losses, line
    assert norm < number_format.of_first_norm, line
    assert max(norm for _, norm in actual) < LARGEST_NORM, line
    return line


def check_gradients(actual: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], number_format: Format) -> str:
    """Check the first gradient of every parameter; return the largest difference as a line."""
    assert actual.keys() == reference.keys()
    errors = {
        name: ((actual[name] - right).double().norm() / right.double().norm()).item()
        for name, right in reference.items()
    }
    worst = max(errors, key=errors.__getitem__)
    line = f"{number_format.name}: gradient of {worst} {errors[worst]:.1e}"
    assert errors[worst] < number_format.of_gradients, line
    return line
