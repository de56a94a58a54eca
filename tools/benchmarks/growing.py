#!/usr/bin/env python3
"""Grown models against the same models from scratch: validation losses over tokens and over FLOPs, on a CPU.

    tools/fetch_sotu.py sotu.jsonl
    python tools/benchmarks/growing.py sotu.jsonl --output grown --picture docs/growing.png

A small model is trained, then grown in depth (by preserving copies, and by stacking) and in width, and each is trained
further, beside one of the same size from scratch. The learning rate is constant after its warm-up, so that every point
of a curve is what a run of that length would have reached. Grown models read other samples than the small one did.
All curves are read from what `megatron-7b` commands have written, so an interrupted run of this script continues.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from megatron_7b.config import ModelConfig, load_config  # noqa: E402  # after the path is set, for a checkout without an install
from megatron_7b.model.sizes import count_parameters, flops_per_token  # noqa: E402

VOCAB_SIZE, SEQ_LENGTH, BATCH = 2048, 128, 16
TOKENS_PER_STEP = SEQ_LENGTH * BATCH
EVERY = 25
"""Steps between validations."""
SMALL = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 172, "num_attention_heads": 4}
DEEP = {**SMALL, "num_layers": 8}
WIDE = {**SMALL, "hidden_size": 128, "ffn_hidden_size": 344, "num_attention_heads": 8}


@dataclass(frozen=True)
class Contender:
    """A large model.

    Attributes:
        name: In table and picture.
        shape: Its model section.
        growth: Options of `convert grow`; None starts from random weights.
    """

    name: str
    shape: dict[str, int]
    growth: tuple[str, ...] | None = None


GROUPS = {
    "depth 4 to 8": (
        Contender("from scratch", DEEP),
        Contender("stacked", DEEP, ("--num-layers", "8", "--method", "stack")),
        Contender("preserving copies", DEEP, ("--num-layers", "8")),
    ),
    "width 64 to 128": (
        Contender("from scratch", WIDE),
        Contender("preserving copies", WIDE, ("--hidden-size", "128", "--ffn-hidden-size", "344")),
    ),
}


@dataclass(frozen=True)
class Curve:
    """Validation losses of one run.

    Attributes:
        steps: Of this run alone.
        losses: Mean loss of the next token.
    """

    steps: list[int]
    losses: list[float]

    def at(self, step: float) -> float:
        """Return the loss at a step, between two validations on a straight line."""
        after = next(index for index, own in enumerate(self.steps) if own >= step)
        if self.steps[after] == step or after == 0:
            return self.losses[after]
        share = (step - self.steps[after - 1]) / (self.steps[after] - self.steps[after - 1])
        return (1 - share) * self.losses[after - 1] + share * self.losses[after]


def run(*words: object) -> None:
    """Run a `megatron-7b` command with one thread, its output to a log of its own."""
    command = [sys.executable, "-m", "megatron_7b", *map(str, words)]
    print("$ megatron-7b", *map(str, words), file=sys.stderr, flush=True)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"growing: {done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    for line in done.stdout.splitlines():
        if line.startswith(("parity", "changed", "loss")):
            print(line, file=sys.stderr, flush=True)


def prepare(text: Path, folder: Path) -> Path:
    """Train a tokenizer and write the corpus; return its prefix."""
    tokenizer, prefix = folder / "tokenizer", folder / "corpus"
    if not Path(f"{prefix}_text_document.idx").exists():
        run("tokenizer", "train", "--input", text, "--vocab-size", VOCAB_SIZE, "--output", tokenizer)
        run(
            "preprocess", "--input", text, "--output-prefix", prefix, "--tokenizer-model", tokenizer, "--append-eod"
        )  # fmt: skip
    return Path(f"{prefix}_text_document")


def train(
    run_dir: Path, corpus: Path, shape: dict[str, int], steps: int, seed: int, start: Path | None = None
) -> Curve:
    """Train one model, or read what an earlier call has trained."""
    options = {
        **{f"model.{name}": value for name, value in shape.items()},
        "model.num_query_groups": "none", "model.max_position_embeddings": SEQ_LENGTH, "data.train": corpus,
        "data.seq_length": SEQ_LENGTH, "data.split": "95,5,0", "training.train_steps": steps, "training.seed": seed,
        "training.micro_batch_size": BATCH, "training.global_batch_size": BATCH,
        "training.eval_interval_steps": EVERY, "training.eval_steps": 8, "optimizer.lr": 2e-3,
        "optimizer.lr_decay_style": "constant", "optimizer.lr_warmup_steps": 20, "runtime.num_threads": 1,
        "precision.params_dtype": "fp32", "checkpoint.save_interval_steps": 0, "telemetry.tensorboard": False,
    }  # fmt: skip
    if start is not None:
        options["checkpoint.initialize_from"] = start
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    run("pretrain", "--config", "tiny_cpu", "--nproc", 1, "--run-dir", run_dir, *words)
    return read_curve(run_dir)


def read_curve(run_dir: Path) -> Curve:
    """Read the validation losses of a run."""
    found = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        if values.get("validation_loss") is not None:
            found[int(values["step"])] = float(values["validation_loss"])
    return Curve(list(found), list(found.values()))


def model_of(shape: dict[str, int]) -> ModelConfig:
    """Return the model of a shape."""
    settings = {f"model.{name}": value for name, value in shape.items()}
    return load_config("tiny_cpu", {**settings, "model.num_query_groups": None}).model


def flops_per_step(shape: dict[str, int]) -> float:
    """Return the FLOPs of one step of a model."""
    return TOKENS_PER_STEP * flops_per_token(model_of(shape), SEQ_LENGTH, vocab_size=VOCAB_SIZE)


def measure(text: Path, folder: Path, small_steps: int, further_steps: int) -> dict[str, dict[str, Curve]]:
    """Train everything; return the curves by group and name, the small model's in a group of its own."""
    corpus = prepare(text, folder)
    curves = {"small": {"small": train(folder / "small", corpus, SMALL, small_steps, seed=1)}}
    for group, contenders in GROUPS.items():
        curves[group] = {}
        for contender in contenders:
            name = f"{group} {contender.name}".replace(" ", "_")
            start, steps, seed = None, small_steps + further_steps, 1
            if contender.growth is not None:
                start, steps, seed = folder / f"{name}_start", further_steps, 2
                source = folder / "small" / "checkpoints" / "latest"
                if not start.exists():
                    run("convert", "grow", "--checkpoint", source, "--output", start, *contender.growth)
            curves[group][contender.name] = train(folder / name, corpus, contender.shape, steps, seed, start)
    return curves


