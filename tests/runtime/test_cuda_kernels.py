"""The Triton kernels, run by Triton's interpreter on a CPU, against torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

SOFTMAX = """
import torch
from megatron_7b.runtime.cuda import kernels
from megatron_7b.runtime.cuda.softmax_kernel import BLOCK

assert kernels._softmax_is_right(torch.float32, "cpu")
assert kernels._softmax_is_right(torch.bfloat16, "cpu")
draw = torch.Generator().manual_seed(5)
for width, num_true in ((BLOCK, BLOCK), (BLOCK + 1, BLOCK), (2 * BLOCK + 77, BLOCK + 3), (40, 1), (40, 0)):
    logits = 30 * torch.randn(4, width, generator=draw) - 100
    factor = torch.rand(4, generator=draw)
    found = logits.clone()
    sums = kernels.softmax_(found, factor, num_true)
    right = logits[:, :num_true]
    torch.testing.assert_close(sums, right.logsumexp(dim=1))
    torch.testing.assert_close(found[:, :num_true], right.softmax(dim=1) * factor[:, None], rtol=1e-5, atol=1e-7)
    assert not found[:, num_true:].any()
"""


def run(program: str, **environment: str) -> None:
    """Run a program in a process of its own: Triton reads its environment once."""
    environment |= {"OMP_NUM_THREADS": "1", "HOME": os.environ["HOME"]}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_softmax_is_that_of_torch() -> None:
    run(SOFTMAX, TRITON_INTERPRET="1")


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from megatron_7b.runtime.cuda.softmax_kernel import BLOCK, softmax

for capability in (80, 90, 100):
    for logits in ("*bf16", "*fp32"):
        types = {"x": logits, "factor": "*fp32", "log_sum_exp": "*fp32", "width": "i32", "num_true": "i32"}
        source = ASTSource(softmax, {**types, "block": "constexpr"}, {"block": BLOCK})
        assert compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 16}).asm["cubin"]
"""


def test_softmax_compiles_for_gpus(tmp_path: Path) -> None:
    """The interpreter takes what the compiler refuses."""
    run(COMPILE, TRITON_CACHE_DIR=str(tmp_path))


def test_what_does_not_work_is_left_to_torch(caplog: pytest.LogCaptureFixture) -> None:
    from megatron_7b.runtime.cuda import kernels

    def fails() -> bool:
        raise RuntimeError("no such instruction\nat line 3")

    assert not kernels._works("a product", fails)
    assert not kernels._works("a softmax", lambda: False)
    assert kernels._works("a sum", lambda: True)
    assert [record.message for record in caplog.records] == [
        "a product is left to torch's operators: no such instruction",
        "a softmax is left to torch's operators: it gives other numbers than torch",
    ]


def test_a_cpu_has_kernels_of_its_own() -> None:
    from megatron_7b.runtime.cuda import kernels

    assert not kernels.is_supported(torch.zeros(2, 2))
    assert not kernels.adds_in_fp32(torch.zeros(2, 2, dtype=torch.bfloat16))
