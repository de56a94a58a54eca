"""`megatron-7b generate` on an imported chat model: the tokens are those of transformers' generate on the folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_7b.cli.main import main
from megatron_7b.tokenizer import load_tokenizer
from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.support.commands import run_command

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|pad|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
PROMPTS = ["the cat sat", "12 o'clock", ""]
NUM_TOKENS = 40
PENALTY = 1.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model whose texts end with several tokens: some that its greedy texts have, and one that none has."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny_tokenizer(folder)
    save_tiny_model("llama", folder, vocab_size=300)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    write_settings(folder, eos_token_id=None)
    texts = [transformers_tokens(folder, prompt_ids(folder, prompt)) for prompt in PROMPTS]
    write_settings(folder, eos_token_id=[texts[0][4], texts[1][7], 1])
    return folder


def write_settings(folder: Path, **settings: object) -> None:
    settings |= {"repetition_penalty": PENALTY, "min_p": 0.1}
    (folder / "generation_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def checkpoint(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("imported") / "checkpoint"
    assert main(["convert", "from-hf", "--input", str(folder), "--output", str(output)]) == 0
    return output


def prompt_ids(folder: Path, text: str) -> list[int]:
    return load_tokenizer(folder).encode(text) or [0]


def transformers_tokens(folder: Path, ids: list[int]) -> list[int]:
    """What transformers continues with, by the folder's own settings."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([ids])
    text = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NUM_TOKENS)
    return text[0, len(ids) :].tolist()


def generate(checkpoint: Path, *flags: object) -> tuple[list[dict[str, Any]], str]:
    how = () if "--num-beams" in flags else ("--greedy",)
    result = run_command("generate", "--checkpoint", checkpoint, *how, "--max-new-tokens", NUM_TOKENS, "--json", *flags)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])["samples"], result.stderr


def test_texts_are_those_of_transformers_and_end_where_theirs_do(folder: Path, checkpoint: Path):
    samples, notes = generate(checkpoint, *(word for prompt in PROMPTS for word in ("--prompt", prompt)))
    expected = [transformers_tokens(folder, prompt_ids(folder, prompt)) for prompt in PROMPTS]
    assert [sample["token_ids"] for sample in samples] == expected
    assert [len(text) for text in expected[:2]] != [NUM_TOKENS, NUM_TOKENS]
    assert samples[0]["finish_reason"] == "eod"
    for sample, prompt in zip(samples, PROMPTS, strict=True):
        ids = prompt_ids(folder, prompt)
        shown = sample["token_ids"][: -1 if sample["finish_reason"] == "eod" else None]
        tokenizer = load_tokenizer(folder)
        assert tokenizer.decode(ids) + sample["text"] == tokenizer.decode([*ids, *shown])
    assert "from generation_config.json: repetition_penalty 1.3; not applied: min_p 0.1" in notes


def test_flags_go_before_the_settings(checkpoint: Path):
    flags = ("--prompt", PROMPTS[0], "--repetition-penalty", 1.0)
    (sample,), notes = generate(checkpoint, *flags, "--ignore-eos")
    assert len(sample["token_ids"]) == NUM_TOKENS
    assert "repetition_penalty" not in notes


def test_a_chat_is_what_transformers_makes_of_it(folder: Path, checkpoint: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    earlier = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    (tmp_path / "chat.json").write_text(json.dumps(earlier))
    flags = ("--chat", "--system", "Nap.", "--messages", tmp_path / "chat.json", "--prompt", "on", "--prompt", "at")
    samples, _ = generate(checkpoint, *flags)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for sample, question in zip(samples, ("on", "at"), strict=True):
        messages = [{"role": "system", "content": "Nap."}, *earlier, {"role": "user", "content": question}]
        spelled = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert sample["prompt"] == spelled
        assert sample["token_ids"] == transformers_tokens(folder, ids)


def test_of_a_chat_the_reply_alone_is_printed(checkpoint: Path):
    arguments = (
        "generate",
        "--checkpoint",
        checkpoint,
        "--greedy",
        "--max-new-tokens",
        5,
        "--chat",
        "--prompt",
        "the cat",
    )
    result = run_command(*arguments)
    (sample,), _ = generate(checkpoint, "--chat", "--prompt", "the cat", "--max-new-tokens", 5)
    assert result.stdout == sample["text"] + "\n"


def test_beams_are_those_of_transformers(folder: Path, checkpoint: Path):
    from transformers import AutoModelForCausalLM

    flags = ("--num-beams", 4, "--num-return-sequences", 3, "--length-penalty", 1.5, "--early-stopping", "never")
    samples, notes = generate(checkpoint, "--prompt", PROMPTS[0], *flags)
    ids = torch.tensor([prompt_ids(folder, PROMPTS[0])])
    fields = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 1.5, "early_stopping": "never"}
    found = AutoModelForCausalLM.from_pretrained(folder).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_TOKENS,
        eos_token_id=[*json.loads((folder / "generation_config.json").read_text())["eos_token_id"], 0],
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **fields,
    )
    assert [sample["score"] for sample in samples] == pytest.approx(found.sequences_scores.tolist(), abs=1e-4)
    for sample, row in zip(samples, found.sequences[:, ids.shape[1] :].tolist(), strict=True):
        assert row[: len(sample["token_ids"])] == sample["token_ids"]
        assert not any(row[len(sample["token_ids"]) :])
    assert "repetition_penalty 1.3" in notes


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt", "x", "--num-beams", "2", "--temperature", "0.7"], "does not go with temperature 0.7"),
        (["--prompt", "x", "--num-beams", "2", "--num-samples", "3"], "num_return_sequences is 3, expected 1 to 2"),
        (["--prompt", "x", "--length-penalty", "2"], "length_penalty needs num_beams above 1"),
        (["--prompt", "x", "--num-beams", "200"], "needs a vocabulary of"),
        (["--prompt", "x", "--greedy", "--temperature", "1"], "contradict each other"),
        (["--prompt", "x", "--greedy", "--num-beams", "3"], "--num-beams 3 contradict each other"),
        (["--chat"], "there is nothing to answer"),
        (["--chat", "--prompt", "x", "--add-bos"], "do not go with a chat"),
        (["--messages", "{tmp}/absent.json"], "absent.json cannot be read"),
        (["--messages", "{tmp}/system.json", "--system", "x"], "begins with a system message already"),
        (["--prompt", "x", "--chat", "--tokenizer", "bytes"], "has no chat template"),
        (["--prompt", "x", "--repetition-penalty", "0"], "repetition_penalty is 0.0"),
    ],
)
def test_mistakes_are_told(
    flags: list[str], words: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "system.json").write_text('[{"role": "system", "content": "x"}]')
    given = [flag.format(tmp=tmp_path) for flag in flags]
    assert main(["generate", "--checkpoint", str(checkpoint), *given]) == 2
    assert words in capsys.readouterr().err
