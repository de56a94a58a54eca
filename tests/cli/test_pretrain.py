"""`pretrain` before and around the training itself: mistakes, the launcher, signals, resume."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests.support.assets import REPOSITORY

TINY = shlex.split("""
    --model.num-layers 2 --model.hidden-size 32 --model.ffn-hidden-size 64 --model.num-attention-heads 2
    --data.seq-length 32 --data.split 1 --training.micro-batch-size 1 --training.global-batch-size 2
    --precision.params-dtype fp32 --parallel.tensor-model-parallel-size 2 --telemetry.tensorboard False
    --telemetry.plot False
""")


def start(*arguments, **options):
    command = [sys.executable, "-m", "megatron_7b", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": f"Line {number} of a small corpus. " * 20}) for number in range(50)]
    (folder / "c.jsonl").write_text("\n".join(lines))
    flags = ["--output-prefix", folder / "c", "--tokenizer-model", "bytes", "--append-eod"]
    process = start("preprocess", "--input", folder / "c.jsonl", *flags)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return folder / "c_text_document"


def test_all_mistakes_at_once_before_torch_and_before_anything_is_written(tmp_path):
    arguments = (
        f"pretrain --config tiny_cpu --run-dir {tmp_path / 'R'} --nproc 3 --parallel.tensor-model-parallel-size 2 "
        f"--modle.num-layers 4 --optimizer.lr high --train-steps 5 --data.train {tmp_path / 'absent'}"
    ).split()
    program = (
        f"import sys\nfrom megatron_7b.cli.main import main\ncode = main({arguments!r})\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert result.returncode == 2
    assert result.stderr.startswith("error: 5 problems")
    for name in ("modle.num_layers", "optimizer.lr", "--train-steps", "number of ranks = 3", "data.train"):
        assert name in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--nproc 0", "--nproc 0 must be at least 1"),
        ("--nnodes 2", "needs --nproc"),
        ("--nnodes 2 --nproc 2", "needs --master-port"),
        ("--nnodes 2 --nproc 2 --master-port 1 --node-rank 2", "--node-rank 2"),
    ],
)
def test_flags_of_the_launch_that_contradict_each_other(tmp_path, corpus, flags, words):
    process = start("pretrain", "--run-dir", tmp_path / "R", "--data.train", corpus, *TINY, *flags.split())
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert words in errors


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, corpus):
    """Two ranks under our launcher, whose number follows from the layout; SIGUSR1 leaves with 75."""
    run_dir = tmp_path / "R"
    command = ["pretrain", "--run-dir", run_dir, "--data.train", corpus, *TINY, "--training.train-steps"]
    process = start(*command, 100_000)
    deadline = time.monotonic() + 200
    while not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").read_text().count("\n"):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    done = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    process = start(*command, done + 1)
    _, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, done + 2))
