"""Conversations spelled out by chat templates: text and tokens equal transformers'."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_7b.errors import ConfigError
from megatron_7b.generation.chat import encode_conversation, read_conversation
from megatron_7b.generation.prompts import encode_prompt
from megatron_7b.tokenizer import load_tokenizer
from megatron_7b.tokenizer.chat_template import ChatTemplate, Conversation
from tests.conversion.tiny_models import save_foreign_tokenizer, save_tiny_tokenizer
from tests.support.assets import asset

CHATML = """{%- if messages[0]['role'] != 'system' %}<|im_start|>system
You are brief.<|im_end|>
{% endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and not loop.last %}
        {{- '<|im_start|>assistant\\n' }}{% generation %}{{ message.content }}{% endgeneration %}{{ '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
HEADERS = """{% set ns = namespace(found=false) %}{{ bos_token }}
{% for message in messages %}
    {% if message.role == 'tool' %}{% set ns.found = true %}{% endif %}
<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{{ message['content'] | trim }}{{ eos_token }}
    {% if loop.index > 20 %}{% break %}{% endif %}
{% endfor %}
{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ ns.found }}{{ documents }}{{ unk_token }}
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
INSTRUCTIONS = """{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]
{% else %}{{ m.reasoning_content }}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"""
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "instructions": INSTRUCTIONS}
USER = {"role": "user", "content": "the cat <|end|> sat & <b>, naïve 漢字?\n"}
REPLY = {"role": "assistant", "content": " on the mat", "thinking": "hm", "tool_calls": None}
TOOLS = [{"type": "function", "function": {"name": "nap", "description": "für <cats>", "parameters": {}}}]
CONVERSATIONS = {
    "one message": Conversation([USER]),
    "several turns": Conversation([USER, REPLY, USER]),
    "tools and documents": Conversation([USER], tools=TOOLS, documents=[{"title": "a", "text": "b"}]),
}


@pytest.fixture(params=TEMPLATES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[request.param])
    return tmp_path


def expected(folder: Path, conversation: Conversation, **arguments: Any) -> Any:
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(
        list(conversation.messages),
        tools=conversation.tools,
        documents=conversation.documents,
        add_generation_prompt=True,
        return_dict=False,
        **arguments,
    )


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_text_and_tokens_are_those_of_transformers(folder: Path, conversation: Conversation):
    prompt = encode_conversation(conversation, ChatTemplate(load_tokenizer(folder)))
    assert prompt.text == expected(folder, conversation, tokenize=False)
    assert list(prompt.ids) == expected(folder, conversation)
    assert prompt.is_chat


@pytest.mark.parametrize("place", ["setting", "named settings", "file over setting", "additional file"])
def test_templates_are_found_where_transformers_finds_them(place: str, tmp_path: Path):
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [
        {"name": "default", "template": "default {{ tools }}"},
        {"name": "tool_use", "template": "tools {{ tools }}"},
    ]
    settings["chat_template"] = named if place == "named settings" else "setting {{ messages[0].content }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if place in ("file over setting", "additional file"):
        (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}")
    if place == "additional file":
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("additional {{ tools }}")
    template = ChatTemplate(load_tokenizer(tmp_path))
    for conversation in CONVERSATIONS.values():
        assert template.render(conversation) == expected(tmp_path, conversation, tokenize=False)


def test_a_real_chat_model():
    folder = asset("smollm2-135m")
    conversation = Conversation([{"role": "system", "content": "Be brief."}, USER, REPLY, USER])
    prompt = encode_conversation(conversation, ChatTemplate(load_tokenizer(folder)))
    assert prompt.text == expected(folder, conversation, tokenize=False)
    assert list(prompt.ids) == expected(folder, conversation)


@pytest.mark.parametrize("name", ["", "tokenizer.model"])
def test_special_tokens_of_a_sentencepiece_model_become_their_ids(name: str, tmp_path: Path):
    """Also if the file alone is named, whose library takes their names for ordinary text."""
    save_foreign_tokenizer("bpe", tmp_path / "it")
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": INSTRUCTIONS}
    (tmp_path / "it" / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path / "it" / name)
    ids = encode_conversation(CONVERSATIONS["several turns"], ChatTemplate(tokenizer)).ids
    assert ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.bos_id) == ids.count(tokenizer.eod_id) == 1


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (INSTRUCTIONS, [USER, USER], "cannot be applied to the messages: roles must alternate"),
        ("{% if %}", [USER], "is wrong in line 1"),
        ("{{ messages.append(1) }}", [USER], "cannot be applied"),
        ("{{ ''.__class__.__mro__ }}", [USER], "cannot be applied"),
        ("{{ 1 // 0 }}", [USER], "cannot be applied"),
        (CHATML, [], "has no messages"),
    ],
)
def test_what_a_template_refuses_is_told(template: str, messages: list[dict[str, str]], words: str, tmp_path: Path):
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ConfigError, match=words):
        ChatTemplate(load_tokenizer(tmp_path)).render(Conversation(messages))


def test_a_tokenizer_without_template_is_told():
    with pytest.raises(ConfigError, match=r"tokenizer bytes has no chat template\nhint: leave --chat out"):
        ChatTemplate(load_tokenizer("bytes"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ("1", "neither a list of messages nor"),
        ('{"message": []}', "neither a list of messages nor"),
        ('["hello"]', "messages in .* is no list of objects"),
        ('{"messages": [], "tools": {}}', "tools in .* is no list of objects"),
        ('[{"content": "hello"}]', "a message has no role"),
    ],
)
def test_files_that_hold_no_conversation_are_told(content: str, words: str, tmp_path: Path):
    (tmp_path / "chat.json").write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_conversation(tmp_path / "chat.json")


@pytest.mark.parametrize(
    "single", [None, "<|end|> $A", "<|end|> <|pad|> $A", "$A <|pad|>", "<|end|> $A <|pad|>"], ids=str
)
def test_prompts_begin_as_transformers_begins_them(single: str | None, tmp_path: Path):
    """With the tokens that tokenizer.json puts before a text; what it puts after one would end it."""
    from tokenizers import processors

    save_tiny_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    backend = tokenizer.backend
    if single is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<|end|>", 0), ("<|pad|>", 1)]
        )
    backend.save(str(tmp_path / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(tmp_path)("the cat")["input_ids"]
    ours = list(encode_prompt("the cat", load_tokenizer(tmp_path)).ids)
    assert ours == (theirs[:-1] if theirs[-1] == 1 else theirs)
    assert list(encode_prompt("the cat", tokenizer, add_bos=False).ids) == tokenizer.encode("the cat")
    assert list(encode_prompt("the cat", tokenizer, add_bos=True).ids) == [
        tokenizer.bos_id,
        *tokenizer.encode("the cat"),
    ]
