#!/usr/bin/env python3
"""Masked language modeling beside transformers' BertForMaskedLM: the same initial weights, batches and optimizer.

    tools/benchmarks/masked_lm.py text_text_document --steps 100 --plot docs/benchmarks/masked_lm.png

Both train in FP32 in this process, without dropout, by AdamW with the same groups, clipping and schedule. Prints both
losses, the largest relative difference, and the unigram entropy of the corpus, which is the loss of a model that knows
only how frequent each token is. Options of the configuration may follow, as for `megatron-7b pretrain`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from unigram_entropy import token_counts, unigram_entropy

SHOWN = (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500)


def read_options() -> tuple[argparse.Namespace, dict[str, object]]:
    """Return the tool's own options, and those of the configuration by dotted path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="prefix of a corpus whose tokenizer has [CLS], [SEP] and [MASK]")
    parser.add_argument("--preset", default="bert_tiny_cpu")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw both curves")
    flags, rest = parser.parse_known_args()
    pairs = zip(rest[::2], rest[1::2], strict=True)
    overrides = {name.removeprefix("--").replace("-", "_"): value for name, value in pairs}
    return flags, {
        "data.train": [flags.corpus],
        "training.train_steps": flags.steps,
        "precision.params_dtype": "fp32",
        "model.hidden_dropout": 0.0,
        "model.attention_dropout": 0.0,
        **overrides,
    }


def build_reference(config: Any) -> Any:
    """Return transformers' model of the same shape, whatever its weights."""
    from transformers import BertConfig, BertForMaskedLM

    model = config.model
    return BertForMaskedLM(
        BertConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            intermediate_size=model.ffn_hidden_size,
            max_position_embeddings=model.max_position_embeddings,
            type_vocab_size=model.num_tokentypes,
            layer_norm_eps=model.norm_epsilon,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def optimizer_of(reference: Any, settings: Any) -> Any:
    """Return AdamW with norms and biases exempt from weight decay."""
    import torch

    parameters = list(reference.parameters())
    groups = [
        {"params": [one for one in parameters if one.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [one for one in parameters if one.dim() == 1], "weight_decay": 0.0},
    ]
    betas = (settings.adam_beta1, settings.adam_beta2)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.adam_eps)


def reference_step(reference: Any, adam: Any, batches: list[Any], rate: float, clip: float) -> float:
    """Do one update, and return the mean loss of the hidden tokens before it."""
    import torch
    from torch.nn.functional import cross_entropy

    adam.zero_grad()
    count = sum(float(batch.loss_mask.sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        logits = reference(input_ids=torch.from_numpy(batch.tokens)).logits
        hidden = torch.from_numpy(batch.loss_mask) > 0
        loss = cross_entropy(logits[hidden], torch.from_numpy(batch.labels)[hidden], reduction="sum") / count
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), clip)
    for group in adam.param_groups:
        group["lr"] = rate
    adam.step()
    return total


def main() -> None:
    """Train both, and print the table."""
    flags, overrides = read_options()
    from megatron_7b.config import check_config, load_config
    from megatron_7b.data import BatchLoader, IndexedDataset
    from megatron_7b.data.samples.corpus_tokenizer import find_tokenizer
    from megatron_7b.objective import build_objective
    from megatron_7b.training.assemble import with_vocab_size

    config = load_config(flags.preset, overrides)
    tokenizer = find_tokenizer(config.data)
    config = with_vocab_size(config, tokenizer)
    check_config(config)
    reference = build_reference(config)

    from megatron_7b.conversion import to_hugging_face
    from megatron_7b.model.builder import named_canonical_parameters
    from megatron_7b.optim.schedules import learning_rate
    from megatron_7b.runtime.process.distributed import initialize_process
    from megatron_7b.training.learner import build_learner
    from megatron_7b.training.step import train_step

    samples = build_objective(config).open_split(config, "train", tokenizer, contents={}, reached=None)
    core = build_learner(config, initialize_process(config.runtime))
    ours = {name: tensor.detach() for name, tensor in named_canonical_parameters([core.model[0].module])}
    weights = {name: tensor.clone() for name, tensor in to_hugging_face(ours, config.model, config.model.vocab_size)}
    absent = reference.load_state_dict(weights, strict=False)
    assert not absent.unexpected_keys
    reference.tie_weights()
    adam, settings, size = (
        optimizer_of(reference, config.optimizer),
        config.optimizer,
        config.training.global_batch_size,
    )
    losses = []
    with BatchLoader(samples, micro_batch_size=config.training.micro_batch_size) as loader:
        for step in range(flags.steps):
            rate = learning_rate(step + 1, settings, flags.steps)
            batches = loader.batches(step * size, size)
            theirs = reference_step(reference, adam, batches, rate, settings.clip_grad)
            losses.append((train_step(core, batches, rate).loss, theirs))
            print(f"step {step + 1}: {losses[-1]}", file=sys.stderr, flush=True)
    report(losses, unigram_entropy(token_counts(IndexedDataset(flags.corpus))), flags.plot)


def report(losses: list[tuple[float, float]], entropy: float, plot: Path | None) -> None:
    """Print and draw the curves."""
    print("| step | megatron_7b | transformers | relative difference |\n|---|---|---|---|")
    for step in (one for one in SHOWN if one <= len(losses)):
        ours, theirs = losses[step - 1]
        print(f"| {step} | {ours:.4f} | {theirs:.4f} | {abs(ours / theirs - 1):.1e} |")
    worst = max(abs(ours / theirs - 1) for ours, theirs in losses)
    last = np.mean(losses[-10:], axis=0)
    print(f"\nlargest relative difference over {len(losses)} steps: {worst:.1e}")
    print(f"mean of the last 10 steps: {last[0]:.3f}; unigram entropy of the corpus: {entropy:.3f}")
    if plot is not None:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 4))
        steps = np.arange(1, len(losses) + 1)
        axes.plot(steps, [theirs for _, theirs in losses], label="transformers", linewidth=3, alpha=0.4)
        axes.plot(steps, [ours for ours, _ in losses], label="megatron_7b", linewidth=1)
        axes.axhline(entropy, color="grey", linestyle="--", label="unigram entropy of the corpus")
        axes.set(xlabel="step", ylabel="loss of the hidden tokens (nats)")
        axes.legend()
        figure.savefig(plot, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
