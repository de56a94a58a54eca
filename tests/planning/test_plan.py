"""What a plan says holds together: layouts that a run accepts, sums, and what must grow or shrink does."""

import dataclasses
import itertools
import re

import pytest

from megatron_7b.config import check_config, load_config, preset_names
from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.model.memory import training_need
from megatron_7b.parallel import build_layout
from megatron_7b.planning import plan, what_would_fit
from megatron_7b.planning.counts import ModelCounts
from megatron_7b.planning.devices import GPUS, this_processor
from megatron_7b.planning.layouts import Search, layout_of
from megatron_7b.planning.memory import rank_memory
from megatron_7b.planning.planner import Candidate, Planner, is_possible

SEVEN_B = ("llama2_7b", "qwen2_5_7b", "mixtral_8x7b")


def look(name: str, overrides: dict[str, object], world_size: int, gpu: str = "h100") -> Candidate:
    config = load_config(name, overrides)
    return Planner(config, GPUS[gpu]).look_at(config, world_size)


# Those of 7B for 8 and 64 GPUs are the same models.
@pytest.mark.parametrize(
    "name", [name for name in preset_names() if not name.endswith(("8xh100_bf16", "64xh100_bf16"))]
)
def test_every_layout_that_is_proposed_would_run(name: str) -> None:
    """The checks of a run, which its command applies, have nothing against any of them."""
    gpus = 8
    for candidate in plan(load_config(name), gpus=gpus, gpu="h200").candidates:
        check_config(candidate.config, world_size=gpus)
        build_layout(candidate.config.parallel, world_size=gpus, rank=gpus - 1)
        replicas = layout_of(candidate.config, gpus).dp_size
        assert candidate.config.parallel.model_parallel_size * replicas == gpus
        training = candidate.config.training
        assert training.micro_batch_size * candidate.num_microbatches * replicas == training.global_batch_size


