"""GPT-2 and BERT from and to Hugging Face: every spelling of their tensors, several layouts, the same logits."""

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
from tests.conversion.tiny_models import MIXTURES, OLDER, save_tiny_model, save_tiny_tokenizer
from tests.support.assets import asset
from tests.support.checkpoint_runs import train_save
from tests.support.commands import run_command
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import VOCAB_SIZE, tiny_config
from tests.training import runs


def convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def import_and_export(folder: Path, scratch: Path) -> HuggingFaceFolder:
    assert convert("from-hf", "--input", folder, "--output", scratch / "c") == 0
    assert convert("to-hf", "--checkpoint", scratch / "c", "--output", scratch / "out") == 0
    return HuggingFaceFolder(scratch / "out")


@pytest.mark.parametrize("case", [*OLDER, *MIXTURES])
def test_there_and_back(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = save_tiny_model(case, tmp_path / "in")
    result, source = import_and_export(tmp_path / "in", tmp_path), HuggingFaceFolder(tmp_path / "in")
    assert set(source) == set(result)
    same = [name for name in source if torch.equal(source[name], result[name])]
    unused = {"cls.predictions.bias"} if "bert" in case and "untied" in case else set()
    assert set(source) - set(same) <= unused
    described = set(source.config) & set(result.config) - {"transformers_version", "activation_function", "n_inner"}
    described -= {"head_dim"} if source.config.get("head_dim", 0) is None else set()
    assert {key: result.config[key] for key in described} == {key: source.config[key] for key in described}
    tokens = random_tokens(199, length=64)
    has_pairs = case.endswith("_pairs")
    with torch.inference_mode():
        output = theirs(input_ids=tokens)
    expected = output.prediction_logits if has_pairs else output.logits
    assert expected.std() > 0.5
    torch.testing.assert_close(hugging_face_logits(tmp_path / "out", tokens), expected, atol=1e-5, rtol=1e-5)
    if has_pairs:
        pairs = hugging_face_logits(tmp_path / "out", tokens, of_pairs=True)[:, 0]
        torch.testing.assert_close(pairs, output.seq_relationship_logits, atol=1e-5, rtol=1e-5)
    assert capsys.readouterr().out.count("parity") == (4 if has_pairs else 2)


def rewrite(folder: Path, change: Any, **config: object) -> None:
    file = folder / "model.safetensors"
    save_file(dict(change(load_file(file))), file, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **config}))


def as_gpt2_was_published(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    causal = torch.ones(1, 1, 64, 64).tril()
    buffers = {f"h.{layer}.attn.bias": causal.clone() for layer in range(2)}
    buffers |= {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()} | buffers


def as_bert_was_published(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    endings = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in tensors.items():
        ending = next((ending for ending in endings if name.endswith(ending)), None)
        renamed[name if ending is None else name.removesuffix(ending) + endings[ending]] = tensor
    heads = {"bert.pooler.dense.weight": torch.ones(48, 48), "bert.pooler.dense.bias": torch.ones(48)}
    heads |= {"cls.seq_relationship.weight": torch.ones(2, 48), "cls.seq_relationship.bias": torch.ones(2)}
    repeated = {
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone(),
        "bert.embeddings.position_ids": torch.arange(64)[None],
    }
    return renamed | heads | repeated


def test_gpt2_as_it_was_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model("gpt2", tmp_path / "in")
    source = dict(HuggingFaceFolder(tmp_path / "in"))
    rewrite(tmp_path / "in", as_gpt2_was_published, n_ctx=64)
    result = import_and_export(tmp_path / "in", tmp_path)
    assert set(source) == set(result)
    assert all(torch.equal(source[name], result[name]) for name in source)
    assert "stay behind: " not in capsys.readouterr().err.replace("of " + str(tmp_path), "")


def test_bert_with_all_its_heads_as_it_was_published(tmp_path: Path) -> None:
    save_tiny_model("bert", tmp_path / "in")
    rewrite(tmp_path / "in", as_bert_was_published, architectures=["BertForPreTraining"])
    result = import_and_export(tmp_path / "in", tmp_path)
    assert result.config["architectures"] == ["BertForPreTraining"]
    assert {"bert.pooler.dense.weight", "cls.seq_relationship.bias"} <= set(result)


def test_bert_as_it_was_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model("bert", tmp_path / "in")
    source = dict(HuggingFaceFolder(tmp_path / "in"))
    rewrite(tmp_path / "in", as_bert_was_published)
    result = import_and_export(tmp_path / "in", tmp_path)
    assert result.config["architectures"] == ["BertForMaskedLM"]
    assert set(source) == set(result)
    assert all(torch.equal(source[name], result[name]) for name in source)
    assert (
        "heads that the model does not have, and stay behind: bert.pooler.dense.bias, bert.pooler.dense.weight, "
        "cls.seq_relationship.bias, cls.seq_relationship.weight" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bert.embeddings.LayerNorm.gamma": torch.ones(48)}, "bert.embeddings.LayerNorm.weight under two names"),
        ({"classifier.weight": torch.ones(2, 48)}, "1 unexpected:\n  classifier.weight"),
        (
            {"cls.predictions.decoder.bias": torch.ones(199)},
            "cls.predictions.decoder.bias differs from cls.predictions.bias",
        ),
    ],
)
def test_tensors_that_contradict(
    change: dict[str, torch.Tensor], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_model("bert", tmp_path / "in")
    rewrite(tmp_path / "in", lambda tensors: tensors | change)
    assert convert("from-hf", "--input", tmp_path / "in", "--output", tmp_path / "c") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_a_head_that_is_there_in_part_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model("bert", tmp_path / "in")
    rewrite(
        tmp_path / "in",
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "transform" not in name},
    )
    assert convert("from-hf", "--input", tmp_path / "in", "--output", tmp_path / "c") == 1
    assert "4 missing:\n  cls.predictions.transform.dense.weight" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ["gpt2", "bert", "megatron-bert"])
