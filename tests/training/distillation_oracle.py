"""One step of distillation in plain torch: two models of transformers, whole logits, autograd."""

from pathlib import Path
from typing import Any

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
    """Train a Hugging Face folder by SGD; return the loss of each step, and the weights after the last one.

    Projections, which no Hugging Face model has, are among them under our names.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    auto = AutoModelForMaskedLM if config.model.traits.kind == "encoder" else AutoModelForCausalLM
    model, other = (
        auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager") for folder in (student, teacher)
    )
    model.get_input_embeddings().padding_idx = None  # token 0 is one like any other here
    own, of_teacher = Layers(model), Layers(other)
    how, losses, projections = config.distillation, [], own.projections(of_teacher, config)
    for step in range(num_steps):
        total, number, apart, num_tokens = torch.zeros(()), 0.0, torch.zeros(()), 0.0
        for batch in batches(config, step, dp_rank=0, dp_size=1):
            tokens, labels = torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels).flatten()
            mask = torch.from_numpy(batch.loss_mask).flatten()
            logits = model(tokens).logits.flatten(0, 1)
            with torch.no_grad():
                taught = other(tokens).logits.flatten(0, 1)
            task = functional.cross_entropy(logits, labels, reduction="none")
            each = (1 - how.alpha) * task + how.alpha * distance(logits, taught, how)
            total, number = total + (each * mask).sum(), number + mask.sum().item()
            if how.compares_layers:
                counts = torch.ones_like(mask) if config.model.traits.kind == "encoder" else (mask != 0).float()
                apart = apart + (own.apart(of_teacher, config, projections) * counts).sum()
                num_tokens += counts.sum().item()
        loss = total / number + apart / max(1.0, num_tokens)
        parameters = [*model.parameters(), *projections.values()]
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= config.optimizer.lr * gradient
        losses.append(loss.item())
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return losses, state | {name: tensor.detach() for name, tensor in projections.items()}


class Layers:
    """What the layers of a model of transformers show in its last forward pass."""

    def __init__(self, model: Any) -> None:
        self.model, self.states, self.scores = model, {}, {}
        self.num_heads = model.config.num_attention_heads
        is_encoder = hasattr(model, "bert")
        self.layers = model.bert.encoder.layer if is_encoder else model.model.layers
        places = [model.bert.embeddings if is_encoder else model.model.embed_tokens, *self.layers]
        for place, module in enumerate(places):
            module.register_forward_hook(self._keep(self.states, place))
        self.queries, self.keys = {}, {}
        if is_encoder:
            for place, layer in enumerate(self.layers, start=1):
                layer.attention.self.query.register_forward_hook(self._keep(self.queries, place))
                layer.attention.self.key.register_forward_hook(self._keep(self.keys, place))

    @staticmethod
    def _keep(found: dict[int, Tensor], place: int) -> Any:
        def keep(_module: object, _inputs: object, output: Any) -> None:
            found[place] = output[0] if isinstance(output, tuple) else output

        return keep

    def pairs(self, other: "Layers", config: RunConfig) -> list[tuple[int, int]]:
        ratio = len(other.layers) // len(self.layers)
        mapped = config.distillation.layer_map or [layer * ratio for layer in range(1, len(self.layers) + 1)]
        return [(0, 0), *((layer, of_teacher) for layer, of_teacher in enumerate(mapped, start=1) if of_teacher)]

    def projections(self, other: "Layers", config: RunConfig) -> dict[str, Tensor]:
        """Return what the run begins with: a function of seed and name, as every parameter's values are."""
        from megatron_7b.model.initialization import draw_rows

        if not config.distillation.hidden:
            return {}
        width, of_teacher, found = self.model.config.hidden_size, other.model.config.hidden_size, {}
        for place, _ in self.pairs(other, config):
            name = f"distillation.{f'layers.{place}' if place else 'embedding'}.weight"
            rows = draw_rows(name, width, 0, of_teacher, seed=config.training.seed, std=width**-0.5)
            found[name] = rows.requires_grad_()
        return found

    def attention_scores(self, place: int) -> Tensor:
        """Return [b, n, s, s]."""
        query, key = (x[place].unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (self.queries, self.keys))
        return query @ key.transpose(2, 3) / query.shape[-1] ** 0.5

    def apart(self, other: "Layers", config: RunConfig, projections: dict[str, Tensor]) -> Tensor:
        """Return what both terms add to the loss of each token, [b × s]."""
        how, pairs, total = config.distillation, self.pairs(other, config), torch.zeros(())
        for place, of_teacher in pairs:
            if how.hidden:
                weight = projections[f"distillation.{f'layers.{place}' if place else 'embedding'}.weight"]
                difference = self.states[place] @ weight.t() - other.states[of_teacher].detach()
                total = total + how.hidden_weight * difference.square().mean(2) / len(pairs)
            if how.attention != "none" and place:
                own, others = self.attention_scores(place), other.attention_scores(of_teacher).detach()
                is_averaged = self.num_heads != other.num_heads
                if how.attention == "kl":
                    p, q = others.softmax(3), own.softmax(3)
                    p, q = (x.mean(1, keepdim=True) if is_averaged else x for x in (p, q))
                    each = (p * (p.log() - q.log())).sum(3)
                else:
                    own, others = (x.mean(1, keepdim=True) if is_averaged else x for x in (own, others))
                    each = (own - others).square().mean(3)
                total = total + how.attention_weight * each.mean(1) / (len(pairs) - 1)
        return total.flatten()
