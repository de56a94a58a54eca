"""What is offered after a run is what its model can do."""

from pathlib import Path

import pytest

from megatron_7b.cli.next_commands import print_next_commands
from megatron_7b.config import load_config


@pytest.mark.parametrize(("preset", "can_generate"), [("tiny_cpu", True), ("gpt2", True), ("bert_tiny_cpu", False)])
def test_only_decoders_are_offered_to_generate(
    preset: str, can_generate: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(preset, {"data.train": "corpus_text_document"})
    print_next_commands(0, ["megatron-7b", "pretrain"], tmp_path, config)
    said = capsys.readouterr().err
    assert ("megatron-7b generate" in said) == can_generate
    assert f"megatron-7b evaluate --checkpoint {tmp_path}" in said