def test_export_of_a_parallel_run(architecture: str, tmp_path: Path) -> None:
    """TP2 with padded vocabulary, trained for two steps: transformers computes what a run on it would go on from."""
    model = {
        "architecture": architecture, "num_query_groups": None, "max_position_embeddings": 32,
        "num_tokentypes": 2 if "bert" in architecture else 0, "share_embeddings_and_output_weights": True,
    }  # fmt: skip
    config = tiny_config(model=model, parallel={"tensor_model_parallel_size": 2})
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    run_ranks(2, train_save, config, tmp_path / "run" / "checkpoints", 2)
    arguments = ("--checkpoint", tmp_path / "run" / "checkpoints" / "latest", "--output", tmp_path / "out")
    assert convert("to-hf", *arguments) == 0
    folder = HuggingFaceFolder(tmp_path / "out")
    assert folder.config["vocab_size"] == VOCAB_SIZE
    assert (tmp_path / "out" / "generation_config.json").exists() == (architecture == "gpt2")


def test_gpt2_continues_a_text_as_transformers_does(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from megatron_7b.tokenizer import load_tokenizer

    folder = tmp_path / "in"
    save_tiny_tokenizer(folder)
    save_tiny_model("gpt2", folder, vocab_size=300)
    assert convert("from-hf", "--input", folder, "--output", tmp_path / "c") == 0
    prompt = load_tokenizer(folder).encode("the cat sat on the mat")
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=40, min_new_tokens=40, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()  # fmt: skip
    for layout in ((), ("--nproc", 2, "--parallel.pipeline-model-parallel-size", 2)):
        done = run_command(
            "generate", "--checkpoint", tmp_path / "c", "--prompt", "the cat sat on the mat", "--greedy",
            "--max-new-tokens", 40, "--ignore-eod", "--json", *layout,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (sample,) = json.loads(done.stdout.splitlines()[-1])["samples"]
        assert sample["token_ids"] == expected


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_minilm_learns_to_fill_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A published encoder without a head: the same hidden states, thirty steps at TP2, and out again."""
    from transformers import pipeline

    source = asset("minilm")
    assert convert("from-hf", "--input", source, "--output", tmp_path / "c") == 0
    warned = capsys.readouterr().err
    assert "stay behind: pooler.dense.bias, pooler.dense.weight" in warned
    assert "gets fresh ones, to be trained: cls.predictions.transform.dense.weight" in warned
    assert run_ranks(1, hidden_difference, tmp_path / "c", source)[0] < 2e-5
    with (tmp_path / "text.jsonl").open("w") as text:
        text.writelines(f"{line}\n" for line in asset("sotu.jsonl").read_text().splitlines()[:6])
    prefix = str(tmp_path / "sotu")
    tokenizer = ("--tokenizer-model", source)
    done = run_command("preprocess", "--input", tmp_path / "text.jsonl", "--output-prefix", prefix, *tokenizer)
    assert done.returncode == 0, done.stderr
    done = run_command(
        "pretrain", "--run-dir", tmp_path / "run", "--data.train", f"{prefix}_text_document", "--data.split", "1",
        "--checkpoint.initialize-from", tmp_path / "c", "--parallel.tensor-model-parallel-size", 2, "--nproc", 2,
        "--training.train-steps", 30, "--training.micro-batch-size", 2, "--training.global-batch-size", 4,
        "--data.seq-length", 64, "--optimizer.lr", "5e-4", "--optimizer.lr-warmup-steps", 3,
        "--telemetry.plot", "False", timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in runs.steps(tmp_path / "run")]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert read_config(tmp_path / "run" / "checkpoints" / "latest").model.architecture == "bert"
    assert convert("to-hf", "--checkpoint", tmp_path / "run", "--output", tmp_path / "out") == 0
    answers = pipeline("fill-mask", model=str(tmp_path / "out"))("the people of the united [MASK]")
    assert len(answers) == 5
    assert all(0 < answer["score"] < 1 for answer in answers)


def hidden_difference(checkpoint: Path, source: Path) -> float:
    """Entry point of a rank: largest difference of a last hidden state from that of transformers."""
    from transformers import AutoModel

    from megatron_7b.checkpoint.inference_config import inference_config
    from megatron_7b.checkpoint.load import load_weights
    from megatron_7b.conversion.checkpoint_logits import text_inputs
    from megatron_7b.model.on_ranks import ModelOnRanks
    from megatron_7b.training.learner import build_learner

    config = inference_config(checkpoint, {"model.transformer_impl": "local", "precision.params_dtype": "fp32"})
    core = build_learner(config, "cpu")
    load_weights(checkpoint, core.model)
    chunk: Any = core.model[0].module.eval()
    hidden: list[torch.Tensor] = []
    chunk.encoder.register_forward_hook(lambda _module, _inputs, output: hidden.append(output[:, 0]))
    tokens = random_tokens(30522, num_samples=1, length=100)
    with torch.inference_mode():
        chunk(**text_inputs(tokens[0], ModelOnRanks(config, core.layout, "cpu", [chunk])))
        expected = AutoModel.from_pretrained(source).eval()(input_ids=tokens).last_hidden_state[0]
    return (hidden[0] - expected).abs().max().item()
