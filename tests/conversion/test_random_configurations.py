"""GPT-2 and BERT of random legal shapes, from transformers and back, with the same logits on one and on two ranks."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_7b.cli.main import main
from megatron_7b.conversion.parity import hugging_face_logits, random_tokens
from tests.conversion.growing_models import sharded_logits
from tests.conversion.tiny_models import randomize
from tests.support.ranks import run_ranks

LENGTH = 24


def random_config(model_type: str, draw: random.Random) -> dict[str, Any]:
    """Draw what config.json may say: odd vocabularies, heads of any width, everything tied or not."""
    width, heads = draw.choice([3, 4, 7]), draw.choice([2, 4])  # so that two tensor ranks share them
    common = {
        "vocab_size": draw.randrange(31, 200),
        "tie_word_embeddings": draw.random() < 0.6,
        "initializer_range": draw.choice([0.02, 0.1]),
        "use_cache": draw.random() < 0.5,
    }
    inner = draw.randrange(5, 30) * 2
    if model_type == "gpt2":
        return common | {
            "n_embd": width * heads,
            "n_head": heads,
            "n_layer": draw.randrange(1, 4),
            "n_positions": draw.randrange(LENGTH, 60),
            "n_inner": draw.choice([None, inner]),
            "activation_function": draw.choice(["gelu_new", "gelu_pytorch_tanh"]),
            "layer_norm_epsilon": draw.choice([1e-5, 1e-3]),
            "reorder_and_upcast_attn": draw.random() < 0.3,
            "resid_pdrop": draw.choice([0, 0.1]),
            "eos_token_id": draw.choice([None, 1, [1, 2]]),
        }
    return common | {
        "hidden_size": width * heads,
        "num_attention_heads": heads,
        "num_hidden_layers": draw.randrange(1, 4),
        "intermediate_size": inner,
        "max_position_embeddings": draw.randrange(LENGTH, 60),
        "type_vocab_size": draw.randrange(1, 5),
        "layer_norm_eps": draw.choice([1e-12, 1e-3]),
        "hidden_dropout_prob": draw.choice([0, 0.1]),
        "pad_token_id": draw.choice([0, None, 3]),
        "classifier_dropout": draw.choice([None, 0.1]),
        "id2label": {0: "a", 1: "b", 2: "c"},
    }


def save_random(model_type: str, folder: Path, draw: random.Random) -> int:
    """Save a random model in one file or several, its config.json whole or reduced; returns its vocabulary's size."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    config = AutoConfig.for_model(model_type, **random_config(model_type, draw))
    auto = AutoModelForCausalLM if model_type == "gpt2" else AutoModelForMaskedLM
    model = auto.from_config(config, dtype=torch.float32)
    randomize(model)
    model.save_pretrained(folder, max_shard_size=draw.choice(["5GB", "3KB"]))
    if draw.random() < 0.5:
        defaults = AutoConfig.for_model(model_type).to_dict()
        written = json.loads((folder / "config.json").read_text())
        needed = {
            key: value for key, value in written.items() if key == "model_type" or value != defaults.get(key, ...)
        }
        (folder / "config.json").write_text(json.dumps(needed))
    return int(config.vocab_size)


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "megatron-bert"])
def test_there_and_back_on_one_and_two_ranks(model_type: str, tmp_path: Path) -> None:
    draw, checkpoints, references = random.Random(model_type), [], []
    for number in range(3):
        source, checkpoint, result = (tmp_path / f"{name}{number}" for name in ("in", "c", "out"))
        vocab_size = save_random(model_type, source, draw)
        assert main(["convert", "from-hf", "--input", str(source), "--output", str(checkpoint)]) == 0
        assert main(["convert", "to-hf", "--checkpoint", str(checkpoint), "--output", str(result)]) == 0
        tokens = random_tokens(vocab_size, length=LENGTH)
        expected = hugging_face_logits(source, tokens)
        assert expected.std() > 0.3
        torch.testing.assert_close(hugging_face_logits(result, tokens), expected, atol=1e-5, rtol=1e-5)
        checkpoints.append((checkpoint, tokens.numpy()))
        references.append(expected)
    for logits, expected in zip(run_ranks(2, sharded_logits, checkpoints)[0], references, strict=True):
        found = torch.from_numpy(logits)[..., : expected.shape[-1]]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
