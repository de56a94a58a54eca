"""GPU tests run in one process on one device; each leaves no process groups behind."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    from megatron_7b.config.schema import RuntimeConfig
    from megatron_7b.parallel.groups import destroy_model_parallel
    from megatron_7b.runtime.distributed import initialize_process

    assert initialize_process(RuntimeConfig(device="cuda", deterministic=True)) == "cuda"
    yield
    destroy_model_parallel()
    torch.cuda.empty_cache()
