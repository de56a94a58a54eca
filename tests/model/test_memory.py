"""What the arithmetic says a rank holds is what a rank holds; what cannot fit is refused, what fits is not."""

import dataclasses

import pytest
import torch

from megatron_7b.config import load_config
from megatron_7b.config.optimizers import OPTIMIZERS
from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.model import fitting
from megatron_7b.model.memory import MemoryNeed, inference_need, training_need
from megatron_7b.model.sizes import count_parameters
from megatron_7b.parallel import ParallelLayout, build_layout
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import run_steps, tiny_config

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CASES = {
    "one rank": (1, {}, {}),
    "tied": (1, {}, {"share_embeddings_and_output_weights": True}),
    "Qwen": (1, {}, {"add_qkv_bias": True, "qk_layernorm": True}),
    "TP2+SP": (2, {**TP2, "sequence_parallel": True}, {}),
    "PP2, tied": (2, PP2, {"share_embeddings_and_output_weights": True}),
    "PP2xVPP2": (2, {**PP2, "virtual_pipeline_model_parallel_size": 2}, {}),
    "DP2": (2, {}, {}),
    "DP2, sharded": (2, {"use_distributed_optimizer": True}, {}),
    "TP2xPP2xDP2, sharded": (8, {**TP2, **PP2, "use_distributed_optimizer": True}, {}),
    "PP2, muon": (2, PP2, {}),
    "DP2, sgd": (2, {}, {}),
    "PP2, tied, lora": (2, PP2, {"share_embeddings_and_output_weights": True}),
    "TP2xDP2, sharded, dora": (4, {**TP2, "use_distributed_optimizer": True}, {}),
}


