"""GPU tests run in one process on one device; each leaves no process groups behind."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    from megatron_7b.config.schema import RuntimeConfig
    from megatron_7b.parallel.groups import leaving_process_groups
    from megatron_7b.runtime.process.distributed import initialize_process

    with leaving_process_groups():
        assert initialize_process(RuntimeConfig(device="cuda", deterministic=True)) == "cuda"
        yield
    assert not torch.distributed.distributed_c10d._world.pg_map
    torch.cuda.empty_cache()
