"""`pretrain` before the training itself: mistakes."""

import json
import shlex
import subprocess
import sys

import pytest

from megatron_7b.cli.main import main
from tests.support.assets import REPOSITORY

TINY = shlex.split("""
    --model.num-layers 2 --model.hidden-size 32 --model.ffn-hidden-size 64 --model.num-attention-heads 2
    --data.seq-length 32 --data.split 1 --training.micro-batch-size 1 --training.global-batch-size 2
    --precision.params-dtype fp32 --parallel.tensor-model-parallel-size 2 --telemetry.tensorboard False
    --telemetry.plot False
""")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": f"Line {number} of a small corpus. " * 20}) for number in range(50)]
    (folder / "c.jsonl").write_text("\n".join(lines))
    flags = ["--output-prefix", folder / "c", "--tokenizer-model", "bytes", "--append-eod"]
    assert main(["preprocess", "--input", *map(str, (folder / "c.jsonl", *flags))]) == 0
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
        ("--telemetry.profile-steps 1 --telemetry.profile-ranks 5", "there is no rank 5: ranks are 0 to 1"),
    ],
)
def test_flags_of_the_launch_that_contradict_each_other(tmp_path, corpus, flags, words, capsys):
    arguments = ["--run-dir", str(tmp_path / "R"), "--data.train", str(corpus), *TINY, *flags.split()]
    assert main(["pretrain", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "R").exists()
