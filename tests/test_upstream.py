"""Each private name of torch and megatron-core that is used still exists, takes what it is given, and does its part."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_7b import upstream
from tests.architecture.imports import PACKAGE, sources
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import build, run_steps, tiny_config


def test_an_entry_of_an_index() -> None:
    entry = upstream.stored_at("__0_0.distcp", 3, 5)
    assert (entry.relative_path, entry.offset, entry.length) == ("__0_0.distcp", 3, 5)
    assert entry.__getstate__() == {"relative_path": "__0_0.distcp", "offset": 3, "length": 5}


def test_hooks_before_a_forward() -> None:
    module, called = torch.nn.Linear(2, 2), []
    module.register_forward_pre_hook(lambda *arguments: called.append(arguments))
    for hook in upstream.forward_pre_hooks(module):
        hook(module, ())
    assert called == [(module, ())]


def test_a_condition_on_a_device() -> None:
    upstream.assert_on_device(torch.tensor(True), "it holds")
    with pytest.raises(RuntimeError, match="the loss was scaled"):
        upstream.assert_on_device(torch.tensor(2.0) == 1.0, "the loss was scaled")


def groups() -> tuple[int, int]:
    from megatron.core import parallel_state

    before = len(upstream.created_groups(parallel_state))
    parallel_state.initialize_model_parallel()
    return before, len(upstream.created_groups(parallel_state))


def test_groups_that_were_created() -> None:
    for before, after in run_ranks(2, groups):
        assert before == 0
        assert after > 5


def shared_groups() -> tuple[int, bool, bool]:
    from megatron.core import parallel_state

    with upstream.one_group_for_equal_ranks(parallel_state, frozenset({"EXPERT_MODEL_PARALLEL_GROUP"})):
        parallel_state.initialize_model_parallel(expert_model_parallel_size=2, create_gloo_process_groups=False)
    everyone = torch.distributed.group.WORLD
    experts = parallel_state.get_expert_model_parallel_group()
    created = len(upstream.created_groups(parallel_state))
    return created, parallel_state.get_data_parallel_group() is everyone, experts is everyone


def test_one_group_for_equal_ranks() -> None:
    for created, data_is_everyone, experts_are_everyone in run_ranks(2, shared_groups):
        assert (created, data_is_everyone, experts_are_everyone) == (2, True, False)


def test_layers_that_are_an_mlp_can_be_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.ssm.mlp_layer import MLPLayer

    assert not hasattr(MLPLayer, "is_moe_layer")  # once the class has it, the patch is not needed
    monkeypatch.setattr(MLPLayer, "is_moe_layer", None, raising=False)  # to be undone
    upstream.let_layers_be_graphs()
    assert MLPLayer.is_moe_layer is False


def frequencies() -> Any:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    rotary = RotaryEmbedding(kv_channels=64, rotary_percent=1.0, rotary_base=500_000, use_cpu_initialization=True)
    stretched = upstream.stretched_frequencies(
        rotary, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    return (rotary.inv_freq / stretched).tolist()


def test_stretched_frequencies() -> None:
    """The highest stay, the lowest are divided by the factor."""
    (ratios,) = run_ranks(1, frequencies)
    assert ratios[0] == pytest.approx(1.0)
    assert ratios[-1] == pytest.approx(8.0)


def test_the_final_norm() -> None:
    from megatron.core.models.hybrid import hybrid_block

    before = hybrid_block.TENorm
    with upstream.final_norm(torch.nn.Identity):
        assert hybrid_block.TENorm is torch.nn.Identity
    assert hybrid_block.TENorm is before


@pytest.mark.parametrize(("name", "methods"), upstream.OVERRIDDEN.items())
def test_methods_that_are_overridden(name: str, methods: tuple[str, ...]) -> None:
    from megatron.core.transformer import transformer_layer

    for method in methods:
        assert callable(getattr(getattr(transformer_layer, name), method))


def optimizer_state() -> None:
    """Entry point of a rank: read, change and round the part of the state that it owns."""
    config = tiny_config(parallel={"use_distributed_optimizer": True}, precision={"params_dtype": "bf16"})
    trainer = build(config)
    run_steps(trainer, range(1))
    (part,) = trainer.optimizer.parts
    parameter = next(iter(part.model_param_group_index_map))
    owned = upstream.owned_range(part, parameter)
    tensors = upstream.main_and_states(part, parameter)
    assert {"param", "exp_avg", "exp_avg_sq"} <= tensors.keys()
    assert 0 <= owned.start < owned.end <= parameter.numel()
    assert {tensors[name].numel() for name in ("param", "exp_avg")} == {owned.end - owned.start}
    upstream.set_main_and_states(part, parameter, {**tensors, "param": torch.full_like(tensors["param"], 0.5)})
    upstream.round_main_parameters(part)
    for chunk in part.model_chunks:
        chunk.start_param_sync(force_sync=True)
    assert bool((parameter.detach().view(-1)[owned.start : owned.end] == 0.5).all())


def test_optimizer_state_is_read_and_replaced() -> None:
    run_ranks(2, optimizer_state)


PRIVATE = re.compile(r"_[a-z]\w*")
ELSEWHERE = {
    "runtime/cpu/backend.py": "what stands in for torch.cuda has its own list and test",
    "model/kinds/encoder/layers.py": "overrides what OVERRIDDEN names",
}


def private_uses(source: str) -> set[str]:
    """Private names that are asked of anything but `self`, `cls` and `super()`, where a library is imported."""
    tree = ast.parse(source)
    libraries = {
        (name.name if isinstance(node, ast.Import) else node.module or "").partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    if not libraries & {"torch", "megatron"}:
        return set()
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_self(node.value)}
    asked = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and not is_self(node.value)}
    imported = {
        name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("torch", "megatron."))
        for name in node.names
    }
    return {name for name in (asked - own) | imported if PRIVATE.fullmatch(name)}


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in {"self", "cls"}


def test_nothing_else_uses_private_names() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix(): names
        for path in sources()
        if (names := private_uses(path.read_text(encoding="utf-8")) - {"_exit"})
    }
    assert {path: names for path, names in found.items() if path not in {"upstream.py", *ELSEWHERE}} == {}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch\nmodule._forward_pre_hooks", {"_forward_pre_hooks"}),
        ("from torch._C import _x", {"_x"}),
        ("import torch\nself._own", set()),
        ("import json\nother._private", set()),
    ],
)
def test_a_private_name_is_noticed(source: str, names: set[str]) -> None:
    assert private_uses(source) == names


def test_every_name_has_a_test() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    functions = [
        name for name, value in vars(upstream).items() if getattr(value, "__module__", "") == upstream.__name__
    ]
    assert [name for name in functions if f"upstream.{name}(" not in text] == []


def layouts_in_turn() -> tuple[list[int], ...]:
    from megatron.core import parallel_state

    from megatron_7b.config.schema import ParallelConfig
    from megatron_7b.parallel.groups import destroy_model_parallel, initialize_model_parallel, second_layout

    def sizes() -> list[int]:
        tp, dp = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group()
        return [tp.size(), dp.size(), parallel_state.get_tensor_model_parallel_world_size()]

    initialize_model_parallel(ParallelConfig(), seed=1)
    own = upstream.created_groups(parallel_state)
    second = second_layout(ParallelConfig(tensor_model_parallel_size=2))
    created = upstream.created_groups(parallel_state)
    with second.in_place():
        other = sizes()
    upstream.add_created_groups(parallel_state, [])
    before = upstream.known_layout(parallel_state)
    upstream.know_layout(parallel_state, {**before, "_TENSOR_MODEL_PARALLEL_GROUP": None})
    forgotten = not parallel_state.get_tensor_model_parallel_group(check_initialized=False)
    upstream.know_layout(parallel_state, before)
    kept = [group in created for group in own]
    found = sizes()
    destroy_model_parallel()
    return found, other, [forgotten, all(kept), len(created) > len(own)], upstream.created_groups(parallel_state)


def test_two_layouts_in_one_process() -> None:
    for own, other, known, left in run_ranks(2, layouts_in_turn):
        assert (own, other, known, left) == ([1, 2, 1], [2, 1, 2], [True] * 3, [])
