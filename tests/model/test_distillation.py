"""The distance from a teacher, chunk by chunk, against trl's and against whole logits."""

from dataclasses import replace
from typing import Literal

import pytest
import torch

from megatron_7b.config.distillation_config import DistillationConfig
from megatron_7b.model import distillation
from megatron_7b.model.distillation import Taught, TopTaught, linear_distillation
from megatron_7b.model.top_logits import top_log_probabilities
from tests.training.distillation_oracle import distance

VOCAB_SIZE, PADDED = 101, 112


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_equals_trls_generalized_jsd(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    monkeypatch.setattr(distillation, "_CHUNK_BYTES", 4 * PADDED * 5)  # several chunks, the last one shorter
    name = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")
    how = DistillationConfig(loss=name, jsd_beta=beta if name == "jsd" else 0.5, temperature=1.7, alpha=1.0)
    generator = torch.Generator().manual_seed(3)
    hidden, states = (torch.randn(17, width, generator=generator) for width in (8, 12))
    weight, of_teacher = (torch.randn(PADDED, width, generator=generator) for width in (8, 12))
    labels, mask = torch.arange(17), (torch.arange(17) % 3 > 0).float()
    own = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    losses = linear_distillation(
        own[0],
        own[1],
        labels,
        mask,
        Taught(states, of_teacher, None, how),
        first_token=0,
        num_true=VOCAB_SIZE,
        group=None,
    )
    losses.loss.backward()
    whole = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    student, teacher = whole[0] @ whole[1].t(), states @ of_teacher.t()
    expected = trainer.generalized_jsd_loss(
        student[:, :VOCAB_SIZE], teacher[:, :VOCAB_SIZE], labels.where(mask > 0, -100),
        beta=beta, temperature=1.7, reduction="sum",
    ) * 1.7**2  # fmt: skip  # which trl leaves out
    expected.backward()
    torch.testing.assert_close(losses.loss, expected, rtol=1e-5, atol=0)
    task = torch.nn.functional.cross_entropy(student[:, :VOCAB_SIZE], labels, reduction="none")
    torch.testing.assert_close(losses.task.float(), (task * mask).sum(), rtol=1e-5, atol=0)
    for one, other in zip(own, whole, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_tokens_that_are_not_kept_are_one_outcome(name: Literal["forward_kl", "reverse_kl", "jsd"]) -> None:
    how = DistillationConfig(loss=name, temperature=1.7, alpha=1.0)
    generator = torch.Generator().manual_seed(3)
    states, of_teacher = torch.randn(9, 12, generator=generator), torch.randn(PADDED, 12, generator=generator)
    ids, logps = top_log_probabilities(
        states, of_teacher, top_k=7, temperature=1.7, first_token=0, num_true=VOCAB_SIZE, group=None
    )
    hidden, weight = torch.randn(9, 8, generator=generator), torch.randn(PADDED, 8, generator=generator)
    own = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    taught, place = TopTaught(ids, logps, how), {"first_token": 0, "num_true": VOCAB_SIZE, "group": None}
    losses = linear_distillation(*own, torch.arange(9), torch.ones(9), taught, **place)
    losses.loss.backward()
    whole = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    outcomes = []
    for logits in (whole[0] @ whole[1].t(), states @ of_teacher.t()):
        p = torch.softmax(logits[:, :VOCAB_SIZE] / 1.7, dim=1)
        kept = p.gather(1, ids)
        outcomes.append(torch.cat((kept, 1 - kept.sum(1, keepdim=True)), 1).log())
    torch.testing.assert_close(outcomes[1], logps, rtol=1e-4, atol=1e-4)
    expected = distance(outcomes[0], outcomes[1], replace(how, temperature=1.0)).sum() * 1.7**2
    expected.backward()
    torch.testing.assert_close(losses.loss, expected, rtol=1e-4, atol=0)
    for one, other in zip(own, whole, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)
