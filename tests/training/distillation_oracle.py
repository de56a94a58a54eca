"""One step of distillation in plain torch: two models of transformers, whole logits, autograd."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from megatron_7b.config.distillation_config import DistillationConfig
from megatron_7b.config.schema import RunConfig
from tests.support.tiny_runs import batches


def distance(student: Tensor, teacher: Tensor, how: DistillationConfig) -> Tensor:
    """Return the distance of each row of logits [n, v], times temperature², [n]; written for reading, not for speed."""
    log_q = functional.log_softmax(student / how.temperature, dim=1)
    log_p = functional.log_softmax(teacher / how.temperature, dim=1)
    p, q = log_p.exp(), log_q.exp()
    if how.loss == "forward_kl":
        values = (p * (log_p - log_q)).sum(1)
    elif how.loss == "reverse_kl":
        values = (q * (log_q - log_p)).sum(1)
    else:
        log_m = (how.jsd_beta * p + (1 - how.jsd_beta) * q).log()
        values = how.jsd_beta * (p * (log_p - log_m)).sum(1) + (1 - how.jsd_beta) * (q * (log_q - log_m)).sum(1)
    return values * how.temperature**2


def steps(config: RunConfig, student: Path, teacher: Path, num_steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Train a Hugging Face folder by SGD; return the loss of each step, and the weights after the last one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    other = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    how, losses = config.distillation, []
    for step in range(num_steps):
        total, number = torch.zeros(()), 0.0
        for batch in batches(config, step, dp_rank=0, dp_size=1):
            tokens, labels = torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels).flatten()
            mask = torch.from_numpy(batch.loss_mask).flatten()
            logits = model(tokens).logits.flatten(0, 1)
            with torch.no_grad():
                taught = other(tokens).logits.flatten(0, 1)
            task = functional.cross_entropy(logits, labels, reduction="none")
            each = (1 - how.alpha) * task + how.alpha * distance(logits, taught, how)
            total, number = total + (each * mask).sum(), number + mask.sum().item()
        loss = total / number
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= config.optimizer.lr * parameter.grad
        losses.append(loss.item())
    return losses, {name: tensor.detach() for name, tensor in model.state_dict().items()}
