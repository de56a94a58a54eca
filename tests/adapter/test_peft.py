"""Adapters against PEFT: its folders in and out, and its own training, step by step, at every layout."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_7b.checkpoint import read_config, resolve_checkpoint
from megatron_7b.checkpoint.base import find_base
from megatron_7b.checkpoint.weights import CheckpointWeights
from megatron_7b.cli.main import main
from megatron_7b.config.schema import RunConfig
from megatron_7b.conversion.adapters import applying
from megatron_7b.conversion.adapters.plan import plan_adapter, pruned, to_peft
from tests.adapter.peft_oracle import Training, load_base, save_adapter, saved_adapter, train_with_peft
from tests.conversion.tiny_models import save_tiny_model, save_tiny_t5, save_tiny_tokenizer
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import VOCAB_SIZE, run_steps, tiny_config

NUM_STEPS = 6
PREFIX = "base_model.model."
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "TP2 SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "DP2 shared": (2, {"use_distributed_optimizer": True}),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("llama", {"target_modules": "all-linear"}),
    "rsLoRA": ("llama", {"target_modules": ["q_proj", "v_proj", "o_proj", "up_proj"], "use_rslora": True}),
    "DoRA": ("llama", {"target_modules": "all-linear", "use_dora": True, "modules_to_save": ["lm_head"]}),
    "GPT-2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "BERT": ("bert", {"target_modules": ["query", "key", "output.dense"], "use_dora": True}),
    "T5": ("t5", {"target_modules": "all-linear"}),
    "AdaLoRA": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "down_proj", "up_proj"],
            "init_r": 6,
            "target_r": 3,
            "tinit": 1,
            "tfinal": 2,
            "total_step": 6,
            "orth_reg_weight": 0.1,
        },
    ),
    "one layer": ("qwen2", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
}


@dataclasses.dataclass
class Case:
    """A PEFT folder beside its base, and both as checkpoints."""

    base: Path
    peft: Path
    checkpoint: Path

    @property
    def config(self) -> RunConfig:
        """Of a run that trains the adapter further on the batches of `tiny_runs`."""
        config, tiny = read_config(self.checkpoint), tiny_config()
        # Gradients that are nearly zero are noise, which AdamW would make as large as the others.
        epsilon = 1e-3 if config.model.architecture == "t5" else 1e-6
        return dataclasses.replace(
            config,
            model=dataclasses.replace(
                config.model,
                transformer_impl="local",
                make_vocab_size_divisible_by=8,
                hidden_dropout=0.0,
                attention_dropout=0.0,
            ),
            training=dataclasses.replace(tiny.training, train_steps=NUM_STEPS),
            data=tiny.data,
            optimizer=dataclasses.replace(tiny.optimizer, lr=3e-3, adam_eps=epsilon),
        )

    @functools.cached_property
    def training(self) -> Training:
        """PEFT's own."""
        return train_with_peft(self.base, self.peft, self.config, NUM_STEPS)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Return what makes a case, each once."""
    root = tmp_path_factory.mktemp("peft")

    @functools.cache
    def make(name: str) -> Case:
        from peft import AdaLoraConfig, LoraConfig

        model, options = CASES[name]
        base, folder = root / model, root / name
        if not base.is_dir() and model == "t5":
            save_tiny_t5(base, vocab_size=VOCAB_SIZE)
        elif not base.is_dir():
            save_tiny_model(model, base, vocab_size=VOCAB_SIZE, num_hidden_layers=2)
        config = (
            AdaLoraConfig(lora_alpha=8, **options) if name == "AdaLoRA" else LoraConfig(r=4, lora_alpha=8, **options)
        )
        save_adapter(base, folder / "peft", config)
        assert convert("from-hf", "--input", folder / "peft", "--base", base, "--output", folder / "checkpoint") == 0
        return Case(base, folder / "peft", folder / "checkpoint")

    return make


def convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def train_further(config: RunConfig, checkpoint: Path, output: Path) -> list[tuple[float, float]]:
    """Entry point of a rank: train an adapter further, save it, and return (loss, gradient norm) of each step."""
    from megatron_7b.checkpoint.base import TrainedPart, describe_base
    from megatron_7b.checkpoint.load import load_weights
    from megatron_7b.checkpoint.manifest import Counters
    from megatron_7b.checkpoint.save import save_checkpoint
    from megatron_7b.training.learner import build_learner

    learner = build_learner(config, "cpu")
    on_ranks, base = learner.on_ranks, find_base(checkpoint)
    assert on_ranks.adapter is not None
    assert on_ranks.names_apart is not None
    assert base is not None
    load_weights(base, learner.model, may_lack=on_ranks.adapter_names, settle=on_ranks.adapter.settle)
    load_weights(checkpoint, learner.model, learner.optimizer, names=on_ranks.names_apart)
    results = run_steps(learner, range(NUM_STEPS))
    save_checkpoint(
        output,
        chunks=learner.model,
        optimizer=learner.optimizer,
        counters=Counters(step=NUM_STEPS, optimizer_steps=NUM_STEPS),
        config=config,
        layout=learner.layout,
        part=TrainedPart(on_ranks.names_apart, describe_base(base)),
    )
    return results


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint under PEFT's names."""
    tensors = to_peft(plan_adapter(read_config(checkpoint)), CheckpointWeights(checkpoint))
    return {PREFIX + name: tensor for name, tensor in pruned(dict(tensors))[0].items()}


