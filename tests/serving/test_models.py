"""Models beside those that write texts with all weights: adapters by name, vectors, labels; and who is let in."""

import json
import os
import socket
import time
from pathlib import Path

import numpy as np
import openai
import pytest

from megatron_7b.cli.main import main
from megatron_7b.generation import GenerationOptions, open_session
from megatron_7b.prediction import predict
from megatron_7b.serving.converted import converted
from megatron_7b.serving.listening import let_clients_in, take_address
from tests.adapter.peft_oracle import save_adapter
from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.support.commands import run_command
from tests.support.ranks import run_ranks
from tests.support.serving import running_server

KEY = "a key that nobody can guess".replace(" ", "-")
TEXTS = ["the cat sat", "12 o'clock on the mat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import LoraConfig

    path = tmp_path_factory.mktemp("models")
    for name in ("base", "bert"):
        (path / f"{name}_hf").mkdir()
        save_tiny_tokenizer(path / f"{name}_hf")
        save_tiny_model("llama" if name == "base" else "bert", path / f"{name}_hf", vocab_size=300)
        convert(path / f"{name}_hf", path / name)
    for seed, name in enumerate(("first", "second")):
        save_adapter(path / "base_hf", path / f"{name}_hf", LoraConfig(r=4, target_modules="all-linear"), seed=seed)
        convert(path / f"{name}_hf", path / name, "--base", path / "base")
    (path / "keys").touch(mode=0o600)
    (path / "keys").write_text(f"# of the tests\n{KEY}\n")
    return path


def convert(source: Path, output: Path, *more: object) -> None:
    words = ["convert", "from-hf", "--input", source, "--output", output, *more]
    assert main(list(map(str, words))) == 0


def written(folder: Path) -> dict[str, str]:
    options = GenerationOptions(temperature=0.0, max_new_tokens=10, num_beams=1)
    found = {}
    for name in ("base", "first", "second"):
        with open_session(folder / name) as session:
            found[name] = session.generate("the cat sat", options)[0].text
    return found


def test_adapters_by_name_behind_a_key(folder: Path):
    (expected,) = run_ranks(1, written, folder)
    assert len(set(expected.values())) == 3
    adapters = [f"first={folder / 'first'}", folder / "second"]
    words = [word for adapter in adapters for word in ("--adapter", adapter)]
    with running_server("--checkpoint", folder / "base", *words, "--api-key-file", folder / "keys") as server:
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key=KEY, max_retries=0)
        models = {model.id: model.model_dump()["parent"] for model in client.models.list()}
        assert models == {"base": None, "first": "base", "second": "base"}
        streams = {
            name: client.completions.create(model=name, prompt="the cat sat", max_tokens=10, temperature=0, stream=True)
            for name in models
        }
        found = {name: "".join(chunk.choices[0].text for chunk in stream) for name, stream in streams.items()}
        assert found == expected
        for key in ("another key that is wrong", "", KEY[:-1]):
            status, content = server.ask("/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert (status, content["error"]["code"]) == (401, "invalid_api_key")
        assert [server.ask(path)[0] for path in ("/v1/models", "/metrics", "/health", "/")] == [401, 401, 200, 200]
        log = server.err.read_text()
    assert KEY not in log


def test_vectors(folder: Path):
    words = ["--checkpoint", folder / "bert", "--objective.name", "embedding", "--data.seq-length", 64]
    with running_server(*words) as server:
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)
        vectors = np.array([one.embedding for one in client.embeddings.create(model="bert", input=TEXTS).data])
        alone = client.embeddings.create(model="bert", input=TEXTS[1], encoding_format="float", dimensions=8)
        refused = server.ask("/v1/embeddings", {"input": ["a", "the " * 100]})
        wrong = server.ask("/v1/completions", {"prompt": "a"})
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    cut = vectors[1, :8] / np.linalg.norm(vectors[1, :8])
    np.testing.assert_allclose(alone.data[0].embedding, cut, atol=1e-5)
    assert (refused[0], refused[1]["error"]["code"]) == (400, "context_length_exceeded")
    assert (wrong[0], wrong[1]["error"]["code"]) == (400, "wrong_endpoint")