def bytes_of(tensors: list[torch.Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def _held(config: RunConfig) -> tuple[MemoryNeed, MemoryNeed]:
    """Entry point of a rank: what it is said to hold, and what it holds after a step."""
    from megatron_7b.checkpoint.save import num_bytes_of, own_pieces
    from megatron_7b.training.learner import build_learner

    core = build_learner(config, "cpu")
    run_steps(core, range(1))
    parameters = [parameter for chunk in core.model for parameter in chunk.parameters()]
    states = [state for adam in core.optimizer.torch_optimizers() for state in adam.state.values()]
    main = [key for adam in core.optimizer.torch_optimizers() for key in adam.state]
    own_main = [one for one in main if one.untyped_storage().data_ptr() not in {
        parameter.untyped_storage().data_ptr() for parameter in parameters
    }]  # fmt: skip
    moments = [tensor for state in states for name, tensor in state.items() if name != "step"]
    width = 2 if parameters[0].dtype == torch.bfloat16 else 4
    adapter, names = core.on_ranks.adapter, core.on_ranks.names_apart
    said = training_need(config, core.layout, bytes_per_parameter=width, adapter=adapter)
    return said, MemoryNeed(
        parameters=bytes_of(parameters),
        gradients=bytes_of([parameter.main_grad for parameter in parameters if parameter.requires_grad]),
        optimizer=bytes_of([*moments, *own_main]),
        copies=num_bytes_of(own_pieces(core.model, core.optimizer, names=names)),
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_a_rank_holds_what_is_said(name: str, dtype: str) -> None:
    """Never less, or what fits might be refused; with shards of buffers, whose ends are padded, a little more."""
    world_size, parallel, model = CASES[name]
    sizes = {"hidden_size": 128, "ffn_hidden_size": 512, "vocab_size": 5003, **model}
    optimizer = name.rpartition(", ")[2]
    config = tiny_config(
        model=sizes,
        parallel=parallel,
        precision={"params_dtype": dtype},
        optimizer={"name": optimizer} if optimizer in OPTIMIZERS else {},
        adapter={"method": optimizer, "rank": 32} if optimizer in ("lora", "dora") else {},
        checkpoint={"asynchronous": True},
    )
    slack = 1.01 if "sharded" in name else 1.0
    for said, held in run_ranks(world_size, _held, config):
        for part in ("parameters", "gradients", "optimizer"):
            assert getattr(said, part) <= getattr(held, part) <= slack * getattr(said, part) + 4096, part
        # What several ranks or stages hold, only one of them writes; a rank may write the larger half of something.
        assert held.copies <= said.copies + 4096
        assert held.copies >= 0.98 * said.copies


def layout(config: RunConfig, world_size: int = 1, rank: int = 0) -> ParallelLayout:
    return build_layout(config.parallel, world_size=world_size, rank=rank)


def test_llama2_7b_needs_18_bytes_per_parameter_and_what_it_keeps() -> None:
    config = load_config("llama2_7b", {"precision.params_dtype": "bf16"})
    need = training_need(config, layout(config), bytes_per_parameter=2)
    number = count_parameters(config.model)
    assert (need.parameters, need.gradients, need.optimizer) == (2 * number, 4 * number, 12 * number)
    assert need.activations == 32 * config.training.micro_batch_size * config.data.seq_length * 4096 * 2


def test_moments_and_gradients_in_bf16_leave_10_bytes_per_parameter() -> None:
    """12 of Qwen2.5-7B with FP32 gradients: one H200 trained it in 114 GB, where 14 would have left 8 for the rest."""
    narrow = {"precision.optimizer_state_dtype": "bf16", "parallel.use_distributed_optimizer": True}
    for further, expected in (
        ({}, 12),
        ({"precision.grad_reduce_in_fp32": False}, 10),
        ({"precision.fp8": "hybrid"}, 14),
    ):
        config = load_config("qwen2_5_7b", {**narrow, **further})
        need = training_need(config, layout(config), bytes_per_parameter=2)
        number = count_parameters(config.model)
        assert need.parameters + need.gradients + need.optimizer == expected * number


def test_the_presets_for_gpus_fit_into_them() -> None:
    """An H100 has 80 GB; 79.1 of them are torch's to give."""
    for name, world_size in (
        ("llama2_7b_8xh100_bf16", 8),
        ("llama3_8b_8xh100_fp8", 8),
        ("qwen2_5_7b_64xh100_bf16", 64),
    ):
        config = load_config(name, {"model.vocab_size": 152_064})
        for rank in range(world_size):
            assert training_need(config, layout(config, world_size, rank), bytes_per_parameter=2).total < 60e9


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What the machine is said to have left: a number to change."""
    machine = {"available": 24 << 30}
    monkeypatch.setattr(fitting, "available_memory", lambda: machine["available"])
    monkeypatch.setattr(fitting, "may_have_gpu", lambda: False)
    return machine


def check(config: RunConfig, ranks: range = range(1), world_size: int = 1, *, is_training: bool = True) -> None:
    fitting.check_before_launch(config, ranks=ranks, world_size=world_size, is_training=is_training)


def test_a_7b_model_is_refused_on_a_small_machine(memory: dict[str, int]) -> None:
    config = load_config("llama2_7b_8xh100_bf16", {})
    with pytest.raises(ConfigError, match=r"the one rank of this machine would hold at least 1\d\d\.\d GB") as refused:
        check(config)
    message = str(refused.value)
    assert "25.8 GB are available" in message
    assert "parameters 13.5 GB, gradients 27.0 GB, optimizer 80.9 GB" in message
    assert "--runtime.check-memory False" in message
    check(dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, check_memory=False)))


def test_the_model_that_it_learns_from_counts_too(memory: dict[str, int]) -> None:
    config, teacher = tiny_config(), tiny_config(model={"num_layers": 8})
    place = layout(config, 1, 0)
    own, held = (need(c, place, bytes_per_parameter=4).total for need, c in
                 ((training_need, config), (inference_need, teacher)))  # fmt: skip
    options = {"ranks": range(1), "world_size": 1, "is_training": True, "teacher": teacher}
    memory["available"] = own + held
    fitting.check_before_launch(config, **options)
    memory["available"] = own + held - 1
    with pytest.raises(ConfigError, match=r"would hold at least .*teacher "):
        fitting.check_before_launch(config, **options)


def test_the_ranks_of_a_machine_count_together(memory: dict[str, int]) -> None:
    config = tiny_config(parallel=PP2)
    first, last = (training_need(config, layout(config, 4, rank), bytes_per_parameter=4).total for rank in (0, 2))
    assert first != last  # the stages differ: one has the final norm as well
    for ranks, needed in ((range(4), 2 * first + 2 * last), (range(2), 2 * first), (range(2, 4), 2 * last)):
        memory["available"] = needed
        check(config, ranks, 4)
        memory["available"] = needed - 1
        with pytest.raises(ConfigError, match=f"the {len(ranks)} ranks of this machine"):
            check(config, ranks, 4)


def test_the_hint_names_what_would_help(memory: dict[str, int]) -> None:
    memory["available"] = 1000
    for config, ranks, word in (
        (tiny_config(), range(2), "--parallel.use-distributed-optimizer True"),
        (tiny_config(), range(1), "take a smaller model"),
        (tiny_config(checkpoint={"initialize_from": "base"}), range(1), "--adapter.method lora"),
    ):
        with pytest.raises(ConfigError, match=word):
            check(config, ranks, len(ranks))
    with pytest.raises(ConfigError, match="--precision.params-dtype bf16"):
        check(tiny_config(), is_training=False)


def test_an_unknown_vocabulary_counts_as_little(memory: dict[str, int]) -> None:
    config = tiny_config(model={"vocab_size": None})
    known = tiny_config(model={"vocab_size": 8})
    assert training_need(config, layout(config), bytes_per_parameter=4) == training_need(
        known, layout(known), bytes_per_parameter=4
    )
    check(config)


def test_a_gpu_is_not_judged_by_the_machines_memory(memory: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    memory["available"] = 0
    check(tiny_config(runtime={"device": "cuda"}))
    monkeypatch.setattr(fitting, "may_have_gpu", lambda: True)
    check(tiny_config())
    with pytest.raises(ConfigError):
        check(tiny_config(runtime={"device": "cpu"}))


def test_a_gpu_is_judged_by_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        total_memory = 79 << 30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: Device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    config = load_config("llama2_7b_8xh100_bf16", {})
    fitting.check_rank(config, on_gpu=True, rank=3, world_size=8, is_training=True)
    with pytest.raises(ConfigError, match=r"rank 0 would hold at least 1\d\d\.\d GB .*, but the GPU has 84.8 GB"):
        fitting.check_rank(config, on_gpu=True, rank=0, world_size=1, is_training=True)
    fitting.check_rank(config, on_gpu=True, rank=0, world_size=1, is_training=False)


def test_a_tight_fit_is_warned_of(memory: dict[str, int], caplog: pytest.LogCaptureFixture) -> None:
    config: RunConfig = tiny_config()
    memory["available"] = 10**9
    fitting.check_rank(config, on_gpu=False, rank=0, world_size=1, is_training=True)
    assert not caplog.records
    memory["available"] = 10**8
    fitting.check_rank(config, on_gpu=False, rank=0, world_size=1, is_training=True)
    assert "memory is tight" in caplog.text


def test_the_launchers_environment_says_who_shares_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert fitting.ranks_of_launcher(5) == range(5, 6)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert fitting.ranks_of_launcher(5) == range(4, 8)


def test_a_conversion_holds_one_copy(memory: dict[str, int]) -> None:
    model = load_config("llama2_7b", {}).model
    fitting.check_conversion(model, 32_000, "bf16")
    with pytest.raises(ConfigError, match=r"parameters 27\.0 GB\) would be held, but 25\.8 GB are available"):
        fitting.check_conversion(model, 32_000, "bf16", "fp32")
