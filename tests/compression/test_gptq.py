"""GPTQ against the method that it is a fast form of: eliminate one input after the other from the inverse itself."""

import torch

from megatron_7b.compression.quantization.gptq import GptqOptions, round_by_gptq
from megatron_7b.compression.quantization.grid import round_to_nearest
from megatron_7b.compression.quantization.schemes import SCHEMES, Scheme
from megatron_7b.compression.quantization.statistics import output_error

W4 = Scheme("w4a16", 4, False, 8, False, ("rtn", "gptq", "awq"))


def problem(width: int = 24, rows: int = 6, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(width, width, generator=generator)
    inputs = torch.randn(tokens, width, generator=generator) @ mixing
    return torch.randn(rows, width, generator=generator), inputs.T @ inputs


def by_elimination(weight: torch.Tensor, hessian: torch.Tensor, scheme: Scheme, options: GptqOptions) -> torch.Tensor:
    """Optimal Brain Quantisation in a given order, without any factor: the inverse is updated after each input."""
    weight, hessian = weight.double().clone(), hessian.double().clone()
    scales = round_to_nearest(weight.float(), scheme, torch.float32).scales.double()
    by_input = scales.repeat_interleave(scheme.group_size or weight.shape[1], dim=1)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    hessian += options.damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    steps, left = torch.zeros_like(weight), list(order)
    for column in order:
        inverse = torch.linalg.inv(hessian[left][:, left])
        here = left.index(column)
        limit = 2 ** (scheme.num_bits - 1)
        steps[:, column] = (weight[:, column] / by_input[:, column]).round().clamp(-limit, limit - 1)
        error = (weight[:, column] - steps[:, column] * by_input[:, column]) / inverse[here, here]
        weight[:, left] -= torch.outer(error, inverse[here])
        left.remove(column)
    return steps.float()


def test_steps_are_those_of_elimination() -> None:
    weight, hessian = problem()
    rounded = round_by_gptq(weight, hessian, W4, torch.float32)
    assert torch.equal(rounded.steps, by_elimination(weight, hessian, W4, GptqOptions()))


def test_it_loses_less_than_rounding_to_nearest() -> None:
    weight, hessian = problem(width=256, rows=32, tokens=600)
    scheme = Scheme("w4a16", 4, False, 128, False, ("gptq",))
    nearest = output_error(weight, round_to_nearest(weight, scheme, torch.bfloat16).values(), hessian)
    for options in (GptqOptions(), GptqOptions(act_order=False)):
        rounded = round_by_gptq(weight, hessian, scheme, torch.bfloat16, options).values()
        assert output_error(weight, rounded, hessian) < 0.8 * nearest


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, hessian = problem()
    hessian[:, 5] = hessian[5] = 0
    rounded = round_by_gptq(weight, hessian, W4, torch.float32)
    assert torch.equal(rounded.steps[:, 5], round_to_nearest(weight, W4, torch.float32).steps[:, 5])
    assert torch.isfinite(rounded.values()).all()
    everything = round_by_gptq(weight, torch.zeros_like(hessian), SCHEMES["w8a16"], torch.float32)
    assert torch.equal(everything.steps, round_to_nearest(weight, SCHEMES["w8a16"], torch.float32).steps)
