"""The fused output layer and loss against torch's own cross entropy, gradients included."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from megatron_7b.model import fused_loss
from megatron_7b.model.fused_loss import linear_cross_entropy, linear_token_losses
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import build, run_steps, tiny_config

TOKENS, HIDDEN, VOCABULARY, PADDED = 37, 16, 101, 128


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(PADDED, HIDDEN, generator=generator)  # padded rows are not zero, and must not count
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    mask = (torch.rand(TOKENS, generator=generator) < 0.7).float()
    return hidden, weight, labels, mask


def expected(scale: float, smoothing: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight, labels, mask = inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    logits = (hidden @ weight.t())[:, :VOCABULARY]
    losses = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    loss = (losses * mask).sum()
    (scale * loss).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows_per_chunk", [1, 5, 37, 1000])
def test_loss_and_gradients_are_those_of_torch(
    rows_per_chunk: int, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fused_loss._CHUNK_BYTES, "cpu", rows_per_chunk * 4 * PADDED)
    hidden, weight, labels, mask = inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = linear_cross_entropy(
        hidden, weight, labels, mask, first_token=0, num_true=VOCABULARY, group=None, label_smoothing=smoothing
    )
    (3.0 * loss).backward()
    for actual, right in zip((loss.detach(), hidden.grad, weight.grad), expected(3.0, smoothing), strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-5, atol=1e-5)
    assert weight.grad is not None
    assert not weight.grad[VOCABULARY:].any()


def test_many_chunks_lose_no_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """16,650 chunks of about 35 each: FP32 sums would be off by 4e-5."""
    monkeypatch.setitem(fused_loss._CHUNK_BYTES, "cpu", 4 * 4 * PADDED)
    hidden, weight, labels, mask = (x.repeat(1800, *[1] * (x.dim() - 1)) if len(x) == TOKENS else x for x in inputs())
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels, mask, first_token=0, num_true=VOCABULARY, group=None)
        logits = (hidden @ weight.t())[:, :VOCABULARY].double()
    right = (functional.cross_entropy(logits, labels, reduction="none") * mask).sum()
    assert float(loss) == pytest.approx(float(right), rel=2e-7)


def test_without_gradients_only_the_loss_is_computed() -> None:
    hidden, weight, labels, mask = inputs()
    loss = linear_cross_entropy(hidden, weight, labels, mask, first_token=0, num_true=VOCABULARY, group=None)
    torch.testing.assert_close(loss, expected(1.0)[0])
    assert not loss.requires_grad


def weighted_sum(hidden: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor, **where: Any) -> torch.Tensor:
    """Make the masked sum of the losses of single tokens."""
    return (linear_token_losses(hidden, weight, inputs()[2], **where) * mask).sum()


@pytest.mark.parametrize("in_main_grad", [True, False])
def test_losses_of_single_tokens_and_their_gradients_are_those_of_torch(
    in_main_grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fused_loss._CHUNK_BYTES, "cpu", 5 * 4 * PADDED)
    hidden, weight, _, mask = inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    if in_main_grad:
        weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    loss = weighted_sum(hidden, weight, mask, first_token=0, num_true=VOCABULARY, group=None)
    (3.0 * loss).backward()
    grad_weight = weight.main_grad if in_main_grad else weight.grad  # type: ignore[attr-defined]
    for actual, right in zip((loss.detach(), hidden.grad, grad_weight), expected(3.0), strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-5, atol=1e-5)


def test_a_weight_that_is_not_trained_costs_no_gradient() -> None:
    hidden, weight, labels, mask = inputs()
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, labels, mask, first_token=0, num_true=VOCABULARY, group=None).backward()
    torch.testing.assert_close(hidden.grad, expected(1.0)[1], rtol=1e-5, atol=1e-5)
    assert weight.grad is None


def shard_results(world_size: int, *, by_token: bool, smoothing: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entry point of a rank: the loss, the sum of the hidden gradients, and this rank's part of the weight's."""
    hidden, weight, labels, mask = inputs()
    rank, rows = dist.get_rank(), PADDED // world_size
    hidden.requires_grad_()
    part = weight[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    first = rank * rows
    where: dict[str, Any] = {"first_token": first, "num_true": VOCABULARY - first, "group": dist.group.WORLD}
    if by_token:
        loss = weighted_sum(hidden, part, mask, **where)
    else:
        loss = linear_cross_entropy(hidden, part, labels, mask, label_smoothing=smoothing, **where)
    loss.backward()
    assert hidden.grad is not None
    assert part.grad is not None
    dist.all_reduce(hidden.grad)
    # Arrays, not tensors: those would be sent as handles of memory that ends with the rank.
    return loss.detach().numpy(), hidden.grad.numpy(), part.grad.numpy()


@pytest.mark.parametrize(
    ("world_size", "by_token", "smoothing"), [(2, False, 0.0), (8, False, 0.0), (2, True, 0.0), (8, False, 0.1)]
)
def test_vocabulary_parallel_loss_is_that_of_one_rank(world_size: int, by_token: bool, smoothing: float) -> None:
    """With eight ranks of 16 rows each, the last one holds nothing but padding."""
    loss, grad_hidden, grad_weight = expected(1.0, smoothing)
    of_rank = functools.partial(shard_results, world_size, by_token=by_token, smoothing=smoothing)
    results = run_ranks(world_size, of_rank)
    for actual_loss, actual_hidden, _ in results:
        np.testing.assert_allclose(actual_loss, loss, rtol=1e-6)
        np.testing.assert_allclose(actual_hidden, grad_hidden, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([part for _, _, part in results]), grad_weight, rtol=1e-5, atol=1e-5)


def steps_with(cross_entropy_impl: str, parallel: dict[str, Any]) -> list[tuple[float, float]]:
    """Entry point of a rank: losses and gradient norms of three steps; word embeddings are the output layer too."""
    model = {"share_embeddings_and_output_weights": True}
    learner = build(tiny_config(model=model, parallel=parallel, runtime={"cross_entropy_impl": cross_entropy_impl}))
    assert learner.model[0].module.fuse_loss == (cross_entropy_impl == "chunked")
    return run_steps(learner, range(3))


def test_loss_from_all_logits_is_the_same() -> None:
    sharded = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    (expected,) = run_ranks(1, steps_with, "chunked", {})
    for world_size, parallel in ((1, {}), (2, sharded)):
        for steps in run_ranks(world_size, steps_with, "full", parallel):
            (losses, norms), (right, right_norms) = np.transpose(steps), np.transpose(expected)
            np.testing.assert_allclose(losses, right, rtol=1e-6)
            np.testing.assert_allclose(norms, right_norms, rtol=1e-4)