def check_training(case: Case, layout: str, folder: Path, *, tolerance: float = 1e-5) -> Path:
    """Train with both, compare, and return the checkpoint of ours."""
    size, parallel = LAYOUTS[layout]
    config = dataclasses.replace(case.config, parallel=dataclasses.replace(case.config.parallel, **parallel))
    expected = case.training
    for results in run_ranks(size, train_further, config, case.checkpoint, folder):
        for ours, theirs in zip(results, expected.results, strict=True):
            assert ours == pytest.approx(theirs, rel=tolerance)
    saved = resolve_checkpoint(folder)
    tensors = tensors_of(saved)
    assert tensors.keys() == expected.tensors.keys()
    for name, tensor in tensors.items():
        assert torch.allclose(tensor, expected.tensors[name], rtol=0, atol=tolerance), name
    return saved


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["LoRA", "rsLoRA", "DoRA", "AdaLoRA"])
def test_training_equals_that_of_peft(name: str, layout: str, case: Callable[[str], Case], tmp_path: Path):
    saved = check_training(case(name), layout, tmp_path / "run")
    if (name, layout) in (("DoRA", "TP2 SP"), ("DoRA", "PP2"), ("AdaLoRA", "TP2")):
        assert convert("to-hf", "--checkpoint", saved, "--output", tmp_path / "out") == 0
        exported = saved_adapter(tmp_path / "out")
        assert exported.keys() == case(name).training.tensors.keys()
        assert all(exported[key].equal(tensor) for key, tensor in tensors_of(saved).items())


