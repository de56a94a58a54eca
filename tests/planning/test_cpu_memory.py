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
def test_a_real_run_holds_what_is_said(tmp_path) -> None:
    tool = runpy.run_path(str(REPOSITORY / "tools" / "benchmarks" / "plan_memory.py"))
    case = next(case for case in tool["CASES"] if case.name == "tiny_cpu")
    measured, predicted = tool["measure"](case, tmp_path), tool["predicted"](case)
    assert predicted == pytest.approx(measured, rel=0.05)


def test_every_run_of_the_page_is_a_run(tmp_path) -> None:
    """Their configurations load, and the checks of a run have nothing against them."""
    from megatron_7b.config import check_config

    tool = runpy.run_path(str(REPOSITORY / "tools" / "benchmarks" / "plan_memory.py"))
    for case in tool["CASES"]:
        check_config(case.config(), world_size=case.ranks)
        assert tool["predicted"](case) > 430e6
