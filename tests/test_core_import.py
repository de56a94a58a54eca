"""megatron-core loads without torch's compiler; what it would have compiled at once is compiled when first called."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from megatron_7b import core_import

COMPILER = ("torch._dynamo", "torch._inductor.compile_fx")


def loaded_after(statements: str) -> list[str]:
    """Return which parts of the compiler a fresh interpreter has loaded after some statements."""
    report = f"import sys; print([name for name in {COMPILER} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{statements}; {report}"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return [name for name in COMPILER if name in result.stdout]


def test_a_model_on_a_cpu_needs_no_compiler() -> None:
    used = "import megatron_7b, megatron.core; from megatron_7b.runtime.cpu import backend; backend.install()"
    call = "from megatron.core.fusions.fused_bias_swiglu import swiglu; import torch; swiglu(torch.ones(2, 4))"
    assert loaded_after(f"{used}; {call}") == []
    assert loaded_after("import megatron.core"), "megatron-core no longer loads the compiler: core_import can go"


@pytest.fixture
def compiles() -> Iterator[list[dict[str, Any]]]:
    """Return a list for the options of each compilation; afterwards functions are compiled, or not, as before."""
    before = core_import.is_uncompiled()
    yield []
    core_import.call_uncompiled(before)


def test_a_function_is_compiled_when_first_called(compiles: list[dict[str, Any]]) -> None:
    def compile_now(function: Callable[[int], int], **options: Any) -> Callable[[int], int]:
        compiles.append(options)
        return lambda number: function(number) + 100

    decorate = core_import.compile_when_called(compile_now)

    @decorate
    def plain(number: int) -> int:
        return number

    @decorate(dynamic=True)
    def with_options(number: int) -> int:
        return -number

    assert not compiles
    core_import.call_uncompiled(True)
    assert (plain(1), with_options(1), compiles) == (1, -1, [])
    core_import.call_uncompiled(False)
    assert [plain(1), plain(2), with_options(1)] == [101, 102, 99]
    assert compiles == [{}, {"dynamic": True}]
    assert plain.__name__ == "plain"
