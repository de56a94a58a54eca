"""Plans are as close to what was measured as their page says."""

import runpy

import pytest

from tests.support.assets import REPOSITORY

_TOOL = runpy.run_path(str(REPOSITORY / "tools" / "benchmarks" / "plan_errors.py"))
RUNS = _TOOL["RUNS"]


@pytest.mark.parametrize("run", RUNS, ids=[run.name for run in RUNS])
def test_speed_is_as_close_as_the_page_says(run) -> None:
    predicted = run.predicted().tokens_per_second_per_gpu
    assert predicted == pytest.approx(run.tokens_per_second, rel=0.1 if run.is_fitted else 0.2)


def test_most_runs_that_nothing_was_fitted_to_are_within_a_tenth() -> None:
    held_out = [run for run in RUNS if not run.is_fitted]
    errors = sorted(abs(run.predicted().tokens_per_second_per_gpu / run.tokens_per_second - 1) for run in held_out)
    assert errors[len(errors) // 2] < 0.1


def test_memory_of_the_runs_that_reported_it_is_right_to_three_percent() -> None:
    for run in RUNS:
        if run.memory_gb is not None:
            memory = run.predicted().memory
            assert (memory.total - memory.nccl - memory.context) / 1e9 == pytest.approx(run.memory_gb, rel=0.03)


def test_the_page_has_this_table() -> None:
    page = (REPOSITORY / "docs" / "planning.md").read_text(encoding="utf-8")
    for line in [*_TOOL["table"](), *_TOOL["memory_table"]()]:
        assert line in page, "run tools/benchmarks/plan_errors.py, and put what it prints into docs/planning.md"
