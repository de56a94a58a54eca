"""T5 from and to Hugging Face: its releases, tied or not, as transformers and as its authors wrote it."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_7b.checkpoint import read_config
from megatron_7b.cli.main import main
from megatron_7b.conversion import HuggingFaceFolder
from megatron_7b.conversion.parity import hugging_face_logits, random_tokens
from tests.conversion.tiny_models import save_tiny_t5, save_tiny_tokenizer
from tests.support.checkpoint_runs import train_save
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import VOCAB_SIZE, tiny_config

CASES: dict[str, dict[str, Any]] = {
    "1.1": {"num_decoder_layers": 2, "is_tied": False, "tie_word_embeddings": False},
    "1.1 as transformers 5 makes it: tied, not scaled": {"tie_word_embeddings": False},
    "1.1 tied and scaled": {"d_kv": 8, "relative_attention_num_buckets": 17},
    "1.0": {"feed_forward_proj": "relu", "num_layers": 1, "num_decoder_layers": 3, "num_heads": 5},
    "scaled, but not tied": {"is_tied": False},
}


def convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = save_tiny_t5(tmp_path / "in", **CASES[case])
    assert convert("from-hf", "--input", tmp_path / "in", "--output", tmp_path / "c") == 0
    assert convert("to-hf", "--checkpoint", tmp_path / "c", "--output", tmp_path / "out") == 0
    source, result = HuggingFaceFolder(tmp_path / "in"), HuggingFaceFolder(tmp_path / "out")
    assert set(source) == set(result)
    assert all(torch.equal(source[name], result[name]) for name in source)
    derived = {"dense_act_fn", "is_gated_act"}  # from feed_forward_proj, whenever transformers reads it
    described = set(source.config) - derived - {"transformers_version", "tie_word_embeddings"}
    assert {key: result.config[key] for key in described} == {key: source.config[key] for key in described}
    tokens = random_tokens(199, length=64)
    expected = hugging_face_logits(tmp_path / "in", tokens)
    assert expected.std() > 0.15
    torch.testing.assert_close(hugging_face_logits(tmp_path / "out", tokens), expected, atol=0, rtol=0)
    with torch.inference_mode():
        of_object = theirs(input_ids=tokens, decoder_input_ids=tokens.flip(-1)[:, :32]).logits
    torch.testing.assert_close(expected, of_object, atol=1e-4, rtol=1e-4)  # another attention kernel
    assert capsys.readouterr().out.count("parity") == 2
    model = read_config(tmp_path / "c").model
    assert model.share_embeddings_and_output_weights == CASES[case].get("is_tied", True)


def rewrite(folder: Path, change: Any, **config: object) -> None:
    file = folder / "model.safetensors"
    save_file(dict(change(load_file(file))), file, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings = {key: value for key, value in {**settings, **config}.items() if value != "leave out"}
    (folder / "config.json").write_text(json.dumps(settings))


def test_as_flan_was_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedding three times, a bias that nothing computes with, and no word of scaling."""
    save_tiny_t5(tmp_path / "in", is_tied=False, tie_word_embeddings=False)
    source = dict(HuggingFaceFolder(tmp_path / "in"))
    unused = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.ones(8, 4)}
    rewrite(
        tmp_path / "in",
        lambda tensors: {
            **tensors, **unused,
            **{f"{stack}.embed_tokens.weight": tensors["shared.weight"].clone() for stack in ("encoder", "decoder")},
        },
        tie_word_embeddings=False, scale_decoder_outputs="leave out", n_positions=512,
        output_past=True, decoder_start_token_id=0,
    )  # fmt: skip
    assert convert("from-hf", "--input", tmp_path / "in", "--output", tmp_path / "c") == 0
    assert convert("to-hf", "--checkpoint", tmp_path / "c", "--output", tmp_path / "out") == 0
    result = HuggingFaceFolder(tmp_path / "out")
    assert set(source) == set(result)
    assert all(torch.equal(source[name], result[name]) for name in source)
    assert result.config["tie_word_embeddings"] is False
    assert (result.config["n_positions"], result.config["decoder_start_token_id"]) == (512, 0)
    assert "stay behind: " not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"feed_forward_proj": "gated-silu"},
            "feed_forward_proj is 'gated-silu', only gated-gelu, gated-gelu_new, relu",
        ),
        ({"is_encoder_decoder": False}, "one of the two stacks is missing"),
        ({"architectures": ["T5EncoderModel"]}, "only ['T5ForConditionalGeneration'] or ['T5With"),
        ({"relative_attention_max_distance": 4}, "must be above model.relative_attention_num_buckets / 2 = 4"),
        ({"num_decoder_layers": 3}, "14 missing:\n  decoder.block.2"),
    ],
)
def test_what_cannot_be_converted(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_t5(tmp_path / "in")
    rewrite(tmp_path / "in", dict, **changes)
    assert convert("from-hf", "--input", tmp_path / "in", "--output", tmp_path / "c") in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_export_of_a_parallel_run(tmp_path: Path) -> None:
    """TP2 with padded vocabulary, trained for two steps, with a tokenizer: transformers knows how an answer begins."""
    from transformers import AutoModelForSeq2SeqLM

    save_tiny_tokenizer(tmp_path / "tokenizer")
    model = {"architecture": "t5", "num_query_groups": None, "num_layers": 2, "vocab_size": VOCAB_SIZE}
    config = tiny_config(model=model, parallel={"tensor_model_parallel_size": 2})
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    save = functools.partial(train_save, tokenizer=tmp_path / "tokenizer")
    run_ranks(2, save, config, tmp_path / "run" / "checkpoints", 2)
    arguments = ("--checkpoint", tmp_path / "run" / "checkpoints" / "latest", "--output", tmp_path / "out")
    assert convert("to-hf", *arguments) == 0
    folder = HuggingFaceFolder(tmp_path / "out")
    assert folder.config["vocab_size"] == VOCAB_SIZE
    ids = {"eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 1}
    assert {name: folder.config[name] for name in ids} == ids
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {name: generation[name] for name in ids} == ids
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert theirs.generate(torch.tensor([[5, 6, 0]]), max_new_tokens=4).shape[0] == 1