@pytest.mark.parametrize("name", ["tiny_cpu", "llama3_8b", "mixtral_8x7b", "bert_base", "gpt2", "qwen2_5_7b"])
def test_what_is_held_is_what_a_run_is_refused_by(name: str) -> None:
    """Groups of equal parameters give the same sums as the table of all, on the first and the last stage."""
    config = load_config(name, {"precision.params_dtype": "bf16"})
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=32_003))
    counts = ModelCounts(config.model)
    possible = [one for one in Search(config, 16, GPUS["h100"]).candidates() if is_possible(one, 16)]
    for candidate in possible[:: max(1, len(possible) // 12)]:
        for stage in (0, candidate.parallel.pipeline_model_parallel_size - 1):
            layout = layout_of(candidate, 16, stage)
            said = rank_memory(candidate, counts, layout, GPUS["h100"])
            need = training_need(candidate, layout, bytes_per_parameter=2)
            assert (said.parameters, said.gradients) == (need.parameters, need.gradients)
            assert said.optimizer == pytest.approx(need.optimizer, abs=16)
            assert said.activations + said.logits >= need.activations


@pytest.mark.parametrize("name", SEVEN_B)
def test_best_first_and_what_fits_before_what_does_not(name: str) -> None:
    found = plan(load_config(name), gpus=16, gpu="h100", limit=20)
    assert found.fits
    assert found.best is found.candidates[0]
    fitting = [candidate for candidate in found.candidates if candidate.fits]
    assert list(found.candidates[: len(fitting)]) == fitting
    times = [candidate.time.total for candidate in fitting]
    assert all(later > 0.97 * earlier for earlier, later in itertools.pairwise(times))
    assert all(candidate.memory.total <= candidate.available_memory for candidate in fitting)


def test_kinds_and_parts_add_up() -> None:
    for candidate in plan(load_config("mixtral_8x7b"), gpus=64, gpu="h100").candidates:
        for values in (candidate.memory.as_dict(), candidate.time.as_dict()):
            whole = values.pop("total")
            assert whole == pytest.approx(sum(values.values()))
            assert min(values.values()) >= 0


def test_more_tensor_and_pipeline_ranks_hold_less() -> None:
    for option in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        totals = []
        for size in (1, 2, 4, 8):
            sharded = {"parallel.sequence_parallel": True} if option.startswith("tensor") and size > 1 else {}
            found = look("llama2_7b", {f"parallel.{option}": size, **sharded}, 8)
            totals.append(found.memory.total)
        assert totals == sorted(totals, reverse=True), option
        assert totals[-1] < totals[0] / 2


def test_each_means_against_memory_helps() -> None:
    base = look("llama2_7b", {}, 8).memory
    sharded = look("llama2_7b", {"parallel.use_distributed_optimizer": True}, 8).memory
    assert sharded.optimizer == base.optimizer // 8
    recomputed = look("llama2_7b", {"parallel.recompute_granularity": "full"}, 8)
    assert recomputed.memory.activations < base.activations / 5
    assert recomputed.time.recompute > 0
    divided = look("llama2_7b", {"parallel.context_parallel_size": 2}, 8).memory
    assert divided.activations == pytest.approx(base.activations / 2, rel=0.01)
    moments = {"precision.optimizer_state_dtype": "bf16", "parallel.use_distributed_optimizer": True}
    assert look("llama2_7b", moments, 8).memory.optimizer < sharded.optimizer
    shared = {"parallel.use_distributed_optimizer": True, "parallel.expert_model_parallel_size": 8}
    whole = look("mixtral_8x7b", {"parallel.use_distributed_optimizer": True}, 8).memory
    assert look("mixtral_8x7b", shared, 8).memory.parameters < whole.parameters / 4
    # Experts have fewer replicas to share their optimizer state: it is the same in all.
    assert look("mixtral_8x7b", shared, 8).memory.optimizer == pytest.approx(whole.optimizer, rel=1e-6)


@pytest.mark.parametrize("name", ["llama2_7b", "mixtral_8x7b"])
def test_more_gpus_are_never_slower(name: str) -> None:
    steps = [plan(load_config(name), gpus=gpus, gpu="h100", limit=1).best for gpus in (16, 32, 64, 128)]
    times = [candidate.time.total for candidate in steps if candidate is not None]
    assert len(times) == 4
    assert times == sorted(times, reverse=True)


def test_what_is_given_stays() -> None:
    config = load_config("llama2_7b", {"parallel.tensor_model_parallel_size": 4, "training.micro_batch_size": 2})
    given = {"parallel.tensor_model_parallel_size", "training.micro_batch_size"}
    found = plan(config, gpus=16, given=given)
    for candidate in found.candidates:
        assert candidate.config.parallel.tensor_model_parallel_size == 4
        assert candidate.config.training.micro_batch_size == 2
    sizes = {candidate.config.parallel.tensor_model_parallel_size for candidate in plan(config, gpus=16).candidates}
    assert len(sizes) > 1


def test_what_fits_nowhere_gets_changes_that_do() -> None:
    config = load_config("mixtral_8x7b")
    found = plan(config, gpus=8, gpu="h100")
    assert not found.fits
    assert found.best is None
    assert found.candidates[0].limit.startswith("memory: ")
    advice = what_would_fit(config, gpus=8, device=GPUS["h100"])
    assert any("--gpus 16" in one.change for one in advice)
    assert any("--gpu h200" in one.change for one in advice)
    assert all(one.candidate.fits for one in advice)


@pytest.mark.parametrize(
    ("overrides", "arguments", "message"),
    [
        ({}, {"gpus": 7}, r"no layout divides 32 layers, 32 key-value heads and a global batch of 256 .* 252 or 259"),
        ({}, {"gpus": 8, "gpu": "h1000"}, r"--gpu h1000 is not known; did you mean h100\?"),
        ({}, {"gpus": 0}, r"--gpus is 0, expected at least 1"),
        (
            {"precision.fp8": "hybrid"},
            {"gpus": 8, "gpu": "a100-80"},
            r"precision.fp8 is hybrid, which .* does not have",
        ),
        ({"model.num_query_groups": 5}, {"gpus": 8}, r"must divide model.num_attention_heads"),
    ],
)
def test_mistakes_are_told(overrides: dict[str, object], arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as told:
        plan(load_config("llama2_7b", overrides), **arguments)  # type: ignore[arg-type]
    assert re.search(message, str(told.value), re.DOTALL)


def test_an_unknown_vocabulary_is_assumed_and_said() -> None:
    found = plan(load_config("tiny_cpu"), gpus=2, gpu=this_processor(2, memory=8 << 30))
    assert found.config.model.vocab_size == 32_000
    assert "vocab_size" in found.notes[0]


def test_slower_links_cost_time_where_they_are_used() -> None:
    def times(device: object) -> dict[str, float]:
        sizes = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
        config: RunConfig = load_config(
            "llama2_7b_64xh100_bf16", {f"parallel.{name}": value for name, value in sizes.items()}
        )
        return Planner(config, device).look_at(config, 64).time.as_dict()  # type: ignore[arg-type]

    h100 = GPUS["h100"]
    usual = times(h100)
    slow_link = times(dataclasses.replace(h100, link_bandwidth=h100.link_bandwidth / 10))
    slow_network = times(dataclasses.replace(h100, network_bandwidth=h100.network_bandwidth / 10))
    assert slow_link["tensor_parallel"] > 5 * usual["tensor_parallel"]
    assert slow_link["matrix_products"] == usual["matrix_products"]
    assert slow_network["data_parallel"] > 5 * usual["data_parallel"]
    assert slow_network["tensor_parallel"] == usual["tensor_parallel"]
