"""`megatron-7b compress cache-logits`: what a teacher finds most probable, for the samples that a run will read.

megatron-7b compress cache-logits --checkpoint C --data PREFIX --output P --top-k 64 --data.seq-length 2048
megatron-7b pretrain … --data.train PREFIX --data.seq-length 2048 --distillation.cached-logits P
"""

import os
from pathlib import Path

from megatron_7b.cli.checkpoint_command import CheckpointCommand, checkpoint_parser
from megatron_7b.cli.options import Parser, parse_arguments
from megatron_7b.cli.progress import LineProgress
from megatron_7b.compression.caching import CacheOptions, cache_logits, check_cache
from megatron_7b.config.schema import DataConfig, TrainingConfig
from megatron_7b.data.samples.teacher_logits import reading_of
from megatron_7b.runtime.process.logs import configure_logging
from megatron_7b.runtime.process.terminal import say

SUMMARY = "write what a teacher finds most probable, for students that learn without it"


def main(argv: list[str]) -> int:
    """Run the command; returns 0 when the cache is complete.

    Raises:
        MegatronError: Before any model is built where possible.
    """
    command_line = parse_arguments(_parser(), argv)
    flags = command_line.flags
    # What samples are cut by is a run's default, not the teacher's, unless it is said.
    requirements = {
        "data.train": flags.data,
        "data.valid": (),
        "data.split": DataConfig.split,
        "data.seq_length": DataConfig.seq_length,
        **{f"data.{name}": value for name, value in reading_of(DataConfig()).items()},
        "training.seed": TrainingConfig.seed,
    }
    command = CheckpointCommand.read(command_line, requirements)
    options = CacheOptions(
        top_k=flags.top_k, num_samples=flags.num_samples, temperature=flags.temperature, dtype=flags.dtype
    )
    check_cache(command.folder, command.config, flags.output, options)  # mistakes are told before any rank starts
    if not command.runs_here:
        return command.launch("compress", ["cache-logits", *argv])
    rank = int(os.environ.get("RANK", "0"))
    configure_logging(rank)
    progress = LineProgress("samples")
    written = cache_logits(
        command.folder,
        command.config,
        flags.output,
        options,
        fp32_on_cpu=command.fp32_on_cpu,
        on_progress=progress.update,
    )
    if rank == 0:
        say(f"wrote     {flags.output}: {written.top_k} tokens of each prediction of {written.num_samples:,} samples")
    return 0


def _parser() -> Parser:
    parser = checkpoint_parser("compress cache-logits", SUMMARY)
    parser.add_argument("--data", nargs="+", required=True, metavar="PREFIX", help="data.train of the student's run")
    parser.add_argument("--output", type=Path, required=True, metavar="P", help="P.ids, P.logps and P.json are written")
    parser.add_argument("--top-k", type=int, default=64, help="tokens kept of each prediction")
    parser.add_argument("--num-samples", type=int, help="train_steps * global_batch_size of the run; default: an epoch")
    parser.add_argument("--temperature", type=float, default=1.0, help="distillation.temperature of the run")
    parser.add_argument("--dtype", choices=("fp16", "fp32"), default="fp16", help="of logarithms of probabilities")
    return parser
