"""A rank on a CPU holds what a plan says, the process included, without pages of files."""

import importlib.metadata
import platform
import runpy

import pytest

from tests.support.assets import REPOSITORY

MEASURED_WITH = "2.14"
"""The release of torch whose libraries the constants are of."""


@pytest.mark.skipif(
    not importlib.metadata.version("torch").startswith(MEASURED_WITH) or platform.libc_ver()[0] != "glibc",
    reason=f"measured with torch {MEASURED_WITH} and glibc",
)
@pytest.mark.parametrize("name", ["tiny_cpu", "moe_tiny_cpu, 6 layers, BF16"])
def test_a_real_run_holds_what_is_said(name: str, tmp_path) -> None:
    tool = runpy.run_path(str(REPOSITORY / "tools" / "benchmarks" / "plan_memory.py"))
    case = next(case for case in tool["CASES"] if case.name == name)
    measured, predicted = tool["measure"](case, tmp_path), tool["predicted"](case)
    assert predicted == pytest.approx(measured, rel=0.05)


def test_only_output_layers_need_work_space() -> None:
    """The embedding's gradient goes row by row into the buffer."""
    from megatron_7b.config import load_config
    from megatron_7b.planning import memory
    from megatron_7b.planning.devices import this_processor
    from megatron_7b.planning.planner import Planner

    def beside(*, tied: bool) -> int:
        config = load_config(
            "tiny_cpu", {"model.vocab_size": 32_000, "model.share_embeddings_and_output_weights": tied}
        )
        return Planner(config, this_processor(1)).look_at(config, 1).memory.context - memory._PROCESS_BYTES

    assert beside(tied=True) == beside(tied=False) == pytest.approx(4 * 32_000 * 256, rel=0.05)


def test_every_run_of_the_page_is_a_run(tmp_path) -> None:
    """Their configurations load, and the checks of a run have nothing against them."""
    from megatron_7b.config import check_config

    tool = runpy.run_path(str(REPOSITORY / "tools" / "benchmarks" / "plan_memory.py"))
    for case in tool["CASES"]:
        check_config(case.config(), world_size=case.ranks)
        assert tool["predicted"](case) > 430e6
