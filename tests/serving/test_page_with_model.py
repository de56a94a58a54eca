"""The chat page of `megatron-7b serve`, in a real Chromium, with a real (tiny, untrained) model."""

from collections.abc import Iterator
from typing import Any

import pytest

from megatron_7b.cli.main import main
from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.serving.test_page import FINISHED, ask
from tests.support.chromium import Chromium, chromium_path
from tests.support.serving import Server, running_server

KEY = "a-key-of-enough-characters"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    chromium_path()
    folder = tmp_path_factory.mktemp("model") / "hf"
    folder.mkdir()
    save_tiny_tokenizer(folder)
    save_tiny_model("llama", folder, vocab_size=300)
    assert main(["convert", "from-hf", "--input", str(folder), "--output", str(folder.parent / "tiny")]) == 0
    (folder.parent / "keys").write_text(KEY)
    (folder.parent / "keys").chmod(0o600)
    with running_server("--checkpoint", folder.parent / "tiny", "--api-key-file", folder.parent / "keys") as one:
        yield one


def reply_of(server: Server, **body: Any) -> dict[str, Any]:
    status, reply = server.ask("/v1/chat/completions", body, headers={"Authorization": f"Bearer {KEY}"})
    assert status == 200, reply
    found: dict[str, Any] = reply
    return found


def test_the_page_shows_what_the_model_writes(server: Server):
    with Chromium() as browser:
        page = browser.open(f"{server.address}/")
        page.wait_for("document.activeElement.id === 'api-key'")
        page.write(KEY)
        page.press("Enter")
        page.wait_for("document.getElementById('model').value === 'tiny'")
        page.click("#open-settings")
        for field, value in {"temperature": "0", "max_tokens": "12"}.items():
            page.evaluate(f"document.getElementById('sampling-{field}').focus()")
            page.write(value)
        page.press("Escape")
        ask(page, "the cat sat")
        asked = [{"role": "user", "content": "the cat sat"}]
        expected = reply_of(server, messages=asked, temperature=0, max_tokens=12)
        stored = "JSON.parse(localStorage[Object.keys(localStorage).find(k => k.includes('conversation'))]).messages"
        first = page.evaluate(stored)[1]["versions"][0]
        assert first["content"] == expected["choices"][0]["message"]["content"]
        assert first["tokens"] == expected["usage"]["completion_tokens"]
        ask(page, "on the mat " * 2000)
        assert "This message alone is longer" in page.text(".problem") or "longer than the model" in page.text(
            ".problem"
        )
        assert page.complaints() == []


def test_stopping_in_the_page_frees_the_model(server: Server):
    with Chromium() as browser:
        page = browser.open(f"{server.address}/")
        page.wait_for("document.activeElement.id === 'api-key'")
        page.write(KEY)
        page.press("Enter")
        page.wait_for("document.getElementById('model').value === 'tiny'")
        ask(page, "the cat", wait=False)
        page.evaluate("document.getElementById('stop').click()")
        page.wait_for(FINISHED)
        reply_of(server, messages=[{"role": "user", "content": "sat"}], max_tokens=2)
