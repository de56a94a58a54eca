"""What memory is held for: measured as it is predicted, with whatever shares storage counted once."""

import pytest

from megatron_7b.config.schema import RunConfig
from megatron_7b.training.memory_report import MemoryReport
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import build, run_steps, tiny_config

LAYOUTS = {
    "one rank": (1, {}, "fp32"),
    "PP2xDP2, sharded": (4, {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": True}, "bf16"),
}


def report(config: RunConfig) -> tuple[MemoryReport, MemoryReport]:
    """Entry point of a rank: two reports of it, the first after a step."""
    from megatron_7b.training.agreement import Ranks
    from megatron_7b.training.memory_report import MemoryKinds

    learner = build(config)
    run_steps(learner, range(1))
    kinds = MemoryKinds(learner, Ranks(learner.device))
    return kinds.report(), kinds.report()


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_held_is_what_was_predicted(name: str) -> None:
    world_size, parallel, dtype = LAYOUTS[name]
    reports = run_ranks(world_size, report, tiny_config(parallel=parallel, precision={"params_dtype": dtype}))
    first, second = reports[0]
    assert all(one == reports[0] for one in reports)
    assert second.kinds == {**first.kinds, "activations": pytest.approx(first.kinds["activations"], rel=0.1)}
    assert second.predicted == {}
    for kind in ("parameters", "gradients", "optimizer"):  # with a distributed optimizer, buffers are padded
        assert first.predicted[kind] <= first.kinds[kind] <= 1.05 * first.predicted[kind] + 2000
    assert first.kinds["activations"] > first.predicted["activations"] > 0
    assert first.kinds["before"] > 50e6
    assert "reserved" not in first.kinds
    assert second.values.keys() == {f"{kind}_bytes" for kind in first.kinds}


def test_a_report_in_words() -> None:
    kinds = {"parameters": 6_197_760, "activations": 46_427_540, "before": 787_468_288}
    words = str(MemoryReport(kinds, {"parameters": 6_197_760, "activations": 524_288}))
    assert words == (
        "parameters 6.2 MB (predicted: 6.2 MB), activations 46.4 MB (predicted: 524 kB), "
        "and 787 MB before the model was built"
    )
