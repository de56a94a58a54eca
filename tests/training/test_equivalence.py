"""`megatron-7b parity`: layouts that agree, and faults that are planted in one of them, which it names."""

import dataclasses
import importlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.training.equivalence import (
    FP32,
    Comparison,
    compare_recordings,
    measure_rounding,
    read_layouts,
    record_steps,
)
from megatron_7b.training.equivalence.comparing import TIMES_ITS_ERROR
from megatron_7b.training.equivalence.recording import RecordedStep, Shard, file_of
from tests.support.commands import run_command
from tests.support.ranks import run_ranks
from tests.training import runs

STEPS = 2


def record(config: RunConfig, folder: Path, fault: str | None, from_rounded: bool = False) -> None:
    """Entry point of a rank: record steps, with a fault if one is wanted."""
    if fault in SCALES:
        scale_layers(SCALES[fault])
    elif fault is not None:
        FAULTS[fault]()
    record_steps(config, folder, STEPS, from_rounded=from_rounded)


def do_not_sum_norms() -> None:
    finalizing = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    finalizing._allreduce_non_tensor_model_parallel_grads = lambda *_, **__: None  # type: ignore[attr-defined]


def learn_differently() -> None:
    import torch.distributed as dist

    from megatron_7b.optim.optimizer import Optimizer

    step = Optimizer.step
    Optimizer.step = lambda self, rate: step(self, rate * (1 + dist.get_rank()))  # type: ignore[method-assign]


def scale_layers(scale: float) -> None:
    from megatron.core.transformer.mlp import MLP

    forward = MLP.forward

    def scaled(self: Any, *arguments: Any, **named: Any) -> Any:
        output, bias = forward(self, *arguments, **named)
        return output * scale, bias

    MLP.forward = scaled


def scale_gradient_of_attention() -> None:
    from megatron.core.transformer.attention import Attention

    forward = Attention.forward

    def attended(self: Any, *arguments: Any, **named: Any) -> Any:
        output, bias = forward(self, *arguments, **named)
        output.register_hook(lambda gradient: 1.5 * gradient)
        return output, bias

    Attention.forward = attended


def keep_gradients_of_keys() -> None:
    from megatron_7b.model import local_layers

    gather = local_layers.gather_sequence

    def gathered(share: Any, group: Any) -> Any:
        own = share.detach().requires_grad_()
        return gather(own, group).detach() + 0.0 * gather(share, group)

    local_layers.gather_sequence = gathered  # type: ignore[attr-defined]


def do_not_average_experts() -> None:
    from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel

    build = DistributedDataParallel.__init__

    def built(self: Any, *arguments: Any, **named: Any) -> None:
        build(self, *arguments, **named)
        assert self.expert_parallel_buffers
        for group in self.expert_parallel_bucket_groups:
            for bucket in group.buckets:
                bucket.gradient_scaling_factor *= 2.0

    DistributedDataParallel.__init__ = built  # type: ignore[method-assign]