@pytest.mark.parametrize("name", ["GPT-2", "BERT", "T5"])
def test_training_of_other_kinds_equals_that_of_peft(name: str, case: Callable[[str], Case], tmp_path: Path):
    # T5 does not scale its scores down, so that rounding grows: one norm differs by 6.5e-5.
    check_training(case(name), "TP2 SP", tmp_path / "run", tolerance=2e-4 if name == "T5" else 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_folder_comes_out_as_it_went_in(name: str, case: Callable[[str], Case], tmp_path: Path):
    assert convert("to-hf", "--checkpoint", case(name).checkpoint, "--output", tmp_path / "out") == 0
    before, after = saved_adapter(case(name).peft), saved_adapter(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(before[key].equal(after[key]) for key in before)
    configs = [
        json.loads((folder / "adapter_config.json").read_text()) for folder in (case(name).peft, tmp_path / "out")
    ]
    for key in ("r", "lora_alpha", "use_dora", "use_rslora", "fan_in_fan_out", "modules_to_save", "peft_type"):
        assert configs[0][key] == configs[1][key], key


@pytest.mark.parametrize(("name", "dtype"), [("DoRA", "fp32"), ("GPT-2", "bf16"), ("T5", "fp32")])
def test_a_merged_model_is_what_peft_merges(name: str, dtype: str, case: Callable[[str], Case], tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    checkpoint = case(name).checkpoint
    assert convert("to-hf", "--checkpoint", checkpoint, "--output", tmp_path / "out", "--merge", "--dtype", dtype) == 0
    theirs = PeftModel.from_pretrained(load_base(case(name).base), case(name).peft).merge_and_unload()
    auto_class = AutoModelForSeq2SeqLM if name == "T5" else AutoModelForCausalLM
    ours = auto_class.from_pretrained(tmp_path / "out", dtype="auto")
    number_format = torch.float32 if dtype == "fp32" else torch.bfloat16
    expected = {key: tensor.to(number_format) for key, tensor in theirs.state_dict().items()}
    for key, tensor in ours.state_dict().items():
        assert tensor.dtype == number_format
        assert torch.allclose(tensor, expected[key], rtol=1e-6 if dtype == "fp32" else 8e-3, atol=1e-6), key


def test_the_tokenizer_goes_along_and_peft_is_not_needed(
    tmp_path: Path, case: Callable[[str], Case], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from transformers import AutoTokenizer

    base, peft = tmp_path / "base", tmp_path / "peft"
    shutil.copytree(case("LoRA").base, base)
    save_tiny_tokenizer(base)
    shutil.copytree(case("LoRA").peft, peft)
    named = json.loads((peft / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    (peft / "adapter_config.json").write_text(json.dumps(named))
    monkeypatch.setattr(applying, "find_spec", lambda _name: None)
    assert convert("from-hf", "--input", peft, "--output", tmp_path / "c") == 0  # the base is what it names
    arguments = ("to-hf", "--checkpoint", tmp_path / "c", "--output", tmp_path / "out", "--base-name", "some/base")
    assert convert(*arguments) == 0
    assert "PEFT is not installed" in capsys.readouterr().err
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("the cat") == AutoTokenizer.from_pretrained(
        base
    ).encode("the cat")
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == (base / "chat_template.jinja").read_bytes()
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    assert convert(*arguments, "--overwrite") == 0
    assert convert("to-hf", "--checkpoint", tmp_path / "c", "--output", tmp_path / "out", "--merge", "--overwrite") == 2
    assert "is no Hugging Face model" in capsys.readouterr().err


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "peft_type 'IA3', which is not supported"),
    ({"peft_type": "PREFIX_TUNING"}, "supported are LORA"),
    ({"bias": "all"}, "bias is 'all': biases of the base would be trained"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is {'q_proj': 2}: all layers of an adapter have one rank"),
    ({"alpha_pattern": {"q_proj": 2}, "lora_bias": True}, "lora_bias is True"),
    ({"init_lora_weights": "pissa"}, "takes something out of the base's weights"),
    ({"use_new_method": True}, "use_new_method is True: this is not known here"),
    ({"r": "8"}, "has r '8', expected a number"),
    ({"use_dora": True}, "missing:\n  model.layers.0.mlp.down_proj.lora_magnitude_vector"),
    ({"r": 2}, "lora_A.weight is [4, 48], its configuration and the base make it [2, 48]"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[next(iter(changes)) for changes, _ in REFUSED])
def test_what_cannot_be_converted_is_refused_by_name(
    changes: dict[str, Any],
    message: str,
    case: Callable[[str], Case],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    shutil.copytree(case("LoRA").peft, tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    base = find_base(case("LoRA").checkpoint)
    assert convert("from-hf", "--input", tmp_path / "peft", "--base", base, "--output", tmp_path / "out") == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


def test_a_tied_module_that_was_trained_apart_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from peft import LoraConfig

    save_tiny_model("llama_tied", tmp_path / "base")
    arguments = ("--base", tmp_path / "base", "--output", tmp_path / "out", "--overwrite")
    for ties in (False, True):
        config = LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=ties)
        save_adapter(tmp_path / "base", tmp_path / "peft", config)
        assert convert("from-hf", "--input", tmp_path / "peft", *arguments) == (0 if ties else 1)
    assert "lm_head.weight is tied to a module of modules_to_save in the base" in capsys.readouterr().err
    assert convert("to-hf", "--checkpoint", tmp_path / "out", "--output", tmp_path / "again") == 0


def test_mistakes_name_the_option(case: Callable[[str], Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, whole = case("LoRA").checkpoint, find_base(case("LoRA").checkpoint)
    for arguments, message in (
        (("--checkpoint", whole, "--merge"), "holds a whole model, so there is nothing for --merge"),
        (("--checkpoint", folder, "--dtype", "bf16"), "--dtype bf16 is for whole models"),
        (("--checkpoint", folder, "--merge", "--base-name", "x"), "a merged model names no base"),
    ):
        assert convert("to-hf", "--output", tmp_path / "out", *arguments) == 2
        assert message in capsys.readouterr().err
    other = find_base(case("GPT-2").checkpoint)
    for arguments, message in (
        (("--base", tmp_path / "nothing"), "which does not exist"),
        (("--base", other), "which the base"),
        (("--base", folder), "holds an adapter only"),
        (("--base", whole, "--dtype", "bf16"), "is an adapter, which is stored as it is"),
    ):
        assert convert("from-hf", "--input", case("LoRA").peft, "--output", tmp_path / "out", *arguments) != 0
        assert message in capsys.readouterr().err
    assert convert("from-hf", "--input", case("LoRA").base, "--output", tmp_path / "out", "--base", whole) == 2
    assert "is no adapter, so it has no base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
