"""PEFT's own training of a tiny model, as the oracle for ours: the same batches, the same AdamW, FP32, one process."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_7b.config.schema import RunConfig
from tests.support.tiny_runs import batches

_AUTO = {"bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}
WEIGHTS = "adapter_model.safetensors"


@dataclass
class Training:
    """What PEFT's training gave: loss and gradient norm of each step, and the tensors that it would save."""

    results: list[tuple[float, float]]
    tensors: dict[str, Tensor]
    model: Any


def load_base(folder: Path, **options: Any) -> Any:
    """Load the Hugging Face model of a folder in FP32."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    auto = getattr(transformers, _AUTO.get(config.model_type, "AutoModelForCausalLM"))
    return auto.from_pretrained(folder, attn_implementation="eager", **{"dtype": torch.float32, **options})


def save_adapter(base: Path, folder: Path, config: Any, *, seed: int = 3) -> None:
    """Make an adapter whose every tensor is random, B and lora_E included, and save it as PEFT does."""
    from peft import get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(load_base(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = 0.05 * torch.randn(parameter.shape)
                parameter.copy_(parameter * (1 + noise) if "magnitude" in name or "modules_to_save" in name else noise)
    model.save_pretrained(folder)


def train_with_peft(base: Path, adapter: Path, config: RunConfig, num_steps: int, **options: Any) -> Training:
    """Train an adapter of a folder further with PEFT.

    Args:
        base: Hugging Face folder.
        adapter: PEFT folder.
        config: Of our run: batches and optimizer follow from it.
        num_steps: Optimizer updates.
        options: For `from_pretrained` of the base.
    """
    from peft import PeftModel, get_peft_model_state_dict

    model = PeftModel.from_pretrained(load_base(base, **options), adapter, is_trainable=True)
    # No dropout, which GPT-2, BERT and T5 have at Hugging Face. But in evaluation mode, bitsandbytes 0.50 multiplies in
    # BF16 on CPUs that can, and losses of a four-bit Llama (without dropout) are off by 5e-4.
    model.train("quantization_config" in options)
    optimizer = build_optimizer(model, config)
    is_adalora = hasattr(model.base_model, "update_and_allocate")
    results = []
    for step in range(num_steps):
        optimizer.zero_grad()
        loss = mean_loss(model, config, step)
        total = loss + orthogonality(model) if is_adalora else loss
        total.backward()
        trained = [p for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(trained, config.optimizer.clip_grad or float("inf"))
        optimizer.step()
        if is_adalora:
            model.base_model.update_and_allocate(step + 1)
        results.append((float(loss.detach()), float(norm)))
    tensors = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}
    return Training(results, tensors, model)


def build_optimizer(model: Any, config: RunConfig) -> torch.optim.AdamW:
    """Return torch's AdamW with the settings of a run: what is a vector has no weight decay."""
    settings = config.optimizer
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    betas = (settings.adam_beta1, settings.adam_beta2)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.adam_eps)


def mean_loss(model: Any, config: RunConfig, step: int) -> Tensor:
    """Return the mean loss over all tokens of a global batch that count, as `run_steps` has it."""
    losses, counted = [], 0.0
    for inputs, labels, mask in _microbatches(config, step):
        logits = model(**inputs).logits
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        losses.append((each * mask.flatten()).sum())
        counted += float(mask.sum())
    return torch.stack(losses).sum() / counted


def orthogonality(model: Any) -> Tensor:
    """Return AdaLoRA's regularisation as PEFT's own forward adds it to a loss."""
    from types import SimpleNamespace

    tuner = model.base_model
    outputs = SimpleNamespace(loss=torch.zeros(()))
    original, tuner.model.forward = tuner.model.forward, lambda: outputs
    try:
        loss: Tensor = tuner.forward().loss
    finally:
        tuner.model.forward = original
    return loss


def _microbatches(config: RunConfig, step: int) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
    for batch in batches(config, step, dp_rank=0, dp_size=1):
        inputs = {"input_ids": torch.from_numpy(batch.tokens)}
        if batch.decoder_tokens is not None:
            inputs["decoder_input_ids"] = torch.from_numpy(batch.decoder_tokens)
        if batch.attention_mask is not None:
            inputs["attention_mask"] = torch.from_numpy(batch.attention_mask).long()
        yield inputs, torch.from_numpy(batch.labels), torch.from_numpy(batch.loss_mask)


def saved_adapter(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a PEFT folder."""
    return load_file(folder / WEIGHTS)
