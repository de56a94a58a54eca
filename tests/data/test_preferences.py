"""Files of preferences: what they may look like, which tokens are the reply, and every mistake by its line."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_7b.data.conversations.trained import ConversationEncoder
from megatron_7b.data.preferences.encoding import PreferenceEncoder
from megatron_7b.errors import DataFormatError
from megatron_7b.tokenizer import Tokenizer, load_tokenizer
from megatron_7b.tokenizer.chat_template import ChatTemplate
from megatron_7b.tokenizer.default_chat_template import default_chat_template
from tests.conversion.tiny_models import save_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tiny_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture
def encoder(tokenizer: Tokenizer) -> PreferenceEncoder:
    template = ChatTemplate(tokenizer, default_chat_template(tokenizer))
    return PreferenceEncoder(tokenizer, ConversationEncoder(tokenizer, template))


def written(folder: Path, *records: Any) -> Path:
    file = folder / "records.jsonl"
    file.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in records))
    return file


def texts(encoder: PreferenceEncoder, tokenizer: Tokenizer, file: Path, *, kto: bool = False) -> list[list[str]]:
    """Return of each record what its parts say, with the reply in brackets."""
    found = []
    for record in encoder.labelled(file) if kto else encoder.pairs(file):
        assert record.token_values is not None
        parts, place = [], 0
        for ids in record.sequences:
            mask = record.token_values[place : place + len(ids)]
            before, reply = ids[: int(mask.argmax())].tolist(), ids[mask > 0].tolist()
            parts.append(f"{tokenizer.decode(before)}[{tokenizer.decode(reply)}]")
            place += len(ids)
        found.append(parts)
    return found


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_texts_are_taken_as_they_are_and_ended(encoder: PreferenceEncoder, tokenizer: Tokenizer, tmp_path: Path):
    end = tokenizer.spell(tokenizer.eod_id or 0)
    file = written(
        tmp_path,
        {"prompt": "the cat", "chosen": " sat", "rejected": f" mat{end}"},
        {"chosen": "the cat sat on", "rejected": "the cat at"},
    )
    assert texts(encoder, tokenizer, file) == [
        [f"the cat[ sat{end}]", f"the cat[ mat{end}]"],
        [f"the cat[ sat on{end}]", f"the cat[ at{end}]"],
    ]


def test_messages_in_all_their_spellings_are_the_same(encoder: PreferenceEncoder, tokenizer: Tokenizer, tmp_path: Path):
    """The prompt by itself, as a text, at the beginning of both replies, or both by itself and there; CRLF and BOM."""
    before = [said("user", "the cat")]
    chosen, rejected = [said("assistant", "sat")], [said("assistant", "on a mat")]
    spellings: list[dict[str, Any]] = [
        {"prompt": before, "chosen": chosen, "rejected": rejected},
        {"prompt": "the cat", "chosen": chosen, "rejected": rejected},
        {"chosen": before + chosen, "rejected": before + rejected},
        {"prompt": before, "chosen": before + chosen, "rejected": before + rejected},
        {"prompt": "the cat", "chosen": before + chosen, "rejected": before + rejected, "score": 7},
    ]
    file = written(tmp_path, *spellings)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n\r\n"))
    found = texts(encoder, tokenizer, file)
    assert len(found) == len(spellings)
    assert all(one == found[0] for one in found)
    prompt, reply = found[0][0].split("[")
    assert "the cat" in prompt
    assert reply.startswith("sat")


def test_only_the_assistants_words_of_a_reply_count(encoder: PreferenceEncoder, tmp_path: Path):
    reply = [said("assistant", "cat"), said("tool", "mat"), said("assistant", "sat")]
    prompt = [said("system", "on"), said("user", "the"), said("assistant", "a"), said("user", "at")]
    (record,) = encoder.pairs(
        written(tmp_path, {"prompt": prompt, "chosen": reply, "rejected": [said("assistant", "no")]})
    )
    assert record.token_values is not None
    mask = record.token_values[: len(record.sequences[0])]
    runs = int(((mask[1:] > 0) & (mask[:-1] == 0)).sum())
    assert runs == 2


def test_labelled_replies_have_partners_of_other_prompts(
    encoder: PreferenceEncoder, tokenizer: Tokenizer, tmp_path: Path
):
    """Each gets the reply of the nearest line before it with another prompt, the first that of the last; pairs give
    two."""
    records = [
        {"prompt": "a", "completion": " cat", "label": True},
        {"prompt": "a", "completion": " mat", "label": False},
        {"prompt": "on", "completion": " sat", "label": True},
    ]
    end = tokenizer.spell(tokenizer.eod_id or 0)
    assert texts(encoder, tokenizer, written(tmp_path, *records), kto=True) == [
        [f"a[ cat{end}]", f"a[ sat{end}]"],
        [f"a[ mat{end}]", f"a[ sat{end}]"],
        [f"on[ sat{end}]", f"on[ mat{end}]"],
    ]
    pairs = [{"prompt": "a", "chosen": " cat", "rejected": " mat"}, {"prompt": "on", "chosen": " at", "rejected": " a"}]
    found = list(encoder.labelled(written(tmp_path, *pairs)))
    assert [record.values.tolist() for record in found if record.values is not None] == [[1], [0], [1], [0]]


GOOD = {"prompt": "the cat", "chosen": " sat", "rejected": " mat"}
HELLO = [said("user", "Hi")]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "x", "chosen": "y"}, "it has no 'rejected', expected a text; its keys are ['chosen', 'prompt']"),
        ({"prompt": "x", "answer": "y"}, "its keys are ['answer', 'prompt'], expected 'prompt', 'chosen'"),
        ({**GOOD, "rejected": " sat"}, "chosen and rejected are the same"),
        ({**GOOD, "chosen": "  "}, "'chosen' is empty"),
        ({**GOOD, "prompt": ["x"]}, "prompt is a list of messages, chosen is a text"),
        ({**GOOD, "prompt": 3}, "it has 'prompt' of type int, expected a text"),
        ({**GOOD, "system": "y"}, "a 'system' goes with messages"),
        ({"chosen": "one", "rejected": "two"}, "chosen and rejected do not begin with the same text"),
        ({"chosen": "one", "rejected": "one two"}, "chosen is nothing but what both begin with"),
        ({**GOOD, "chosen": [said("assistant", "y")]}, "chosen is a list of messages, rejected is a text"),
        (
            {"prompt": HELLO, "chosen": [said("assistant", "y")], "rejected": [said("assistant", "z")]},
            "it has chosen and rejected, as messages, those before it have chosen and rejected, as texts",
        ),
        ({"prompt": HELLO, "chosen": [said("asistant", "y")], "rejected": [said("assistant", "z")]}, "did you mean"),
        ({"prompt": HELLO, "chosen": [said("assistant", " ")], "rejected": [said("assistant", "z")]}, "is empty"),
        (
            {"chosen": [said("user", "a"), said("assistant", "b")], "rejected": [said("user", "c")]},
            "the prompts differ",
        ),
        (
            {
                "prompt": HELLO,
                "chosen": [said("user", "No"), said("assistant", "b")],
                "rejected": [said("assistant", "c")],
            },
            "do the prompts differ?",
        ),
        ({"prompt": "x", "completion": "y", "label": True}, "it has a label, as texts, those before it have chosen"),
        ({"prompt": "x", "completion": "y", "label": 1}, "the label 1, expected true"),
        ("[1, 2]", "it is a JSON list, expected an object"),
        ('{"prompt": ', "it is not JSON"),
    ],
)
def test_every_mistake_is_named_with_its_line(record: Any, words: str, encoder: PreferenceEncoder, tmp_path: Path):
    file = written(tmp_path, GOOD, record, GOOD)
    with pytest.raises(DataFormatError) as raised:
        list(encoder.pairs(file))
    assert f"1 of 3 pairs of replies cannot be used:\n  {file}:2: " in str(raised.value)
    assert words in str(raised.value)


def test_labels_are_learned_with_another_loss(encoder: PreferenceEncoder, tmp_path: Path):
    file = written(tmp_path, {"prompt": "x", "completion": "y", "label": True})
    with pytest.raises(DataFormatError, match=r":1: .*--finetune.preference-loss kto"):
        list(encoder.pairs(file))
