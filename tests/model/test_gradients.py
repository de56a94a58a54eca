"""The gradients that a step leaves in the gradient buffers, against autograd's of the page of plain torch in FP64."""

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.reference_gpt import reference_loss
from tests.support.tiny_runs import batches, build, tiny_config


def gradient_errors(model: dict[str, object], dtype: str) -> dict[str, float]:
    """Entry point of a rank: by parameter, |gradient - right one| / |right one| after one step without clipping."""
    from megatron_7b.model.builder import named_canonical_parameters
    from megatron_7b.training.step import train_step

    config = tiny_config(model=model, optimizer={"clip_grad": 0.0}, precision={"params_dtype": dtype})
    core = build(config)
    parameters = dict(named_canonical_parameters([chunk.module for chunk in core.model]))
    exact = {name: parameter.detach().double().requires_grad_() for name, parameter in parameters.items()}
    step = batches(config, 0, dp_rank=0, dp_size=1, masked=False)
    train_step(core, step, 1e-3)
    loss = sum(
        reference_loss(exact, config.model, torch.from_numpy(b.tokens), torch.from_numpy(b.labels)) for b in step
    ) / len(step)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    errors = {}
    for name, parameter in parameters.items():
        right = exact[name].grad
        assert right is not None
        main_grad: torch.Tensor = parameter.main_grad  # type: ignore[attr-defined]
        errors[name] = ((main_grad.double() - right).norm() / right.norm()).item()
    return errors


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 0.05)])
def test_gradients_are_those_of_autograd(tied: bool, dtype: str, tolerance: float) -> None:
    """Tied, the embedding's and the output layer's gradients meet in one buffer by two ways."""
    model = {"share_embeddings_and_output_weights": tied, "add_qkv_bias": True, "qk_layernorm": True}
    (errors,) = run_ranks(1, gradient_errors, model, dtype)
    assert len(errors) > 20
    assert {name: error for name, error in errors.items() if not error < tolerance} == {}
