"""Conversations to learn from: which tokens are trained, in the formats and under the templates that people have."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_7b.data.conversations.formats import find_format, read_record
from megatron_7b.data.conversations.reading import read_conversations
from megatron_7b.data.conversations.trained import ConversationEncoder, EncodedConversation
from megatron_7b.data.records.reading import RecordError
from megatron_7b.errors import ConfigError, DataFormatError
from megatron_7b.tokenizer import load_tokenizer
from megatron_7b.tokenizer.chat_template import ChatTemplate
from megatron_7b.tokenizer.default_chat_template import find_chat_template
from tests.conversion.tiny_models import save_foreign_tokenizer
from tests.support.assets import asset
from tests.support.commands import run_command

TEMPLATES = Path(__file__).parent / "chat_templates"
SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|start|>",
    "<|message|>",
    "<|channel|>",
    "<|end|>",
]

SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "turns": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello, 漢字"},
        {"role": "user", "content": "Hello, 漢字"},  # the same words, which are not trained
        {"role": "assistant", "content": " Bye \n"},
    ],
    "system": [SYSTEM, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}],
    "tool": [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "two"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2"},
    ],
    "thought": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "<think>\nso\n</think>\n\nBye"},
    ],
}
ENDED = ["Hello, 漢字<|im_end|>", " Bye \n<|im_end|>"]
TRUTH: dict[tuple[str, str], list[str]] = {
    ("chatml", "turns"): ENDED,
    ("chatml", "system"): ["Yes<|im_end|>"],
    ("smollm2", "turns"): ENDED,
    ("smollm2", "system"): ["Yes<|im_end|>"],
    ("llama3", "turns"): ["Hello, 漢字<|eot_id|>", "Bye<|eot_id|>"],
    ("llama3", "system"): ["Yes<|eot_id|>"],
    ("llama3", "tool"): ['{"name": "add", "arguments": {"a": 1}}<|eot_id|>', "It is 2<|eot_id|>"],
    ("qwen2_5", "turns"): ENDED,
    ("qwen2_5", "system"): ["Yes<|im_end|>"],
    ("qwen2_5", "tool"): [
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
        "It is 2<|im_end|>",
    ],
    ("qwen3", "turns"): ["Hello, 漢字<|im_end|>", "<think>\n\n</think>\n\n Bye \n<|im_end|>"],
    ("qwen3", "system"): ["<think>\n\n</think>\n\nYes<|im_end|>"],
    ("qwen3", "thought"): ["Hello<|im_end|>", "<think>\nso\n</think>\n\nBye<|im_end|>"],
    ("gemma", "turns"): ["Hello, 漢字<end_of_turn>", "Bye<end_of_turn>"],
    ("gemma", "system"): ["Yes<end_of_turn>"],
    ("mistral", "turns"): ["Hello, 漢字</s>", "Bye</s>"],
    ("mistral", "system"): ["Yes</s>"],
    ("channels", "turns"): [
        "<|channel|>final<|message|>Hello, 漢字<|end|>",
        "<|channel|>final<|message|> Bye \n<|end|>",
    ],
    ("marked", "turns"): ["Hello, 漢字</s>", " Bye \n</s>"],
    ("marked", "system"): ["Yes</s>"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of single bytes that has the special tokens of all families."""
    path = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: token for token, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    return path


def encoder(folder: Path | str, template: str | None, train_on: Any = "assistant") -> ConversationEncoder:
    tokenizer = load_tokenizer(folder)
    file = None if template is None else TEMPLATES / f"{template}.jinja"
    return ConversationEncoder(tokenizer, ChatTemplate(tokenizer, find_chat_template(tokenizer, file)), train_on)


def record(messages: list[dict[str, Any]], **keys: Any) -> Any:
    whole = {"messages": messages, **keys}
    return read_record(whole, find_format(whole))


def trained(folder: Path | str, encoded: EncodedConversation) -> list[str]:
    """The texts of the trained tokens, one per run of them."""
    decode = load_tokenizer(folder).decode
    edges = np.flatnonzero(np.diff(encoded.loss_mask > 0, prepend=False, append=False))
    return [decode(encoded.ids[start:stop].tolist()) for start, stop in edges.reshape(-1, 2)]


@pytest.mark.parametrize(("template", "name"), TRUTH, ids=["-".join(key) for key in TRUTH])
def test_trained_are_the_tokens_that_the_model_has_to_write(folder: Path, template: str, name: str):
    encoded = encoder(folder, template).encode(record(CONVERSATIONS[name]))
    assert trained(folder, encoded) == TRUTH[template, name]
    assert load_tokenizer(folder).decode(encoded.ids.tolist()) == encoded.text
    ends = [load_tokenizer(folder).decode(encoded.ids[:end].tolist()) for end in encoded.turn_ends]
    assert all(text.endswith(end) for text, end in zip(ends, TRUTH[template, name], strict=True))