def predicted(checkpoint: Path) -> list[dict[str, object]]:
    return predict(checkpoint, [{"text": text} for text in TEXTS])


def test_labels(folder: Path, tmp_path: Path):
    records = [json.dumps({"text": text, "label": str(number)}) for number, text in enumerate(TEXTS)] * 4
    (tmp_path / "train.jsonl").write_text("\n".join(records))
    run = tmp_path / "run"
    done = run_command(
        "finetune", "--run-dir", run, "--data.train", tmp_path / "train.jsonl", "--checkpoint.initialize-from",
        folder / "base", "--finetune.task", "text_classification", "--data.split", 1, "--data.seq-length", 64,
        "--training.train-steps", 1, "--training.global-batch-size", 4, "--training.micro-batch-size", 4,
        "--runtime.num-threads", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (expected,) = run_ranks(1, predicted, run)
    with running_server("--checkpoint", run) as server:
        status, content = server.ask("/v1/classify", {"input": TEXTS})
        assert status == 200
        assert [one["label"] for one in content["data"]] == [one["label"] for one in expected]
        assert content["data"][1]["score"] == pytest.approx(expected[1]["score"], abs=1e-5)
        status, content = server.ask("/v1/classify", {"input": [{"text": 5}]})
        assert (status, content["error"]["param"]) == (400, "input")


def test_what_is_refused_before_anything_is_loaded(folder: Path):
    def refusal(*words: object) -> str:
        done = run_command("serve", "--port", 0, *words)
        assert done.returncode == 2, done.stderr
        return done.stderr

    checkpoint = ("--checkpoint", folder / "base")
    assert "no key protects it" in refusal(*checkpoint, "--host", "0.0.0.0")
    assert "holds a whole model" in refusal(*checkpoint, "--adapter", folder / "bert")
    assert "--checkpoint C, or --hf H" in refusal()
    assert "two models are called" in refusal(*checkpoint, "--adapter", f"base={folder / 'first'}")
    assert "needs vLLM" in refusal("--hf", folder / "base_hf", "--engine", "vllm")
    (folder / "open_keys").write_text(KEY)
    os.chmod(folder / "open_keys", 0o644)  # noqa: PTH101
    assert "can be read by everybody" in refusal(*checkpoint, "--api-key-file", folder / "open_keys")
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.socket(family) as other:
            other.bind((host, 0))
            other.listen()
            port = other.getsockname()[1]
            told = refusal("--hf", folder / "none", "--host", f"[{host}]" if ":" in host else host, "--port", port)
    assert f"--port {port} cannot be listened at: Address already in use" in told
    ranks = (*checkpoint, "--nproc", 2, "--parallel.tensor-model-parallel-size", 2)
    with take_address("127.0.0.1", 0) as other:  # by a server that is still loading
        assert "Address already in use" in refusal(*ranks, "--port", other.getsockname()[1])


def test_a_port_is_free_again_at_once():
    taken = take_address("127.0.0.1", 0)
    let_clients_in(taken)
    address = taken.getsockname()
    client = socket.create_connection(address)
    connection, _ = taken.accept()
    connection.close()  # the server's end waits for late packets, as after a restart
    client.close()
    taken.close()
    with take_address(*address) as again:
        assert let_clients_in(again) == f"http://127.0.0.1:{address[1]}"


def test_slow_and_silent_clients_are_sent_away(folder: Path):
    kept = ("--converted", folder / "kept")
    with running_server("--hf", folder / "base_hf", *kept, "--receive-seconds", 0.5) as server:
        host, port = server.address.removeprefix("http://").split(":")
        silent = socket.create_connection((host, int(port)))
        slow = socket.create_connection((host, int(port)))
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        slow.sendall(b'Content-Length: 30\r\n\r\n{"prompt"')
        time.sleep(1.5)
        silent.settimeout(2)
        slow.settimeout(2)
        assert silent.recv(100) == b""
        assert b"408" in slow.recv(100)
        assert server.ask("/v1/models")[1]["data"][0]["id"] == "base_hf"

    def never(_output: Path) -> None:
        raise AssertionError("it was converted a second time")

    assert converted(folder / "base_hf", folder / "kept", never).name == "base_hf"
