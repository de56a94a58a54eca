"""The CPU backend replaces what megatron-core reaches, no more, and puts it back."""

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_7b.errors import ConfigError
from megatron_7b.runtime.cpu import backend as cpu_backend
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import tiny_config, train


@pytest.fixture
def installed() -> Iterator[None]:
    cpu_backend.install()
    yield
    cpu_backend.uninstall()


def test_cuda_devices_become_the_cpu(installed: None) -> None:
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.ones(2, device=torch.device("cuda", 3)).device.type == "cpu"
    assert torch.empty(2, device=torch.cuda.current_device(), pin_memory=False).device.type == "cpu"
    assert torch.ones(1).cuda().device.type == "cpu"
    assert torch.ones(1).to("cuda").device.type == "cpu"
    assert torch.ones(1).to(device="cuda", dtype=torch.float64).dtype == torch.float64
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64


def test_other_calls_see_the_untouched_functions(installed: None) -> None:
    """What transformers relies on: a tensor made on the meta device stays there, and Stream is a class."""
    assert torch.tensor([1.0], device="meta").device.type == "meta"
    with torch.device("meta"):
        assert torch.arange(4).device.type == "meta"
        assert torch.tensor([1.0]).device.type == "meta"
    assert isinstance(torch.cuda.Stream, type)
    assert torch.ones(2, dtype=torch.int8).to("cpu", torch.float32).tolist() == [1.0, 1.0]


def test_uninstall_restores_every_name() -> None:
    names = [(item.owner, item.name) for item in cpu_backend.replacements()]
    before = [owner.__dict__.get(name) for owner, name in names]
    cpu_backend.install()
    assert all(owner.__dict__.get(name) is not value for (owner, name), value in zip(names, before, strict=True))
    cpu_backend.install()  # a second time changes nothing
    cpu_backend.uninstall()
    assert [owner.__dict__.get(name) for owner, name in names] == before
    assert not cpu_backend.is_installed()


def test_every_replacement_has_a_reason() -> None:
    assert all(item.reason for item in cpu_backend.replacements())


def test_refused_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="sees a GPU"):
        cpu_backend.install()


def _core_uses_of_torch_cuda(config: Any) -> list[str]:
    """Entry point of a rank: train while every look-up in torch.cuda by megatron-core is written down."""
    seen: set[str] = set()

    class Recorder(types.ModuleType):
        def __getattribute__(self, name: str) -> Any:
            frame = sys._getframe(1)
            if frame.f_globals.get("__name__", "").startswith("megatron.core"):
                seen.add(name)
            return super().__getattribute__(name)

    torch.cuda.__class__ = Recorder
    try:
        train(config, 2)
    finally:
        torch.cuda.__class__ = types.ModuleType
    return sorted(seen)


# Answered by torch itself without a GPU, and rightly: they ask whether there is one.
HARMLESS = {"is_available", "device_count", "nvtx", "is_current_stream_capturing"}


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, {"recompute_granularity": "full"}),
        (2, {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}),
        (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}),
    ],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_megatron_core_uses_no_other_name_of_torch_cuda(world_size: int, parallel: dict[str, Any], dtype: str) -> None:
    config = tiny_config(parallel=parallel, precision={"params_dtype": dtype}, model={"attention_dropout": 0.1})
    replaced = {item.name for item in cpu_backend.replacements() if item.owner is torch.cuda}
    for names in run_ranks(world_size, _core_uses_of_torch_cuda, config):
        assert names, "nothing was recorded: megatron-core no longer looks names up in torch.cuda"
        assert set(names) <= replaced | HARMLESS