@pytest.mark.parametrize(
    ("train_on", "weights", "expected"),
    [
        ("last", (None, None), [" Bye \n<|im_end|>"]),
        ("assistant", (None, 0), ["Hello, 漢字<|im_end|>"]),
        ("last", (1, None), ENDED),
        ("assistant", (0.5, None), ENDED),
    ],
)
def test_which_messages_count(folder: Path, train_on: str, weights: tuple[Any, Any], expected: list[str]):
    messages = [dict(message) for message in CONVERSATIONS["turns"]]
    messages[1]["weight"], messages[3]["weight"] = weights
    encoded = encoder(folder, "chatml", train_on).encode(record(messages))
    assert trained(folder, encoded) == expected
    assert encoded.loss_mask[encoded.loss_mask > 0].min() == (0.5 if 0.5 in weights else 1)


def test_everything_may_be_trained_but_what_weighs_nothing(folder: Path):
    messages = [{**CONVERSATIONS["turns"][0], "weight": 0}, *CONVERSATIONS["turns"][1:]]
    whole = encoder(folder, "chatml", "all").encode(record(CONVERSATIONS["turns"]))
    assert whole.loss_mask.all()
    part = encoder(folder, "chatml", "all").encode(record(messages))
    assert [
        part.text[start:stop] for (start, stop), mask in zip(part.offsets, part.loss_mask, strict=True) if not mask
    ] == [
        "H",
        "i",
    ]


@pytest.mark.parametrize("kind", ["hugging_face", "bpe", "bytes"])
def test_every_kind_of_tokenizer_says_which_characters_a_token_covers(kind: str, folder: Path, tmp_path: Path):
    place: Path | str = folder
    if kind == "bpe":
        save_foreign_tokenizer("bpe", tmp_path / "it")
        place = tmp_path / "it" / "tokenizer.model"
    elif kind == "bytes":
        place = "bytes"
    tokenizer = load_tokenizer(place)
    text = "Hello, 漢字\n naïve  x"
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text)
    covered = {index for start, stop in offsets for index in range(start, max(stop, start + 1))}
    assert covered >= set(range(len(text)))


@pytest.mark.parametrize("place", ["hugging_face", "bytes"])
def test_a_tokenizer_without_template_gets_one_that_ends_turns_as_generation_does(place: str, folder: Path):
    where = folder if place == "hugging_face" else "bytes"
    encoded = encoder(where, None).encode(record(CONVERSATIONS["turns"]))
    stop = load_tokenizer(where).eod_id if place == "bytes" else load_tokenizer(folder).encode("<|im_end|>")[0]
    assert encoded.ids[encoded.turn_ends - 1].tolist() == [stop, stop]


def test_a_real_chat_model():
    folder = asset("smollm2-135m")
    assert trained(folder, encoder(folder, None).encode(record(CONVERSATIONS["turns"]))) == ENDED


def test_formats_are_different_spellings_of_the_same(folder: Path):
    expected = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes"},
    ]
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
    spellings: list[dict[str, Any]] = [
        {"messages": expected, "id": 7},
        {"messages": [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in expected]},
        {"conversations": turns, "system": "Be brief."},
        {"conversations": [{"from": "system", "value": "Be brief."}, *turns]},
        {"instruction": "Hi", "input": "", "output": "Yes", "system": "Be brief."},
        {"prompt": "Hi", "completion": "Yes", "system": "Be brief."},
        {"prompt": expected[:2], "completion": expected[2:]},
    ]
    for spelling in spellings:
        assert list(read_record(spelling, find_format(spelling)).conversation.messages) == expected
    longer = {"instruction": "And", "input": "so?", "output": "Bye", "history": [["Hi", "Yes"]]}
    messages = read_record(longer, find_format(longer)).conversation.messages
    assert [message["content"] for message in messages] == ["Hi", "Yes", "And\nso?", "Bye"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "it is not JSON: Expecting property name"),
        (b'["Hi"]', "it is a JSON list, expected an object"),
        (b'{"messages": "\xff"}', "byte 15 is not UTF-8"),
        (b'{"text": "Hi"}', "its keys are ['text'], expected 'messages'; 'conversations';"),
        (b'{"instruction": "Hi"}', "it has no 'output', which the format alpaca needs"),
        (b'{"messages": [], "prompt": "a", "completion": "b"}', "the keys of several formats: messages, prompt"),
        (b'{"messages": []}', "it has no messages"),
        (b'{"messages": [{"content": "Hi"}]}', "message 1 has no 'role', expected a text"),
        (b'{"messages": [{"role": "usr", "content": "Hi"}]}', "'usr', expected system, .* mean user"),
        (b'{"messages": [{"role": "user", "content": " "}]}', r"message 1 \(user\) is empty"),
        (b'{"messages": [{"role": "user"}]}', r"message 1 \(user\) has no content"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a surrogate pair"),
        (b'{"messages": [{"role": "user", "content": "Hi"}]}', "no message is the assistant's"),
        (b'{"messages": [{"role": "assistant", "content": "Hi", "weight": -1}]}', "has the weight -1"),
        (b'{"messages": [{"role": "assistant", "content": "Hi", "weight": 0}]}', "no token of it would be trained"),
        (b'{"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}', "a part of type 'image'"),
        (b'{"prompt": "Hi", "completion": "a"}', "it is of the format prompt, those before it are of the format mess"),
    ],
)
def test_every_mistake_is_named_with_its_line(line: bytes, words: str, folder: Path, tmp_path: Path):
    good = json.dumps({"messages": CONVERSATIONS["system"]}).encode()
    file = tmp_path / "it.jsonl"
    file.write_bytes(b"\n".join([good, line, b"", good]))
    with pytest.raises(
        DataFormatError, match=rf"1 of 3 conversations cannot be used:\n  {file}:2: .*{_pattern(words)}"
    ):
        list(read_conversations(file, encoder(folder, "chatml").encode))


