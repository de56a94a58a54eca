#!/usr/bin/env python3
"""A training run beside transformers' model: the same initial weights, batches, optimizer and schedule, every step.

    megatron-7b tokenizer train --input sotu.jsonl --output tokenizer --vocab-size 8192
    megatron-7b preprocess --input sotu.jsonl --output-prefix sotu --tokenizer-model tokenizer --append-eod
    python tools/benchmarks/beside_transformers.py --data sotu_text_document --steps 300 --output beside

The initial weights are exported by `convert to-hf` and loaded by transformers; its model is trained by torch's AdamW
with the same groups of weight decay, learning rates and clipping, on the batches that our loader gives. Writes
`losses.csv` and `losses.png`, and ends with code 1 if two losses differ by more than `--tolerance`.

With `--last-bit` a second model of transformers starts from the same weights times 1 + 1e-7, about the last bit of
FP32, and learns the same: how far it leaves the first one is what rounding alone does at this learning rate.
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from megatron_7b.checkpoint.weights import write_weights  # noqa: E402  # after the path is set, for a checkout
from megatron_7b.config import RunConfig  # noqa: E402
from megatron_7b.model.builder import named_canonical_parameters  # noqa: E402
from megatron_7b.optim.schedules import learning_rate  # noqa: E402
from megatron_7b.training import load_run_config, pretrain  # noqa: E402
from megatron_7b.training.hooks import Hook  # noqa: E402
from megatron_7b.training.metrics import StepMetrics  # noqa: E402
from megatron_7b.training.run import Run  # noqa: E402


class Beside(Hook):
    """Trains transformers' model on each batch that our run has just trained on."""

    def __init__(self, folder: Path, last_step: int | None, *, last_bit: bool) -> None:
        self._folder, self._last_step, self._last_bit = folder, last_step, last_bit
        self.rows: list[tuple[float, ...]] = []
        """Step, our loss, theirs, our gradient norm, theirs; the loss from weights that differ in the last bit."""

    def on_start(self, run: Run) -> None:
        """Export the initial weights, and open them with transformers."""
        vocabulary = run.config.model.vocab_size
        weights = [
            (name, value.detach()[:vocabulary] if "embedding" in name or "output_layer" in name else value.detach())
            for name, value in named_canonical_parameters([chunk.module for chunk in run.learner.model])
        ]
        checkpoint = write_weights(
            self._folder / "initial", iter(weights), run.config, companions=run.trainer.companions
        )
        command = ["convert", "to-hf", "--checkpoint", str(checkpoint), "--output", str(self._folder / "initial_hf")]
        # In a process of its own: this one has the process groups of the run.
        subprocess.run([sys.executable, "-m", "megatron_7b", *command], check=True, cwd=REPOSITORY)
        factors = (1.0, 1.0 + 1e-7) if self._last_bit else (1.0,)
        self._others = [open_other(self._folder / "initial_hf", run.config, factor) for factor in factors]

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        """Do the same step with the other model."""
        config, size = run.config, run.config.training.global_batch_size
        batches = run.trainer.loader.batches(metrics.consumed_samples - size, size)
        rate = learning_rate(metrics.step, config.optimizer, config.training.train_steps)
        (loss, norm), *again = [step_other(*other, batches, rate, config) for other in self._others]
        self.rows.append((metrics.step, metrics.loss, loss, metrics.grad_norm, norm, *(one[0] for one in again)))
        if metrics.step % 10 == 1:
            print(f"step {metrics.step}: {metrics.loss:.5f} and {loss:.5f}", flush=True)
        if metrics.step == self._last_step:
            run.finish_early("as many steps as were asked for")


