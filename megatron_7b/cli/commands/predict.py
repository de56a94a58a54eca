"""`megatron-7b predict`: labels, tags or answers for new data, by a checkpoint with a head.

    megatron-7b predict --checkpoint RUN --input F.jsonl --output G.jsonl
    tail -f texts.jsonl | megatron-7b predict --checkpoint RUN --input - --output -

Each line of the output is that of the input with "prediction" added. An interrupted command, started again, continues.
"""

import os

from megatron_7b.cli.checkpoint_command import CheckpointCommand, checkpoint_parser
from megatron_7b.cli.options import Parser, parse_arguments
from megatron_7b.cli.progress import LineProgress
from megatron_7b.errors import ConfigError
from megatron_7b.prediction.files import STREAM, PredictionJob, plan_job, run_job
from megatron_7b.prediction.predicting import prediction_setup
from megatron_7b.runtime.process.logs import configure_logging
from megatron_7b.runtime.process.terminal import say

SUMMARY = "label texts and words, or answer questions, with a checkpoint"


def main(argv: list[str]) -> int:
    """Run the command; returns 0 when every line has its prediction.

    Raises:
        MegatronError: Before any model is built where possible.
    """
    command = CheckpointCommand.read(parse_arguments(_parser(), argv))
    flags = command.command_line.flags
    if flags.input == STREAM and command.world_size > 1:
        raise ConfigError("--input - reads a stream on one rank", hint="give a file, or leave out --nproc")
    setup = prediction_setup(command.folder, command.config)
    rank = int(os.environ.get("RANK", "0"))
    job = PredictionJob(flags.input, flags.output, None, 0)
    if rank == 0:
        job = plan_job(setup, flags.input, flags.output, overwrite=flags.overwrite)
    if not command.runs_here:
        return command.launch("predict", argv)
    configure_logging(rank)  # before libraries are imported that warn while they load
    if job.done:
        say(f"{flags.output}: continuing after {job.done:,} lines")
    line = LineProgress("lines", begin=job.done)
    done = run_job(job, setup, fp32_on_cpu=command.fp32_on_cpu, report=lambda now: line.update(now.done, now.total))
    if rank == 0 and flags.output != STREAM:
        say(f"{flags.output}: {done:,} lines with predictions")
    return 0


def _parser() -> Parser:
    parser = checkpoint_parser("predict", SUMMARY)
    parser.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help='JSONL: "text" and perhaps "text_pair", "tokens", or "question" and "context"; - reads standard input',
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help='the same lines with "prediction" added; - prints them'
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output, or begin it again")
    return parser
