"""What a plan says holds together: layouts that a run accepts, sums, and what must grow or shrink does."""

import dataclasses
import itertools
import re

import pytest

from megatron_7b.config import check_config, load_config, preset_names
from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.model.kinds import kind_of
from megatron_7b.model.memory import training_need
from megatron_7b.model.sizes import flops_per_token
from megatron_7b.objective import build_objective
from megatron_7b.parallel import build_layout
from megatron_7b.planning import plan, what_would_fit
from megatron_7b.planning.candidate import Candidate
from megatron_7b.planning.counts import ModelCounts
from megatron_7b.planning.devices import GPUS, find_device, this_processor
from megatron_7b.planning.layouts import FORMATS, Search, layout_of
from megatron_7b.planning.memory import rank_memory
from megatron_7b.planning.planner import Planner, is_possible

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


@pytest.mark.parametrize("changes", [{"model.window_size": 4096}, {"data.reset_attention_mask": True}])
def test_texts_that_transformer_engine_does_not_cut_stay_whole(changes: dict[str, object]) -> None:
    for impl, has_context in (("auto", False), ("local", True)):
        overrides = {"data.seq_length": 16384, "model.transformer_impl": impl, **changes}
        found = Search(load_config("mistral_7b", overrides), 8, GPUS["h100"]).candidates()
        assert any(one.parallel.context_parallel_size > 1 for one in found) == has_context


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
    times = [candidate.time.total for candidate in fitting if not candidate.changed]
    assert all(later > 0.97 * earlier for earlier, later in itertools.pairwise(times))
    narrower = [candidate for candidate in fitting if candidate.changed]
    assert fitting[len(fitting) - len(narrower) :] == narrower
    assert all(candidate.time.total < times[0] for candidate in narrower)
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


@pytest.mark.parametrize(("name", "counts"), [("llama2_7b", (16, 32, 64, 128)), ("mixtral_8x7b", (16, 64))])
def test_more_gpus_are_never_slower(name: str, counts: tuple[int, ...]) -> None:
    steps = [plan(load_config(name), gpus=gpus, gpu="h100", limit=1).best for gpus in counts]
    times = [candidate.time.total for candidate in steps if candidate is not None]
    assert len(times) == len(counts)
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


def test_narrower_formats_are_proposed_and_named_where_nothing_else_fits() -> None:
    config = load_config("llama2_7b")
    best = plan(config, gpus=1, gpu="h100").best
    assert best is not None
    assert best.changed == {"precision.optimizer_state_dtype": "bf16", "precision.grad_reduce_in_fp32": False}
    assert best.formats == "BF16 moments and gradients"
    assert best.memory.parameters + best.memory.gradients + best.memory.optimizer == 10 * 6_738_415_616
    words = " ".join(best.words(8, config))
    assert "--precision.optimizer-state-dtype bf16" in words
    assert "--precision.grad-reduce-in-fp32 False" in words
    with_own = plan(config, gpus=1, gpu="h100", given=set(FORMATS))
    assert not with_own.fits
    assert not any(candidate.changed for candidate in with_own.candidates)
    assert not any(candidate.changed for candidate in plan(config, gpus=8, gpu="h100").candidates[:3])


def test_moments_in_host_memory_take_time_and_no_room() -> None:
    settings = {"parallel.use_distributed_optimizer": True, "precision.params_dtype": "bf16"}
    held, timed = [], []
    for cpu_offload in (False, True):
        config = load_config("llama2_7b", {**settings, "optimizer.cpu_offload": cpu_offload})
        candidate = Planner(config, GPUS["h200"]).look_at(config, 1)
        need = training_need(config, layout_of(config, 1), bytes_per_parameter=2)
        assert need.optimizer == candidate.memory.optimizer
        assert need.optimizer + need.host_moments == 12 * 6_738_415_616
        held.append(candidate.memory.optimizer)
        timed.append(candidate.time.optimizer)
    assert held == [12 * 6_738_415_616, 4 * 6_738_415_616]
    assert timed[1] > 3 * timed[0]
    found = plan(load_config("llama2_7b"), gpus=1, gpu="h100", given={FORMATS[0]})
    assert not found.fits
    advice = what_would_fit(load_config("llama2_7b"), gpus=1, device=GPUS["h100"], given={FORMATS[0]})
    assert advice[0].change.startswith("--optimizer.cpu-offload True")
    assert advice[0].candidate.memory.total < GPUS["h100"].memory_bytes