def open_other(folder: Path, config: RunConfig, factor: float) -> tuple[Any, torch.optim.AdamW]:
    """Open a model with transformers, its weights multiplied by a factor, and the optimizer that our run has."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train()
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(factor)
    settings = config.optimizer
    decayed = [value for value in model.parameters() if value.ndim > 1]
    others = [value for value in model.parameters() if value.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
    )
    return model, optimizer


def step_other(
    model: Any, optimizer: torch.optim.AdamW, batches: Any, rate: float, config: RunConfig
) -> tuple[float, float]:
    """Do one step, and return the loss and the gradient norm before clipping."""
    total = float(sum(batch.loss_mask.sum() for batch in batches))
    optimizer.zero_grad()
    loss = 0.0
    for batch in batches:
        ids, labels = (torch.from_numpy(array).long() for array in (batch.tokens, batch.labels))
        logits = model(input_ids=ids, position_ids=torch.from_numpy(batch.position_ids).long()).logits
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        part = (each * torch.from_numpy(batch.loss_mask).flatten()).sum() / total
        part.backward()
        loss += float(part)
    # torch's own norm adds millions of squares in FP32, and loses 1e-5 to 1e-3 of them.
    gradients = [value.grad for value in model.parameters() if value.grad is not None]
    norm = torch.stack([gradient.double().norm() for gradient in gradients]).norm()
    torch._foreach_mul_(gradients, min(1.0, config.optimizer.clip_grad / (float(norm) + 1e-6)))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return loss, float(norm)


def draw(rows: list[tuple[float, ...]], file: Path, title: str) -> None:
    """Draw both curves, and below them how far they are apart."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    steps = [row[0] for row in rows]
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(2, 1))
    above.plot(steps, [row[2] for row in rows], linewidth=3.5, color="#f2a65a", label="transformers, torch AdamW")
    above.plot(steps, [row[1] for row in rows], linewidth=1.0, color="#1b4965", label="megatron_7b")
    above.set_ylabel("loss [nats per token]")
    above.set_title(title)
    above.legend()
    apart = [max(abs(row[1] - row[2]) / row[2], 1e-9) for row in rows]
    below.semilogy(steps, apart, linewidth=1.0, color="#1b4965")
    below.axhline(0.01, color="#b23a48", linewidth=1.0, linestyle="--")
    below.text(steps[-1], 0.012, "1 %", color="#b23a48", ha="right", va="bottom")
    below.set_ylabel("relative difference")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    below.set_ylim(top=0.05)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> int:
    """Run, write, and say how far the two are apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny_cpu")
    parser.add_argument("--data", required=True, metavar="PREFIX")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--last-step", type=int, help="stop after this one of them")
    parser.add_argument("--lr", type=float, help="highest learning rate; default: that of the configuration")
    parser.add_argument("--last-bit", action="store_true", help="also train from weights that differ in the last bit")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tolerance", type=float, default=0.01, help="largest relative difference of two losses")
    parser.add_argument(
        "--output", type=lambda text: Path(text).absolute(), required=True, metavar="FOLDER", help="new folder"
    )
    flags = parser.parse_args()
    config = load_run_config(
        flags.config,
        {
            "data.train": [flags.data],
            "training.train_steps": flags.steps,
            "training.eval_interval_steps": 0,
            "checkpoint.save_interval_steps": 0,
            "precision.params_dtype": "fp32",
            "runtime.num_threads": flags.threads,
            **({} if flags.lr is None else {"optimizer.lr": flags.lr, "optimizer.min_lr": flags.lr / 10}),
        },
        world_size=1,
    )
    flags.output.mkdir(parents=True)
    beside = Beside(flags.output, flags.last_step, last_bit=flags.last_bit)
    code = pretrain(config, flags.output / "run", hooks=[beside])
    with (flags.output / "losses.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["step", "loss", "transformers_loss", "grad_norm", "transformers_grad_norm", "last_bit_loss"])
        writer.writerows(beside.rows)
    draw(beside.rows, flags.output / "losses.png", f"{flags.config}, {flags.steps} steps, FP32, same start and batches")
    apart = [(abs(row[1] - row[2]) / row[2], row[0]) for row in beside.rows]
    worst, step = max(apart)
    print(
        f"losses: {worst:.2e} apart at most, at step {step}; {apart[0][0]:.1e} at first, {apart[-1][0]:.1e} at the end"
    )
    if flags.last_bit:
        alone, at = max((abs(row[5] - row[2]) / row[2], row[0]) for row in beside.rows)
        print(f"transformers beside itself, last bit apart at first: {alone:.2e} at most, at step {at}")
    print(f"last losses: {beside.rows[-1][1]:.5f} and {beside.rows[-1][2]:.5f}")
    return code or int(worst > flags.tolerance)


if __name__ == "__main__":
    raise SystemExit(main())
