"""The server's texts: those of `generate`, by OpenAI's client, streamed and whole, alone and on ranks."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from megatron_7b.cli.main import main
from megatron_7b.generation import GenerationOptions, open_session
from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.serving.error_table import rows, written
from tests.support.ranks import run_ranks
from tests.support.serving import Server, running_server
from tools.benchmarks import serve_load

PROMPTS = ["the cat sat", "12 o'clock", "on the mat, the"]
LONG = "the cat sat on the mat, " * 12
LONG_PROMPTS = [LONG, LONG + "the cat", LONG + "on the mat"]
MESSAGES = [{"role": "user", "content": "the cat"}, {"role": "user", "content": " sat"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    folder.mkdir()
    save_tiny_tokenizer(folder)
    save_tiny_model("llama", folder, vocab_size=300)
    output = folder.parent / "tiny"
    assert main(["convert", "from-hf", "--input", str(folder), "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    with running_server("--checkpoint", checkpoint) as server:
        yield server


def generated(checkpoint: Path) -> list[tuple[str, int, str]]:
    options = GenerationOptions(temperature=0.0, max_new_tokens=12, num_beams=1)
    with open_session(checkpoint) as session:
        prompts = [session.encode(prompt) for prompt in PROMPTS] + [session.encode_chat(MESSAGES)]
        prompts += [session.encode(prompt) for prompt in LONG_PROMPTS]
        reasons = {"eod": "stop", "length": "length"}
        found = session.generate(prompts, options)
        return [(one.text, len(one.token_ids), reasons[str(one.finish_reason)]) for one in found]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[tuple[str, int, str]]:
    (found,) = run_ranks(1, generated, checkpoint)
    return found


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none needed here", max_retries=0, timeout=60)


def check_texts(server: Server, expected: list[tuple[str, int, str]]) -> None:
    client = client_of(server)
    assert [model.id for model in client.models.list()] == ["tiny"]
    reply = client.completions.create(model="tiny", prompt=PROMPTS, max_tokens=12, temperature=0)
    assert [(one.text, one.finish_reason) for one in reply.choices] == [(one[0], one[2]) for one in expected[:3]]
    assert reply.usage is not None
    assert reply.usage.completion_tokens == sum(one[1] for one in expected[:3])
    chunks = client.completions.create(
        model="tiny", prompt=PROMPTS, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    texts = ["", "", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [one[0] for one in expected[:3]]
    assert chunk.usage == reply.usage
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=12, temperature=0)
    assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == (expected[3][0], expected[3][2])
    pieces = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=12, temperature=0, stream=True
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected[3][0]


def test_texts_are_those_of_generate(server: Server, expected: list[tuple[str, int, str]]):
    check_texts(server, expected)


def test_options_of_sampling(server: Server, expected: list[tuple[str, int, str]]):
    client = client_of(server)

    def texts(**options: object) -> list[str]:
        reply = client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=12, **options)  # type: ignore[call-overload]
        return [choice.text for choice in reply.choices]

    drawn = texts(seed=3, n=3, temperature=1.5)
    assert len(set(drawn)) == 3
    assert texts(seed=3, n=3, temperature=1.5) == drawn
    assert texts(temperature=1.5) != texts(temperature=1.5), "without a seed"
    assert texts(extra_body={"top_k": 1}) == [expected[0][0]]
    whole = expected[0][0]
    assert texts(temperature=0, stop=[whole[3:5]]) == [whole[: whole.find(whole[3:5])]]
    assert texts(temperature=0, echo=True) == [PROMPTS[0] + whole]
    for extreme in ({"repetition_penalty": 0.01}, {"repetition_penalty": 100}, {"top_k": 2**63}, {"min_tokens": 12}):
        assert len(texts(temperature=1e-320, top_p=1e-320, extra_body=extreme)) == 1, "and the server stands it"


def test_log_probabilities_and_grammars(server: Server, expected: list[tuple[str, int, str]]):
    client = client_of(server)
    asked = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**asked, logprobs=3).choices[0]
    assert whole.logprobs is not None
    chosen, top = whole.logprobs.token_logprobs, whole.logprobs.top_logprobs
    assert len(chosen) == 6
    assert [max(one.values()) for one in top] == chosen
    assert whole.logprobs.text_offset[0] == 0
    pieces = [chunk.choices[0] for chunk in client.completions.create(**asked, logprobs=3, stream=True)]
    assert [value for piece in pieces if piece.logprobs for value in piece.logprobs.token_logprobs] == chosen
    chat = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs.content
    assert [len(one.top_logprobs) for one in content] == [2, 2, 2]
    assert content[0].logprob == content[0].top_logprobs[0].logprob
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    reply = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=80, seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "one", "schema": schema}},
    )  # fmt: skip
    assert json.loads(reply.choices[0].message.content)["a"] in (1, 2)
    forbidden = client.completions.create(**asked, logit_bias={str(token): -100 for token in range(250)})
    assert forbidden.choices[0].text != whole.text
    with pytest.raises(openai.BadRequestError, match="number of a token"):
        client.completions.create(**asked, logit_bias={"the": 1})
    endless = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}
    with pytest.raises(openai.BadRequestError, match="cannot be followed"):
        client.completions.create(**asked, extra_body={"response_format": endless})
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError, match="cannot be followed"):
        client.completions.create(**asked, extra_body={"response_format": wrong})


def test_what_prompts_begin_with_is_read_once(server: Server, expected: list[tuple[str, int, str]]):
    client = client_of(server)
    before = server.metric("prompt_tokens_reused_total")
    cached = []
    for prompt, (text, *_) in zip(LONG_PROMPTS, expected[4:], strict=True):
        reply = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0)
        assert reply.choices[0].text == text
        assert reply.usage is not None
        assert reply.usage.prompt_tokens_details is not None
        cached.append(reply.usage.prompt_tokens_details.cached_tokens)
    assert cached[0] == 0
    assert cached[1] == cached[2] > 32
    assert server.metric("prompt_tokens_reused_total") == before + sum(cached)


def test_wrong_requests_are_refused_as_the_page_says(server: Server):
    assert "\n".join(rows(server)) + "\n" == written(), "python -m tests.serving.error_table CHECKPOINT writes it anew"


def test_clients_who_leave_end_their_requests(server: Server):
    client = client_of(server)
    long = {"model": "tiny", "prompt": "the", "max_tokens": 250, "temperature": 0, "extra_body": {"ignore_eos": True}}
    before = server.metric("prompts_dropped_total")
    stream = client.completions.create(**long, stream=True)
    next(stream)
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).completions.create(**{**long, "n": 20})
    deadline = time.monotonic() + 5
    while server.metric("prompts_dropped_total") < before + 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.metric("prompts_dropped_total") == before + 2
    assert server.metric("texts_running") == 0


def test_a_crowd_of_all_sorts(server: Server, capsys: pytest.CaptureFixture[str]):
    words = ["--clients", "16", "--seconds", "3", "--pid", str(server.process.pid), "--long-words", "60"]
    assert serve_load.main(["abuse", server.address, *words]) == 0, capsys.readouterr().out


def test_a_full_queue_is_said(checkpoint: Path):
    with running_server("--checkpoint", checkpoint, "--max-batch-size", 1, "--max-waiting", 2) as server:
        client = client_of(server)
        long = {"model": "tiny", "prompt": "the", "max_tokens": 250, "extra_body": {"ignore_eos": True}}
        streams = [client.completions.create(**long, stream=True)]
        next(streams[0])
        streams += [client.completions.create(**long, stream=True) for _ in range(2)]
        with pytest.raises(openai.RateLimitError, match="2 texts wait already") as refused:
            client.completions.create(**long)
        assert refused.value.response.headers["Retry-After"] == "5"
        for stream in streams:
            stream.close()


def test_stopping(checkpoint: Path):
    with running_server("--checkpoint", checkpoint) as server:
        client = client_of(server)
        stream = client.completions.create(
            model="tiny", prompt="the", max_tokens=200, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        assert server.ask("/health")[0] == 200
        assert server.stop() == 0
        assert sum(1 for _ in stream) > 0, "what ran was finished"


def test_ranks_write_the_same_texts(checkpoint: Path, expected: list[tuple[str, int, str]]):
    with running_server("--checkpoint", checkpoint, "--nproc", 2, "--parallel.tensor-model-parallel-size", 2) as server:
        check_texts(server, expected)
        assert server.stop() == 0
