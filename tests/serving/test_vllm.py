"""vLLM in the place of our engine, run for real where there is one: `MEGATRON_7B_TEST_VLLM=VENV/bin/python`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from megatron_7b.cli.commands.serve import _options, _parser
from megatron_7b.cli.options import parse_arguments
from megatron_7b.errors import ConfigError
from megatron_7b.serving.vllm import vllm_command
from tests.support.assets import REPOSITORY, asset

KEY = "a-key-that-nobody-can-guess"


def command(*words: str) -> tuple[list[str], dict[str, str]]:
    read = parse_arguments(_parser(), ["--engine", "vllm", "--hf", "H", *words])
    return vllm_command(read.flags, _options(read.flags), read.overrides)


def test_options_are_those_of_vllm(tmp_path: Path):
    (tmp_path / "keys").touch(mode=0o600)
    (tmp_path / "keys").write_text(KEY)
    words, variables = command(
        "--vllm-python", sys.executable, "--api-key-file", str(tmp_path / "keys"), "--max-cache-gib", "0.5",
        "--no-prefix-cache", "--parallel.tensor-model-parallel-size", "2", "--precision.params-dtype", "bf16",
    )  # fmt: skip
    assert words[:5] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "H"]
    pairs = {"--kv-cache-memory-bytes": str(2**29), "--tensor-parallel-size": "2", "--dtype": "bfloat16"}
    assert all(words[words.index(name) + 1] == value for name, value in pairs.items())
    assert "--no-enable-prefix-caching" in words
    assert KEY not in words
    assert variables == {"VLLM_API_KEY": KEY}
    with pytest.raises(ConfigError, match="nowhere/python is no program"):
        command("--vllm-python", "/nowhere/python")


def test_a_real_vllm_answers(tmp_path: Path):
    python = os.environ.get("MEGATRON_7B_TEST_VLLM")
    if python is None:
        pytest.skip("no vLLM to start: MEGATRON_7B_TEST_VLLM=VENV/bin/python names one")
    (tmp_path / "keys").touch(mode=0o600)
    (tmp_path / "keys").write_text(KEY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        "serve", "--engine", "vllm", "--vllm-python", python, "--hf", asset("smollm2-135m"), "--name", "smol",
        "--port", port, "--api-key-file", tmp_path / "keys", "--max-cache-gib", 0.5, "--max-batch-size", 4,
    ]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_7b", *map(str, words)], stdout=log, stderr=log, cwd=REPOSITORY,
            start_new_session=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                time.sleep(1)
        content = json.dumps({"model": "smol", "prompt": "Once upon a time", "max_tokens": 4}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            content,
            {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            assert json.load(reply)["usage"]["completion_tokens"] == 4
    except OSError as error:
        raise AssertionError((tmp_path / "log").read_text()[-3000:]) from error
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