@pytest.mark.parametrize(
    ("whole", "words"),
    [
        ({"conversations": [{"from": "humann", "value": "Hi"}]}, r"conversations\[0\] is from 'humann'.*mean human"),
        ({"conversations": [{"from": "gpt", "value": None}]}, r"message 1 \(assistant\) has no content"),
        ({"prompt": "Hi", "completion": ["a"]}, "neither two texts nor two lists"),
        ({"instruction": "Hi", "output": "a", "history": ["b"]}, "history is not a list of"),
        ({"instruction": 1, "output": "a"}, "it has 'instruction' of type int"),
    ],
)
def test_mistakes_of_the_other_formats(whole: dict[str, Any], words: str):
    with pytest.raises(RecordError, match=words):
        read_record(whole, find_format(whole))


def _pattern(words: str) -> str:
    return words.replace("['text']", r"\['text'\]")


def test_a_mark_of_byte_order_and_other_line_ends_do_no_harm(folder: Path, tmp_path: Path):
    good = json.dumps({"messages": CONVERSATIONS["system"]}).encode()
    (tmp_path / "it.jsonl").write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\r\n" + good)
    read = list(read_conversations(tmp_path / "it.jsonl", encoder(folder, "chatml").encode))
    assert [line for line, _ in read] == [1, 3]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ messages[-1].content.upper() }}{{ messages | length }}", r"message 2 \(assistant\) cannot be found"),
        ("{% for m in messages %}{{ m.content | length }}{% endfor %}", "cannot be found"),
        ("{{ raise_exception('no') }}", "cannot be applied to the messages: no"),
    ],
)
def test_a_template_that_hides_its_messages_is_refused(source: str, words: str, folder: Path):
    tokenizer = load_tokenizer(folder)
    with pytest.raises(RecordError, match=words):
        ConversationEncoder(tokenizer, ChatTemplate(tokenizer, source)).encode(record(CONVERSATIONS["turns"]))


def test_the_command_shows_and_counts_what_is_trained(folder: Path, tmp_path: Path):
    file = tmp_path / "it.jsonl"
    file.write_text("\n".join(json.dumps({"messages": CONVERSATIONS[name]}) for name in ("turns", "system")))
    words = ["data", "chat", "--input", file, "--tokenizer-model", folder]
    words += ["--chat-template", TEMPLATES / "qwen2_5.jinja"]
    shown = run_command(*map(str, words), "--show", "1", "--seq-length", "90").stdout
    assert "⟦\n" not in shown
    assert "⟦Hello, 漢字<|im_end|>⟧" in shown
    assert "2 conversations, " in shown
    assert "1 conversations are longer than a row" in shown
    lines = [json.loads(line) for line in run_command(*map(str, words), "--json").stdout.splitlines()]
    encoded = encoder(folder, "qwen2_5").encode(record(CONVERSATIONS["turns"]))
    assert lines[0] == {
        "line": 1,
        "ids": encoded.ids.tolist(),
        "loss_mask": encoded.loss_mask.astype(int).tolist(),
    }


def test_a_template_file_that_is_not_there(folder: Path):
    with pytest.raises(ConfigError, match="the chat template .*nothing cannot be read"):
        find_chat_template(load_tokenizer(folder), Path("nothing"))
