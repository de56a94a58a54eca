"""The benchmark of a training step on machines that are not the one it was written on."""

import runpy
import sys

import pytest

from tests.support.assets import REPOSITORY

benchmark = runpy.run_path(str(REPOSITORY / "tools" / "benchmarks" / "train_step.py"), run_name="benchmark")
choose, contenders = benchmark["choose_contenders"], list(benchmark["CONTENDERS"])
IN_BF16 = ["megatron_7b, bf16", "transformers, bf16 autocast"]


def test_what_the_processor_emulates_is_left_out_with_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert choose(None, native_bf16=True, emulated=False) == contenders
    assert capsys.readouterr().err == ""
    assert choose(None, native_bf16=False, emulated=False) == [name for name in contenders if name not in IN_BF16]
    assert f"emulates BF16 (--emulated runs them): {'; '.join(IN_BF16)}" in capsys.readouterr().err


def test_what_is_asked_for_runs_anyway() -> None:
    assert choose(None, native_bf16=False, emulated=True) == contenders
    assert choose(IN_BF16, native_bf16=False, emulated=False) == IN_BF16


def test_without_bf16_there_is_another_baseline_and_no_rate_of_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = benchmark["compare"]
    monkeypatch.setitem(compare.__globals__, "start_worker", lambda kind, dtype, steps: MEASURED)
    monkeypatch.setitem(compare.__globals__, "matrix_product_rates", lambda formats: dict.fromkeys(formats, 100.0))
    monkeypatch.setattr(sys, "path", [str(REPOSITORY), *sys.path])
    table = compare(["megatron_7b, fp32", "transformers, fp32"], 2, 1, uses_bf16=False)
    assert "of the FP32 rate | ratio to transformers, fp32 (min–max)" in table
    assert "BF16" not in table
    assert table.count("1.00 (1.00–1.00)") == 2
    assert capsys.readouterr().err.count("run ") == 4


MEASURED = {"tokens_per_second": 360.0, "loss": 1.0, "peak_memory_gb": 1.0}