def table(curves: dict[str, dict[str, Curve]], small_steps: int, further_steps: int) -> Iterator[str]:
    """Yield the lines of the table: each grown model against scratch, at equal tokens and at equal FLOPs."""
    yield "| grown | its loss | scratch: as many further tokens | as many FLOPs in all | as many tokens in all |"
    yield "|---|---|---|---|---|"
    for group, contenders in GROUPS.items():
        scratch = curves[group]["from scratch"]
        for contender in contenders:
            if contender.growth is None:
                continue
            paid = small_steps * flops_per_step(SMALL) / flops_per_step(contender.shape)
            equal = (further_steps, further_steps + paid, further_steps + small_steps)
            losses = " | ".join(f"{scratch.at(step):.3f} (step {step:.0f})" for step in equal)
            yield f"| {group}, {contender.name} | {curves[group][contender.name].at(further_steps):.3f} | {losses} |"


def draw(curves: dict[str, dict[str, Curve]], small_steps: int, picture: Path) -> None:
    """Draw losses over all tokens, and over all FLOPs, those of the small model included."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colors = {"from scratch": "#5b6470", "stacked": "#d1495b", "preserving copies": "#2463a8"}
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharey="row")
    small = curves["small"]["small"]
    for row, (group, contenders) in zip(panels, GROUPS.items(), strict=True):
        for axes, unit in zip(row, ("tokens", "FLOPs"), strict=True):
            scale_small = TOKENS_PER_STEP / 1e6 if unit == "tokens" else flops_per_step(SMALL) / 1e12
            axes.plot([step * scale_small for step in small.steps], small.losses, color="#b0b7bf", label="small model")
            for contender in contenders:
                curve = curves[group][contender.name]
                scale = TOKENS_PER_STEP / 1e6 if unit == "tokens" else flops_per_step(contender.shape) / 1e12
                start = 0.0 if contender.growth is None else small_steps * scale_small
                places = [start + step * scale for step in curve.steps]
                axes.plot(places, curve.losses, color=colors[contender.name], label=contender.name)
            axes.set_title(f"{group}: over all {unit}", fontsize=10)
            axes.set_xlabel("tokens, in millions" if unit == "tokens" else "FLOPs, in 10¹²")
            axes.grid(alpha=0.25)
        lowest = min(min(curve.losses) for curve in curves[group].values())
        row[0].set_ylim(lowest - 0.05, lowest + 1.6)
        row[0].set_ylabel("validation loss")
        row[0].legend(fontsize=9)
    figure.savefig(picture, dpi=110)


def main() -> None:
    """Measure, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="JSON lines with a key `text`")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--picture", type=Path, help="PNG to draw")
    parser.add_argument("--small-steps", type=int, default=300, help="steps of the small model")
    parser.add_argument("--further-steps", type=int, default=300, help="steps of each grown model")
    flags = parser.parse_args()
    flags.output.mkdir(parents=True, exist_ok=True)
    curves = measure(flags.text, flags.output, flags.small_steps, flags.further_steps)
    sizes = ", ".join(
        f"{name} {count_parameters(model_of(shape), vocab_size=VOCAB_SIZE):,}"
        for name, shape in (("small", SMALL), ("deep", DEEP), ("wide", WIDE))
    )
    print(f"parameters: {sizes}; {TOKENS_PER_STEP} tokens per step\n")
    print("\n".join(table(curves, flags.small_steps, flags.further_steps)))
    if flags.picture is not None:
        draw(curves, flags.small_steps, flags.picture)


if __name__ == "__main__":
    main()