def test_fp8_keeps_whole_main_parameters_beside_bf16_moments() -> None:
    formats = {"precision.params_dtype": "bf16", "precision.optimizer_state_dtype": "bf16"}
    sharded = {"parallel.use_distributed_optimizer": True, **formats}
    for fp8, expected in (("none", 2 + 4), ("hybrid", 4 + 4)):
        config = load_config("llama2_7b", {**sharded, "precision.fp8": fp8})
        held = Planner(config, GPUS["h200"]).look_at(config, 1).memory.optimizer
        assert held == expected * 6_738_415_616
        assert held == training_need(config, layout_of(config, 1), bytes_per_parameter=2).optimizer


def test_stages_may_be_uneven() -> None:
    """Seven stages of 32 layers, and a last stage that has fewer for the sake of a large output layer."""
    found = plan(load_config("llama2_7b", {"training.global_batch_size": 252}), gpus=7, gpu="h100")
    uneven = [one for one in found.candidates if one.config.parallel.pipeline_model_parallel_size == 7]
    assert uneven
    check_config(uneven[0].config, world_size=7)
    sizes = {"parallel.pipeline_model_parallel_size": 4, "training.micro_batch_size": 1}
    even = look("llama3_8b", sizes, 4)
    balanced = look("llama3_8b", {**sizes, "parallel.pipeline_model_parallel_layout": [9, 9, 9, 5]}, 4)
    assert balanced.time.total < even.time.total
    assert balanced.memory.total > even.memory.total  # of the first stage
    proposed = plan(load_config("llama3_8b", sizes), gpus=4, given=set(sizes)).candidates[0]
    assert proposed.config.parallel.pipeline_model_parallel_layout[-1] < 8


def test_the_slowest_of_chunks_that_run_at_once_sets_the_pace() -> None:
    sizes = {"parallel.pipeline_model_parallel_size": 2, "parallel.virtual_pipeline_model_parallel_size": 2}
    layout = "parallel.pipeline_model_parallel_layout"
    even, crossed = (look("llama2_7b", {**sizes, layout: chunks}, 2) for chunks in ([8, 8, 8, 8], [12, 4, 4, 12]))
    assert crossed.time.matrix_products == pytest.approx(even.time.matrix_products * 24 / 16, rel=0.1)


def test_what_is_recomputed_is_not_kept() -> None:
    selective = "parallel.recompute_granularity"
    none = look("llama2_7b", {}, 1)
    mlp = look("llama2_7b", {selective: "selective", "parallel.recompute_modules": ["mlp"]}, 1)
    full = look("llama2_7b", {selective: "full"}, 1)
    assert full.memory.activations < mlp.memory.activations < 0.6 * none.memory.activations
    assert none.time.recompute == 0 < mlp.time.recompute < full.time.recompute
    attention = look("llama2_7b", {selective: "selective"}, 1)  # its scores are never kept
    assert attention.memory.activations == none.memory.activations
    experts = look("mixtral_8x7b", {selective: "selective", "parallel.recompute_modules": ["moe"]}, 8)
    assert experts.memory.activations < look("mixtral_8x7b", {}, 8).memory.activations / 2


def test_recompute_repeats_the_communication_of_a_layer() -> None:
    sizes = {"parallel.tensor_model_parallel_size": 8, "parallel.sequence_parallel": True}
    once = look("llama2_7b", sizes, 8).time
    again = look("llama2_7b", {**sizes, "parallel.recompute_granularity": "full"}, 8).time
    computed = (once.matrix_products + once.attention + once.memory_bound) / 3
    assert again.recompute > computed + once.tensor_parallel / 3


