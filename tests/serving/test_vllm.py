"""vLLM in the place of our engine, run for real where there is one: `MEGATRON_7B_TEST_VLLM=VENV/bin/python`."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import openai
import psutil
import pytest

from megatron_7b.cli.commands.serve import _options, _parser
from megatron_7b.cli.commands.serve import main as serve
from megatron_7b.cli.options import parse_arguments
from megatron_7b.errors import ConfigError
from megatron_7b.generation import GenerationOptions, open_session
from megatron_7b.serving.vllm import vllm_command
from tests.support.assets import REPOSITORY, asset
from tests.support.commands import run_command
from tests.support.ranks import run_ranks

KEY = "a-key-that-nobody-can-guess"
PROMPTS = ["Once upon a time", "The capital of France is", "In the beginning"]
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


def command(*words: object) -> tuple[list[str], dict[str, str]]:
    read = parse_arguments(_parser(), ["--engine", "vllm", *map(str, words)])
    return vllm_command(read.flags, _options(read.flags), read.overrides)


def test_options_are_those_of_vllm(tmp_path: Path):
    (tmp_path / "keys").touch(mode=0o600)
    (tmp_path / "keys").write_text(KEY)
    here = ["--hf", tmp_path, "--vllm-python", sys.executable]
    words, variables = command(
        *here, "--api-key-file", tmp_path / "keys", "--max-cache-gib", "0.5", "--no-prefix-cache",
        "--parallel.tensor-model-parallel-size", "2", "--precision.params-dtype", "bf16",
        "--vllm-args=--enforce-eager --chat-template 'a b.jinja'",
    )  # fmt: skip
    assert words[:5] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path)]
    pairs = {"--kv-cache-memory-bytes": str(2**29), "--tensor-parallel-size": "2", "--dtype": "bfloat16"}
    assert all(words[words.index(name) + 1] == value for name, value in pairs.items())
    assert "--no-enable-prefix-caching" in words
    assert words[-3:] == ["--enforce-eager", "--chat-template", "a b.jinja"]
    assert KEY not in words
    assert variables == {"VLLM_API_KEY": KEY}
    for refused, why in (
        (["--vllm-python", "/nowhere/python"], "nowhere/python is no program"),
        (["--hf", tmp_path / "nowhere"], "nowhere is no folder"),
        (["--max-waiting", 3, "--nproc", 2], "no counterpart of --max-waiting, --nproc"),
        (["--vllm-args", "'"], "No closing quotation"),
        (["--vllm-args=--enforce-eager --hos=0.0.0.0"], "--hos=0.0.0.0, which options of `serve` say already"),
        (["--vllm-args=--api_key x"], "--api_key, which options"),
    ):
        with pytest.raises(ConfigError, match=why):
            command(*here, *refused)
    with pytest.raises(ConfigError, match="unknown flag"):  # an api-key that is misspelled, say
        serve(["--engine", "vllm", *map(str, here), "--api-key", "keys"])
    with pytest.raises(ConfigError, match="are for --engine vllm"):
        serve(["--checkpoint", "C", "--vllm-args=--enforce-eager"])


def generated(checkpoint: Path) -> list[str]:
    options = GenerationOptions(temperature=0.0, max_new_tokens=16, num_beams=1)
    with open_session(checkpoint) as session:
        prompts = [*map(session.encode, PROMPTS), session.encode_chat(MESSAGES)]
        return [sample.text for sample in session.generate(prompts, options)]


def processes_of_group(group: int) -> list[int]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


@pytest.mark.timeout(900)
def test_a_real_vllm_writes_the_same_texts(tmp_path: Path):
    """A checkpoint exported, served by vLLM through this command, and stopped."""
    python = os.environ.get("MEGATRON_7B_TEST_VLLM")
    if python is None:
        pytest.skip("no vLLM to start: MEGATRON_7B_TEST_VLLM=VENV/bin/python names one")
    for words in (
        ["from-hf", "--input", asset("smollm2-135m"), "--output", tmp_path / "C"],
        ["to-hf", "--checkpoint", tmp_path / "C", "--output", tmp_path / "H"],
    ):
        assert run_command("convert", *words).returncode == 0
    (expected,) = run_ranks(1, generated, tmp_path / "C")
    (tmp_path / "keys").touch(mode=0o600)
    (tmp_path / "keys").write_text(KEY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        "serve", "--engine", "vllm", "--vllm-python", python, "--hf", tmp_path / "H", "--name", "smol",
        "--port", port, "--api-key-file", tmp_path / "keys", "--max-cache-gib", 0.5, "--max-batch-size", 4,
        "--precision.params-dtype", "fp32", "--vllm-args=--enforce-eager --max-model-len 2048",
    ]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_7b", *map(str, words)], stdout=log, stderr=log, cwd=REPOSITORY,
            start_new_session=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=60)
        wait_until_ready(client, process, seconds=600)
        asked = {"model": "smol", "max_tokens": 16, "temperature": 0}
        reply = client.completions.create(prompt=PROMPTS, **asked)
        assert [choice.text for choice in reply.choices] == expected[:-1]
        pieces = client.chat.completions.create(messages=MESSAGES, stream=True, **asked)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected[-1]
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="another key").models.list()
        process.terminate()
        assert process.wait(60) == 0
        assert processes_of_group(process.pid) == []
    except openai.APIError as error:
        raise AssertionError((tmp_path / "log").read_text()[-3000:]) from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_ready(client: openai.OpenAI, process: "subprocess.Popen[bytes]", *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            client.models.list()
        except openai.APIConnectionError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(1)
        else:
            return