FAULTS = {
    "norms are not summed": do_not_sum_norms,
    "replicas learn differently": learn_differently,
    "attention is given another gradient": scale_gradient_of_attention,
    "keys learn from their own rank only": keep_gradients_of_keys,
    "experts are not averaged": do_not_average_experts,
}
SCALES = {"a layer computes something else": 30.0, "a layer computes a little else": 1.05}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return runs.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def one_rank(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    run_ranks(1, record, runs.config(corpus), folder, None)
    return folder


def beside_one_rank(
    one_rank: Path, corpus: str, folder: Path, parallel: dict[str, Any], *, ranks: int = 2, fault: str | None = None
) -> Comparison:
    run_ranks(ranks, record, runs.config(corpus, parallel=parallel), folder, fault)
    return compare_recordings(
        one_rank, folder, STEPS, reference_ranks=1, other_ranks=ranks, band=FP32
    )  # fmt: skip


TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("parallel", "ranks"),
    [
        (TP2_SP, 2),
        ({"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}, 2),
        ({"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2}, 4),
    ],
)
def test_layouts_agree(one_rank: Path, corpus: str, tmp_path: Path, parallel: dict[str, Any], ranks: int) -> None:
    found = beside_one_rank(one_rank, corpus, tmp_path, parallel, ranks=ranks)
    assert found.agrees, found.first
    assert found.largest["initial weight"].distance == 0.0
    assert 0 < found.largest["gradient"].distance < 1e-5


def test_gradients_that_are_not_summed_are_named(one_rank: Path, corpus: str, tmp_path: Path) -> None:
    """Each tensor rank has a part of the sequence, and sees a part of the gradient of what all of them hold."""
    found = beside_one_rank(one_rank, corpus, tmp_path, TP2_SP, fault="norms are not summed")
    assert found.first is not None
    assert (found.first.step, found.first.what) == (1, "gradient")
    assert found.first.name == "decoder.final_norm.weight"
    assert found.first.distance > 0.1
    assert all("norm" in one.name for one in found.others)
    assert "step 1: gradient of decoder.final_norm.weight (rank" in str(found.first)


def test_what_a_step_computes_first_is_named(one_rank: Path, corpus: str, tmp_path: Path) -> None:
    """In the backward pass the output of attention comes before queries and keys, which are registered after it."""
    found = beside_one_rank(one_rank, corpus, tmp_path, TP2_SP, fault="attention is given another gradient")
    assert found.first is not None
    assert (found.first.step, found.first.what) == (1, "gradient")
    assert found.first.name == "decoder.layers.1.self_attention.linear_proj.weight"
    assert found.first.distance == pytest.approx(0.5, rel=1e-3)


def test_replicas_that_drift_apart_are_named(one_rank: Path, corpus: str, tmp_path: Path) -> None:
    found = beside_one_rank(one_rank, corpus, tmp_path, {}, fault="replicas learn differently")
    assert found.first is not None
    assert (found.first.step, found.first.what, found.first.rank) == (1, "weight", 1)
    assert found.largest["gradient"].step == 2


def test_another_forward_pass_is_seen_in_the_loss(one_rank: Path, corpus: str, tmp_path: Path) -> None:
    found = beside_one_rank(one_rank, corpus, tmp_path, TP2_SP, fault="a layer computes something else")
    assert found.first is not None
    assert found.first_parameter is not None
    assert (found.first.step, found.first.what) == (1, "loss")
    assert (found.first_parameter.step, found.first_parameter.what) == (1, "gradient")


CP2 = {"context_parallel_size": 2}
EXPERTS = {
    "architecture": "mixtral", "num_moe_experts": 4, "moe_aux_loss_coeff": 0.01, "num_layers": 1,
}  # fmt: skip


def test_what_context_parallel_ranks_keep_to_themselves_is_named(one_rank: Path, corpus: str, tmp_path: Path) -> None:
    """The loss of the first step shows nothing; the first wrong gradient is that of the last layer's keys."""
    found = beside_one_rank(one_rank, corpus, tmp_path, CP2, fault="keys learn from their own rank only")
    assert found.first is not None
    assert found.first.step == 1
    assert found.first.what == "gradient"
    assert found.first.name == "decoder.layers.1.self_attention.linear_qkv.weight"


@pytest.mark.parametrize("fault", [None, "experts are not averaged"])
def test_experts_on_other_ranks_learn_the_same(corpus: str, tmp_path: Path, fault: str | None) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    run_ranks(1, record, runs.config(corpus, model=EXPERTS), one, None)
    run_ranks(2, record, runs.config(corpus, model=EXPERTS, parallel={"expert_model_parallel_size": 2}), two, fault)
    found = compare_recordings(one, two, STEPS, reference_ranks=1, other_ranks=2, band=FP32)
    if fault is None:
        assert found.agrees, found.first
        assert found.largest["gradient"].distance < 1e-5
        return
    assert found.first is not None
    assert (found.first.step, found.first.what) == (1, "gradient")
    assert found.first.name.startswith("decoder.layers.0.mlp.experts.")
    assert found.first.distance == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(("times", "agrees"), [(1.5, True), (2.5, False)])
def test_rounding_counts_for_the_whole_of_a_parameter(tmp_path: Path, times: float, agrees: bool) -> None:
    """A tensor rank whose part has small gradients loses more of them to rounding; so does one rank, in that part."""
    import torch

    gradient = torch.cat((torch.full((4,), 100.0), torch.ones(4)))

    def write(name: str, value: torch.Tensor, ranks: int) -> Path:
        (tmp_path / name).mkdir()
        for rank in range(ranks):
            rows = (rank * 8 // ranks, (rank + 1) * 8 // ranks)
            found, held = (Shard("weight", 0, ((rows,), None), (8,), one[slice(*rows)]) for one in (value, gradient))
            for step in range(2):
                torch.save(RecordedStep(1.0, 1.0, [found], [held]), file_of(tmp_path / name, step, rank))
        return tmp_path / name

    exact, one, two = (
        write("exact", gradient, 1),
        write("one", gradient + 0.1, 1),
        write("two", gradient - 0.1 * times, 2),
    )
    band = measure_rounding(exact, one, 1, num_ranks=1)
    found = compare_recordings(exact, two, 1, reference_ranks=1, other_ranks=2, band=band)
    assert found.largest["gradient"].distance == pytest.approx(times * 0.1 * 8**0.5 / float(gradient.norm()), rel=1e-3)
    assert found.agrees == agrees


def test_what_is_no_number_is_farthest(tmp_path: Path) -> None:
    import torch

    for name, values in (("one", (1.0, 1.0)), ("two", (math.nan, math.nan))):
        (tmp_path / name).mkdir()
        held = Shard("weight", 0, (((0, 2),), None), (2,), torch.ones(2))
        for step, value in enumerate((1.0, *values)):
            found = dataclasses.replace(held, value=torch.full((2,), value))
            torch.save(RecordedStep(value, 1.0, [found], [held]), file_of(tmp_path / name, step, 0))
    compared = compare_recordings(tmp_path / "one", tmp_path / "two", 2, reference_ranks=1, other_ranks=1, band=FP32)
    assert str(compared.first) == "step 1: loss is not a number"
    assert str(compared.first_parameter) == "step 1: gradient of weight (rank 0) is not a number"
    assert [compared.largest[what].step for what in ("loss", "gradient")] == [1, 1]
    assert math.isnan(compared.nearest_to_bound.distance)


@pytest.mark.parametrize("fault", [None, "a layer computes a little else"])
def test_bf16_is_measured_by_its_own_rounding(corpus: str, tmp_path: Path, fault: str | None) -> None:
    """Other layouts may be twice as far from FP32 as one rank, which a layer that is 5 % off is not."""
    exact, one, two = (tmp_path / name for name in ("exact", "one", "two"))
    for folder in (exact, one, two):
        folder.mkdir()
    rounded = {"params_dtype": "bf16"}
    run_ranks(1, record, runs.config(corpus), exact, None, True)
    run_ranks(1, record, runs.config(corpus, precision=rounded), one, None)
    run_ranks(2, record, runs.config(corpus, precision=rounded, parallel=TP2_SP), two, fault)
    band = measure_rounding(exact, one, STEPS, num_ranks=1)
    itself = compare_recordings(exact, one, STEPS, reference_ranks=1, other_ranks=1, band=band)
    assert itself.nearest_to_bound.share_of_bound == 1 / TIMES_ITS_ERROR
    assert itself.largest["initial weight"].distance == 0.0
    assert 2**-9 < itself.largest["gradient"].distance < 2**-4
    found = compare_recordings(exact, two, STEPS, reference_ranks=1, other_ranks=2, band=band)
    assert found.agrees == (fault is None), found.first


def test_layouts_are_read_and_checked() -> None:
    said: list[tuple[dict[str, object], int]] = []

    def load(values: Any, world_size: int) -> RunConfig:
        said.append((dict(values), world_size))
        return RunConfig()

    with pytest.raises(ConfigError) as caught:
        read_layouts(["tp=2 pp=2", "tp=0", "tq=1", "tp=1 tp=2", "recompute=some"], load)
    for words in ("'tp=0': tp is '0'", "'tq' is unknown, expected tp", "tp is there twice", "expected one of none"):
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match="at least two"):
        read_layouts(["tp=1"], load)
    said.clear()
    layouts = read_layouts(["tp=2, sp zero1 dp=2 recompute=full", "pp=1"], load)
    assert [layout.world_size for layout in layouts] == [1, 4]
    values = said[0][0]
    assert values["parallel.sequence_parallel"] is True
    assert values["parallel.use_distributed_optimizer"] is True
    assert values["parallel.recompute_granularity"] == "full"
    assert values["parallel.overlap_grad_reduce"] is False
    said.clear()
    read_layouts(["tp=1", "pp=2 stages=3+1"], load)
    assert said[1][0]["parallel.pipeline_model_parallel_layout"] == (3, 1)
    with pytest.raises(ConfigError, match=r"stages is '', expected a number of at least 1, such as stages=3\+1"):
        read_layouts(["tp=1", "pp=2 stages=3+"], load)


SMALL = (
    *("--config", "tiny_cpu", "--model.num-layers", 2, "--model.hidden-size", 32, "--model.ffn-hidden-size", 48),
    *("--model.num-attention-heads", 4, "--data.seq-length", 32, "--training.micro-batch-size", 2),
    *("--training.global-batch-size", 4, "--runtime.num-threads", 1, "--steps", 1),
)


def test_the_command_generates_data_and_compares(tmp_path: Path) -> None:
    done = run_command(
        "parity", *SMALL, "--layout", "tp=2 sp", "--layout", "tp=1", "--folder", tmp_path, "--json"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["agrees"], said["reference"], said["precision"]) == (True, "tp=1", "fp32")
    assert said["layouts"][0]["layout"] == "tp=2 sp"
    assert said["layouts"][0]["first"] is None
    assert list(tmp_path.iterdir()) == []


def test_what_is_recomputed_and_uneven_stages_are_compared(tmp_path: Path) -> None:
    """Modules are an option beside the layouts, and one of those layouts only that recompute some."""
    done = run_command(
        "parity", *SMALL, "--model.num-layers", 3, "--parallel.recompute-modules", "mlp",
        *("--folder", tmp_path, "--json"),
        *("--layout", "tp=1", "--layout", "recompute=selective", "--layout", "pp=2 stages=2+1"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    recomputed, uneven = json.loads(done.stdout.splitlines()[-1])["layouts"]
    assert (recomputed["layout"], uneven["layout"]) == ("recompute=selective", "pp=2 stages=2+1")
    assert recomputed["largest"]["gradient"]["distance"] == 0.0


def test_the_command_compares_experts_and_sequences_in_bf16(tmp_path: Path) -> None:
    arguments = ["--model.architecture", "mixtral", "--model.num-moe-experts", 4]
    done = run_command(
        "parity", *SMALL, *arguments, "--precision.params-dtype", "bf16", "--layout", "ep=2 cp=2", "--layout", "tp=1",
        "--folder", tmp_path, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert [layout["layout"] for layout in said["layouts"]] == ["tp=1", "ep=2 cp=2"]
    assert said["layouts"][0]["times_error"] == 1.0
    assert 0 < said["layouts"][1]["times_error"] < 2.0


def test_the_command_names_what_is_broken(tmp_path: Path) -> None:
    """A start-up file of Python's breaks the ranks of any command that finds it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('WORLD_SIZE') == '2':\n"
        "    from megatron_7b.runtime.cpu import backend\n    backend.install()\n"
        "    import importlib\n"
        "    finalizing = importlib.import_module('megatron.core.distributed.finalize_model_grads')\n"
        "    finalizing._allreduce_non_tensor_model_parallel_grads = lambda *_, **__: None\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"}
    done = run_command("parity", *SMALL, "--layout", "tp=2 sp", "--layout", "tp=1", "--json", environment=environment)
    assert done.returncode == 1, done.stderr
    first = json.loads(done.stdout.splitlines()[-1])["layouts"][0]["first"]
    assert (first["step"], first["what"], first["name"]) == (1, "gradient", "decoder.final_norm.weight")
    assert "parts from 'tp=1' at step 1: gradient of decoder.final_norm.weight" in done.stdout


def test_what_failed_ranks_have_said_stays(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('RANK') == '1':\n    raise SystemExit('this rank does not start')\n"
    )
    folder = tmp_path / "recorded"
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"}
    done = run_command(
        "parity", *SMALL, "--layout", "tp=2", "--layout", "tp=1", "--folder", folder, environment=environment
    )  # fmt: skip
    assert done.returncode == 1
    (logs,) = folder.iterdir()
    assert f"the other ranks' output is in {logs}" in done.stderr
    assert "this rank does not start" in (logs / "rank_00001.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layout", "tp=3", "--layout", "tp=1"], "layout 'tp=3'"),
        (["--layout", "tp=2"], "there are 1 layouts"),
        (["--layout", "tp=2", "--layout", "tp=1", "--steps", "0"], "--steps is 0"),
        (["--layout", "tp=2", "--layout", "tp=1", "--folder", "/nowhere"], "--folder is /nowhere"),
        (
            ["--layout", "tp=2", "--layout", "tp=1", "--parallel.sequence-parallel", "True"],
            "parallel.sequence_parallel is what layouts say",
        ),
        (["--layout", "tp=2", "--layout", "tp=1", "--objective.name", "masked"], "data.train is empty"),
    ],
)
def test_mistakes_are_told_before_anything_starts(arguments: list[str], words: str) -> None:
    done = run_command("parity", *SMALL[:-2], *arguments)
    assert done.returncode == 2
    assert words in done.stderr