@pytest.mark.parametrize("name", ["t5_base", "bert_base", "llama2_7b", "mixtral_8x7b", "gpt2"])
def test_products_are_those_of_the_models_flops(name: str) -> None:
    """Without limits of size and memory, their time is that of the FLOPs that a run reports."""
    config = load_config(name)
    share = build_objective(config).predicted_share(config)
    ideal = dataclasses.replace(GPUS["h100"].efficiency, matrix_products=1.0)
    device = dataclasses.replace(GPUS["h100"], efficiency=ideal, memory_bandwidth=1e20)
    length = config.data.seq_length
    big = dataclasses.replace(config, training=dataclasses.replace(config.training, micro_batch_size=1 << 20))
    big = dataclasses.replace(big, training=dataclasses.replace(big.training, global_batch_size=1 << 20))
    candidate = Planner(big, device, predicted_share=share).look_at(big, 1)
    flops = flops_per_token(config.model, length, predicted_share=share)
    attended = kind_of(config.model).attended_positions(config.model, length, share)
    attention = 12 * attended * config.model.num_attention_heads * config.model.head_width
    seconds = (flops - attention) * length * (1 << 20) / device.flops["bf16"]
    assert seconds < candidate.time.matrix_products < 1.6 * seconds  # narrow matrices do not reach the rate


def test_experts_have_fewer_replicas_to_exchange_gradients_with() -> None:
    sharded = {"parallel.use_distributed_optimizer": True}
    alone, shared = (
        look("mixtral_8x7b", {**sharded, "parallel.expert_model_parallel_size": size}, 8).time for size in (1, 8)
    )
    assert shared.data_parallel < alone.data_parallel / 20  # an expert is on one rank only
    assert shared.optimizer < alone.optimizer  # fewer gradients to read; the share that is updated is the same


def test_cuda_graphs_take_memory_and_no_time_of_the_host() -> None:
    fp8 = {"precision.fp8": "hybrid", "precision.params_dtype": "bf16", "model.num_layers": 8}
    plain, graphs = (
        look("llama2_7b", {**fp8, "runtime.cuda_graph_impl": impl}, 1, "h200") for impl in ("none", "local")
    )
    assert plain.memory.graphs == 0 < graphs.memory.graphs < graphs.memory.activations
    assert graphs.time.host < plain.time.host


def test_torch_native_layers_hold_no_logits() -> None:
    whole, chunked = (look("llama3_8b", {"model.transformer_impl": impl}, 1).memory for impl in ("auto", "local"))
    assert whole.logits == 8192 * 128_256 * 4
    full, in_chunks = (
        look("llama3_8b", {"runtime.cross_entropy_impl": impl}, 1).memory for impl in ("full", "chunked")
    )
    assert full.logits == 8192 * 128_256 * 6
    assert in_chunks.logits == chunked.logits
    assert chunked.logits < whole.logits


def test_what_fits_nowhere_gets_changes_that_do() -> None:
    config = load_config("mixtral_8x7b", {"data.seq_length": 8192})
    found = plan(config, gpus=4, gpu="h100")
    assert not found.fits
    assert found.best is None
    assert found.candidates[0].limit.startswith("memory: ")
    advice = what_would_fit(config, gpus=4, device=GPUS["h100"])
    assert any("--gpus 8" in one.change for one in advice)
    assert all(one.candidate.fits for one in advice)


@pytest.mark.parametrize(
    ("overrides", "arguments", "message"),
    [
        ({}, {"gpus": 37}, r"no layout divides 32 layers, 32 key-value heads and a global batch of 256 .* 222 or 259"),
        ({}, {"gpus": 8, "gpu": "h1000"}, r"--gpu h1000 is not known; did you mean h100\?"),
        ({}, {"gpus": 10**15}, r"at most 1,000,000"),
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


def test_layers_of_an_encoder_decoder_are_no_reason() -> None:
    """It has one pipeline stage, so that three layers are none that three ranks could share."""
    with pytest.raises(ConfigError, match=r"no layout divides 8 key-value heads and a global batch of 32"):
        plan(load_config("t5_tiny_cpu"), gpus=3, gpu="h100")


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


def test_a_gpu_may_be_named_as_nvidia_smi_names_it() -> None:
    for name, known in (
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("nvidia h200", "h200"),
    ):
        assert find_device(name, 8) is GPUS[known]
