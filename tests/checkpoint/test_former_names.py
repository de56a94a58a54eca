"""Checkpoints of formats 1 and 2, whose tensors have megatron-core's names, are read as those of today.

`golden/format_2.tar.xz` was written by the last version with that format (commit c0c8b0f): `train_save` of the
configuration below at step 2. Its `expected.json` has what that version read from it, and the losses of its next steps.
"""

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_7b.checkpoint import read_manifest
from megatron_7b.checkpoint.manifest import MANIFEST
from megatron_7b.checkpoint.weights import CheckpointWeights
from megatron_7b.config.schema import RunConfig
from megatron_7b.runtime.strict_json import CHECKSUM
from tests.checkpoint.test_optimizer_state import cropped, start_save
from tests.support.checkpoint_runs import load_save, resume_train, saved_tensors, train_save
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import tiny_config

GOLDEN = Path(__file__).parent / "golden" / "format_2.tar.xz"
WRITTEN_AT: dict[str, Any] = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
LAYOUTS: list[tuple[int, dict[str, Any]]] = [(4, WRITTEN_AT), (1, {}), (2, {"use_distributed_optimizer": True})]
TIED = {"share_embeddings_and_output_weights": True}


def golden_config(parallel: dict[str, Any], dtype: str = "bf16") -> RunConfig:
    shape = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2}
    return tiny_config(
        model=shape | TIED,
        parallel=parallel,
        precision={"params_dtype": dtype},
        training={"global_batch_size": 2, "micro_batch_size": 1},
    )


@pytest.fixture(params=[1, 2])
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoints folder with one of each former format; 1 is 2 without the checksum."""
    with tarfile.open(GOLDEN) as archive:
        archive.extractall(tmp_path / "golden", filter="data")
    manifest = tmp_path / "golden" / "step_00000002" / MANIFEST
    if request.param == 1:
        content = json.loads(manifest.read_text())
        del content[CHECKSUM]
        manifest.write_text(json.dumps(content | {"format_version": 1}))
    assert read_manifest(manifest.parent).format_version == request.param
    return tmp_path / "golden"


def digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Hash of each tensor's bits, by `{kind} {name}` for optimizer state."""
    found = {}
    for name, tensor in cropped(tensors).items():
        kind, _, parameter = name.removeprefix("optimizer.state.").partition(".")
        key = f"{kind} {parameter}" if name.startswith("optimizer.") else name
        found[key] = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    return found


def test_every_value_is_that_of_the_version_that_wrote_it(golden: Path, tmp_path: Path) -> None:
    expected = json.loads((golden / "expected.json").read_text())
    weights = dict(CheckpointWeights(golden / "step_00000002"))
    assert digests(weights).items() <= expected["tensors"].items()
    assert len(weights) == 14
    for world_size, parallel in LAYOUTS:
        target = tmp_path / f"{world_size}"
        run_ranks(world_size, load_save, golden_config(parallel), golden, target)
        assert digests(saved_tensors(target / "latest")) == expected["tensors"]
        assert read_manifest(target / "latest").format_version == 3


def test_runs_resume_and_start_from_it(golden: Path, tmp_path: Path) -> None:
    expected = json.loads((golden / "expected.json").read_text())
    for world_size, parallel in LAYOUTS:
        results = run_ranks(world_size, resume_train, golden_config(parallel), golden, 4)
        # The bits of BF16 sums are those of the machine and of the layout.
        assert [loss for loss, _ in results[0][0]] == pytest.approx(expected["losses"], rel=1e-3)
    run_ranks(1, start_save, golden_config({}, "fp32"), golden, tmp_path / "started")
    started = digests(saved_tensors(tmp_path / "started" / "latest"))
    for name in CheckpointWeights(golden / "step_00000002"):
        assert started[name] == expected["tensors"][f"param {name}"]


def test_names_on_disk_are_those_of_the_table(tmp_path: Path) -> None:
    """No number of megatron-core's hybrid pattern, and the same names at every layout."""
    run_ranks(2, train_save, golden_config({"pipeline_model_parallel_size": 2}), tmp_path, 1)
    layer = [
        "input_layernorm", "mlp.linear_fc1", "mlp.linear_fc2", "pre_mlp_layernorm", "self_attention.linear_proj",
        "self_attention.linear_qkv",
    ]  # fmt: skip
    names = [f"decoder.layers.{number}.{name}.weight" for number in range(2) for name in layer]
    expected = {"decoder.final_norm.weight", "embedding.word_embeddings.weight", *names}
    kinds = ("optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.", "optimizer.state.param.")
    assert saved_tensors(tmp_path / "latest").keys() == expected | {kind + name for kind in kinds for name in expected}
