"""The chat page in a real Chromium, with a server whose replies the tests dictate."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.scripted_server import ScriptedServer, error
from tests.support.chromium import CONTROL, SHIFT, Chromium, Page, PageError

CHECKS = Path(__file__).parent / "page" / "checks.js"
TOO_LONG = error(
    400,
    "a prompt of 280 tokens and 20 new ones make 300, but the model's context is 240 tokens",
    "context_length_exceeded",
)
FINISHED = "document.getElementById('stop').hidden && document.querySelector('.turn.reply') !== null"
SENT = "document.querySelectorAll('.turn.question').length"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as one:
        yield one


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer("A reply.") as one:
        yield one


@pytest.fixture
def page(browser: Chromium, server: ScriptedServer) -> Iterator[Page]:
    page = opened(browser, server)
    yield page
    assert page.complaints() == []
    page.close()


def opened(browser: Chromium, server: ScriptedServer, **options: Any) -> Page:
    page = browser.open(server.address, **options)
    page.wait_for("!document.getElementById('model').disabled || document.querySelector('dialog[open]') !== null")
    page.evaluate(CHECKS.read_text())
    return page


def ask(page: Page, text: str, *, wait: bool = True) -> None:
    count = page.evaluate(SENT)
    page.evaluate("document.getElementById('question').focus()")
    page.write(text)
    page.press("Enter")
    page.wait_for(f"{SENT} === {count + 1}")
    if wait:
        page.wait_for(FINISHED)


def stored(page: Page) -> list[dict[str, Any]]:
    script = "Object.keys(localStorage).filter(k => k.startsWith('megatron-7b.conv')).map(k => localStorage[k])"
    return [json.loads(text) for text in page.evaluate(script)]


def press_button(page: Page, text: str) -> None:
    page.wait_for(f"[...document.querySelectorAll('button')].some(one => one.textContent === {json.dumps(text)})")
    page.evaluate(
        f"[...document.querySelectorAll('button')].findLast(one => one.textContent === {json.dumps(text)}).click()"
    )


# ---------------------------------------------------------------------------------------------------- replies


def test_a_reply_is_seen_while_it_is_written_and_kept(page: Page, server: ScriptedServer):
    server.script[0] = [0.2, "The **first", 0.6, "** part.\n\n", "- and\n- more"]
    page.evaluate("checks.watchAnnouncements()")
    ask(page, "A question", wait=False)
    page.wait_for("document.querySelector('.dots') !== null")
    page.wait_for("document.querySelector('.reply .markdown').innerText.includes('The **first')")
    assert page.evaluate("[!document.getElementById('stop').hidden, document.getElementById('thread').ariaBusy]") == [
        True,
        "true",
    ]
    page.wait_for(FINISHED)
    html = '<p>The <strong>first</strong> part.</p><ul class=""><li><p>and</p></li><li><p>more</p></li></ul>'
    assert page.evaluate("document.querySelector('.reply .markdown').innerHTML") == html
    assert "tokens/s" in page.text(".statistics")
    assert "s to first token · 3 tokens" in page.text(".statistics")
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "A question"}], "stream": True}
    assert server.asked == [{**asked, "stream_options": {"include_usage": True}}]
    assert page.evaluate("checks.said").count("The model is replying") == 1  # a live region that is not chatty
    assert len(page.evaluate("checks.said")) == 2
    page.reload()
    page.wait_for("document.querySelector('.reply strong') !== null")
    assert page.evaluate("document.title") == "A question – megatron_7b"


def test_settings_are_sent(page: Page, server: ScriptedServer):
    server.models.append({"id": "adapter", "parent": "tiny"})
    page.reload()
    page.wait_for("document.querySelectorAll('#model optgroup').length === 2")
    page.evaluate(
        "{ const m = document.getElementById('model'); m.value = 'adapter'; m.dispatchEvent(new Event('change')); }"
    )
    page.click("#open-settings")
    for field, value in {"system": "Be brief.", "sampling-temperature": "0.5", "sampling-max_tokens": "9"}.items():
        page.evaluate(f"document.getElementById('{field}').focus()")
        page.write(value)
    page.evaluate("document.getElementById('sampling-top_p').focus()")
    page.write("7")
    assert page.text("#problem-top_p") == "From 0.01 to 1"
    page.press("Escape")
    ask(page, "Hi")
    body = server.asked[0]
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert (body["model"], body["temperature"], body["max_tokens"], body.get("top_p")) == ("adapter", 0.5, 9, None)
    page.click("#new-conversation")
    ask(page, "Again")
    assert server.asked[1]["messages"] == [
        {"role": "user", "content": "Again"}
    ]  # a system prompt is its conversation's
    assert server.asked[1]["temperature"] == 0.5


def test_stopping_ends_the_request(page: Page, server: ScriptedServer):
    server.script[0] = ["some ", *[piece for _ in range(400) for piece in (0.02, "more ")]]
    ask(page, "Long", wait=False)
    page.wait_for("document.querySelector('.reply .markdown').innerText.includes('more')")
    page.press("Escape")
    page.wait_for(FINISHED)
    assert page.text(".reply .note") == "Stopped."
    assert server.left.wait(5)
    assert stored(page)[0]["messages"][1]["versions"][0]["end"] == "stopped"


def test_another_reply_is_beside_the_first(page: Page, server: ScriptedServer):
    server.script.clear()
    server.script.extend(["one", "two", "after an edit"])
    ask(page, "Question")
    page.click("button[aria-label='Another reply']")
    page.wait_for("document.querySelector('.version')?.textContent === '2 of 2'")
    assert server.asked[1]["messages"] == server.asked[0]["messages"]
    assert page.text(".reply .markdown") == "two"
    page.click("button[aria-label='Earlier reply']")
    assert page.text(".reply .markdown") == "one"
    page.evaluate("document.getElementById('question').focus()")
    page.press("ArrowUp")
    page.wait_for("document.activeElement.className === 'editing'")
    page.write(", edited")
    page.press("Enter")
    page.wait_for(f"document.querySelector('.reply .markdown')?.innerText === 'after an edit' && {FINISHED}")
    assert server.asked[2]["messages"] == [{"role": "user", "content": "Question, edited"}]
    press_button(page, "Undo")
    page.wait_for("document.querySelector('.reply .markdown').innerText === 'one'")
    assert page.text(".bubble") == "Question"


def test_a_reply_goes_on_while_another_conversation_is_looked_at(page: Page, server: ScriptedServer):
    server.script.clear()
    server.script.extend([["slow ", 0.8, "end"], "quick"])
    ask(page, "First", wait=False)
    page.wait_for("document.querySelector('.reply .markdown')?.innerText.includes('slow')")
    page.press("o", modifiers=CONTROL | SHIFT)
    page.wait_for(f"{SENT} === 0")
    ask(page, "Second")
    assert page.text(".reply .markdown") == "quick"
    assert page.evaluate("document.querySelector('.pulse') !== null")
    page.wait_for("document.querySelector('.pulse') === null")
    page.evaluate("history.back()")
    page.wait_for("document.querySelector('.reply .markdown')?.innerText !== 'quick'")
    page.evaluate(
        "[...document.querySelectorAll('#conversations .row-button')].find(one => one.textContent === 'First').click()"
    )
    page.wait_for("document.querySelector('.reply .markdown')?.innerText === 'slow end'")


# ---------------------------------------------------------------------------------------------------- what models write

HOSTILE = [
    "<script>window.hacked = 1</script><img src=x onerror='hacked=1'><svg onload=hacked=1>",
    "[a](javascript:hacked=1) [b](JaVaScRiPt:hacked=1) <javascript:hacked=1>",
    "[c](data:text/html,<script>hacked=1</script>)",
    "![x](https://evil.example/track.png) ![y](javascript:hacked=1) [![z](x)](vbscript:hacked=1)",
    '[t](https://a.example "onmouseover=hacked=1") [u](https://a.example/"onclick="hacked=1)',
    "<iframe src='javascript:hacked=1'></iframe><style>*{display:none}</style><base href='https://evil.example'>",
    "```html\n<script>hacked=1</script>\n```\n\n`<img src=x onerror=hacked=1>`\n",
    "| <b onclick=hacked=1> |\n|---|\n| <script>hacked=1</script> |",
    '```"><img src=x onerror=hacked=1>\ncode',
    "> " * 3000 + "deep\n\n" + "- " * 3000 + "deep\n\n" + "*a **b " * 2000,
    "\u202e\u0000\ufffe \ud83d half of a pair, [x](https://a.example/\u202ecod.exe)",
]


def test_hostile_texts_stay_texts(page: Page, server: ScriptedServer):
    for text in HOSTILE:
        server.script[0] = [text[: len(text) // 2], 0.03, text[len(text) // 2 :]]
        ask(page, "Go on")
    found = page.evaluate("checks.drawn()")
    assert page.evaluate("window.hacked ?? null") is None
    assert found["handlers"] == 0
    assert set(found["tags"]).isdisjoint({"SCRIPT", "IMG", "IFRAME", "STYLE", "BASE", "FORM", "OBJECT", "EMBED"})
    assert found["links"]
    safe = ["noopener noreferrer nofollow", "_blank"]
    assert all(link in ([host, *safe] for host in ("evil.example", "a.example")) for link in found["links"])
    assert found["deepest"] < 120
    assert page.evaluate("document.querySelector('.reply .markdown').textContent") == HOSTILE[0]
    page.reload()
    page.wait_for("document.querySelectorAll('.turn').length > 10")
    assert page.evaluate("window.hacked ?? null") is None


def test_what_grows_is_what_is_drawn_at_once(page: Page):
    blocks = (
        "# A title\nText with **bold** and `code`\n- one\n  - two\n\n    three\n- [x] four",
        "1. five\n   ```py\n   x = 1\n\n   y\n   ```\n2. six",
        "| a | b |\n|---|--:|\n| 1 | **2** |\n| 3 | 4 |",
        "> quote\n> - item",
        "---",
        "```js\nopen\n``x\n```\n$$\nx\n$$\nlast\n- a",
        "- b",
    )
    text = "\n\n".join(blocks)
    assert page.evaluate(f"checks.growing({json.dumps(text)})") == []


LONG = {
    "one line": "word " * 200_000,
    "code": "```c\n" + "int x = 1;\n" * 90_000,
    "items": "- an item with **bold** words\n" * 33_000,
    "paragraphs": "A paragraph with *some* words and `code` in it.\n\n" * 20_000,
}


@pytest.mark.parametrize("kind", LONG)
def test_a_megabyte_does_not_freeze_the_page(page: Page, server: ScriptedServer, kind: str):
    text = LONG[kind]
    size = len(text) // 400
    server.script[0] = [piece for at in range(0, len(text), size) for piece in (text[at : at + size], 0.004)]
    page.evaluate("checks.watchPauses()")
    ask(page, "Long", wait=False)
    page.wait_for(FINISHED, 60)
    longest = page.evaluate("checks.longest")
    print(f"{kind}: longest pause {longest:.0f} ms")
    assert longest < 4_000
    assert page.evaluate("document.querySelector('.reply .markdown').textContent.length") > len(text) * 0.7
    page.evaluate("document.getElementById('question').focus()")
    page.write("Still alive")
    assert page.evaluate("document.getElementById('question').value") == "Still alive"


# ---------------------------------------------------------------------------------------------------- trouble


def test_a_key_is_asked_for_and_kept_for_the_tab_only(browser: Chromium):
    with ScriptedServer("Welcome", key="secret") as server:
        page = opened(browser, server)
        page.wait_for("document.activeElement.id === 'api-key'")
        page.write("wrong")
        page.press("Enter")
        page.wait_for("document.querySelector('#key-dialog[open] label')?.textContent.includes('does not accept')")
        page.write("secret")
        page.press("Enter")
        page.wait_for("!document.getElementById('model').disabled && document.querySelector('dialog[open]') === null")
        ask(page, "Hello")
        assert page.text(".reply .markdown") == "Welcome"
        server.key = "changed"
        ask(page, "And now", wait=False)
        page.wait_for("document.activeElement.id === 'api-key'")
        page.write("changed")
        page.press("Enter")
        page.wait_for(f"document.querySelectorAll('.reply .markdown')[1]?.innerText === 'Welcome' && {FINISHED}")
        kept = page.evaluate("[JSON.stringify(localStorage), JSON.stringify(sessionStorage)]")
        assert "changed" not in kept[0]
        assert "changed" in kept[1]
        page.close()


def test_errors_say_what_to_do(page: Page, server: ScriptedServer):
    server.script[0] = error(429, "8 requests wait already", **{"Retry-After": "3"})
    ask(page, "Busy")
    assert "The server is busy: its queue is full. It suggests to wait 3 s." in page.text(".problem")
    server.script[0] = "Now there is room."
    press_button(page, "Try again")
    page.wait_for("document.querySelector('.reply .markdown').innerText === 'Now there is room.'")
    server.script[0] = error(400, "temperature must not be negative")
    ask(page, "Refused")
    assert "temperature must not be negative" in page.text(".problem")
    server.script[0] = ["Half of ", 0.1, ScriptedServer.CUT]
    ask(page, "Cut")
    assert page.text(".reply .markdown") == "Half of "[:-1]
    assert "The connection was lost in the middle of the reply." in page.text(".problem")
    server.script[0] = ["Half", {"error": {"message": "out of memory", "code": 500}}]
    ask(page, "Broken")
    assert "out of memory" in page.text(".problem")


def test_what_is_too_long_is_shortened(page: Page, server: ScriptedServer):
    for text in ("first " * 20, "second " * 20):
        ask(page, text.strip())
    server.script.clear()
    server.script.extend([TOO_LONG, "Shorter.", TOO_LONG])
    ask(page, "third")
    press_button(page, "Leave out the oldest messages and send again")
    page.wait_for(f"document.querySelectorAll('.reply .markdown')[2]?.innerText === 'Shorter.' && {FINISHED}")
    assert [one["content"][:6] for one in server.asked[-1]["messages"]] == ["second", "A repl", "third"]
    assert "no longer sent" in page.text(".divider")
    page.click("#new-conversation")
    ask(page, "alone")
    assert "This message alone is longer" in page.text(".problem")
    assert "Leave out" not in page.text(".problem")


def test_models_that_cannot_chat_are_not_offered(browser: Chromium, server: ScriptedServer):
    server.models = [{"id": "vectors", "endpoints": ["/v1/embeddings"]}]
    page = browser.open(server.address)
    page.wait_for("document.getElementById('banner').innerText.includes('no model that can chat')")
    server.models.append({"id": "chat", "endpoints": ["/v1/completions", "/v1/chat/completions"]})
    press_button(page, "Try again")
    page.wait_for("document.getElementById('model').value === 'chat' && document.getElementById('banner').hidden")
    assert page.evaluate("document.querySelectorAll('#model option').length") == 1
    page.close()


def test_a_server_that_is_away_is_waited_for(page: Page, server: ScriptedServer):
    server.stop()
    ask(page, "Anybody there?")
    assert "The server cannot be reached" in page.text(".problem")
    page.wait_for("!document.getElementById('banner').hidden")
    server.start()
    page.wait_for("document.querySelector('.toast')?.innerText === 'The server is back.'")
    page.wait_for("document.getElementById('banner').hidden")
    press_button(page, "Try again")
    page.wait_for("document.querySelector('.reply .markdown').innerText === 'A reply.'")


# ---------------------------------------------------------------------------------------------------- what is kept


def test_conversations_are_renamed_deleted_and_brought_back(page: Page, server: ScriptedServer):
    ask(page, "First question")
    page.click("#new-conversation")
    ask(page, "Second question")
    page.evaluate("document.querySelectorAll('[data-focus^=rename]')[1].click()")
    page.wait_for("document.activeElement.className === 'renaming'")
    page.write("好名字")
    page.press("Enter")
    titles = "[...document.querySelectorAll('.row-title')].map(one => one.textContent)"
    page.wait_for(f'JSON.stringify({titles}) === \'["Second question","好名字"]\'')
    page.evaluate("document.querySelectorAll('[data-focus^=remove]')[0].click()")
    page.wait_for(f"{titles}.length === 1")
    assert len(stored(page)) == 1
    press_button(page, "Undo")
    page.wait_for(f"{titles}.length === 2")
    assert page.text(".bubble") == "Second question"
    assert len(stored(page)) == 2


def test_damage_and_a_full_storage_are_told(browser: Chromium, server: ScriptedServer):
    page = opened(browser, server, storage={"megatron-7b.conversation.x": "{broken", "megatron-7b.preferences": "[["})
    page.wait_for("document.getElementById('banner').innerText.includes('1 stored conversations cannot be read')")
    ask(page, "Still works")
    page.evaluate(
        "localStorage.setItem('other', 'x'.repeat(5 * 1024 * 1024 - JSON.stringify(localStorage).length - 500))"
    )
    ask(page, "This has no room " * 60)
    page.wait_for("document.getElementById('banner').innerText.includes('storage is full')")
    assert page.text(".reply .markdown") == "A reply."
    assert page.complaints() == []
    page.close()


def test_tabs_know_of_one_another(browser: Chromium, server: ScriptedServer):
    page = opened(browser, server)
    target = browser.command("Target.createTarget", url=server.address, browserContextId=page.context)["targetId"]
    other = Page(
        browser, browser.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"], page.context
    )
    other.wait_for("document.getElementById('model')?.disabled === false")
    ask(page, "Told in one tab")
    other.wait_for("document.querySelector('.row-title')?.textContent === 'Told in one tab'")
    page.close()


# ---------------------------------------------------------------------------------------------------- people


def test_an_input_method_keeps_its_enter(page: Page, server: ScriptedServer):
    page.evaluate("document.getElementById('question').focus()")
    page.command("Input.imeSetComposition", text="ni hao", selectionStart=6, selectionEnd=6)
    page.press("Enter", code=229)
    page.write("你好")  # what the Enter chose
    time.sleep(0.1)
    assert (server.asked, page.evaluate("document.getElementById('question').value")) == ([], "你好")
    page.press("Enter", modifiers=SHIFT)
    page.write("世界")
    assert page.evaluate("document.getElementById('question').value") == "你好\n世界"
    page.press("Enter")
    page.wait_for(FINISHED)
    assert server.asked[0]["messages"][0]["content"] == "你好\n世界"


def test_the_page_speaks_the_browsers_language(browser: Chromium, server: ScriptedServer):
    page = opened(browser, server, languages="zh-CN,zh,en")
    assert page.evaluate("[document.documentElement.lang, document.getElementById('question').placeholder]") == [
        "zh-CN",
        "请输入问题",
    ]
    server.script[0] = error(429, "full")
    ask(page, "你好")
    assert "服务器繁忙" in page.text(".problem")
    page.click("#language")
    assert "The server is busy" in page.text(".problem")
    page.reload()
    page.wait_for("document.getElementById('question').placeholder === 'Ask anything'")
    page.close()


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_window(page: Page, server: ScriptedServer, width: int):
    page.resize(width, 800, touch=width < 800)
    table = f"|{'a|' * 40}\n|{'-|' * 40}\n|{'wide cell|' * 40}"
    server.script[0] = f"{'x' * 300}\n\n```\n{'y' * 300}\n```\n\n{table}\n\nhttps://a.example/{'z' * 300}"
    page.evaluate("document.getElementById('question').focus()")
    page.write("w" * 300)
    page.click("#send")
    page.wait_for(FINISHED)
    assert page.evaluate("[document.documentElement.scrollWidth, document.getElementById('scroller').scrollWidth]") <= [
        width,
        width,
    ]
    if width < 800:
        page.click("#open-sidebar")
        page.wait_for("document.getElementById('sidebar').getBoundingClientRect().left === 0")
        page.press("Escape")
        page.wait_for("getComputedStyle(document.getElementById('sidebar')).visibility === 'hidden'")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read(page: Page, server: ScriptedServer, scheme: str):
    page.prefer(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    server.script[0] = "Text, `code`, [link](https://a.example)\n\n> quote\n\n```py\ncode\n```\n\n- item"
    ask(page, "A question")
    server.script[0] = error(429, "full")
    ask(page, "Another")
    assert page.evaluate("checks.faint()") == []
    assert page.evaluate("document.getAnimations().length") == 0
    page.click("#open-settings")
    assert page.evaluate("checks.faint()") == []


def test_every_control_has_a_name_and_can_be_reached(page: Page):
    ask(page, "A question")
    page.command("Accessibility.enable")
    nodes = page.command("Accessibility.getFullAXTree")["nodes"]
    controls = [
        one
        for one in nodes
        if one.get("role", {}).get("value") in {"button", "textbox", "combobox", "searchbox", "link"}
    ]
    assert len(controls) > 8
    assert [one for one in controls if not one.get("ignored") and not one.get("name", {}).get("value")] == []
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    reached = []
    for _ in range(30):
        page.press("Tab")
        reached.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.title || document.activeElement.ariaLabel"
            )
        )
        if reached[-1] == "send" or reached[-1] == "question":
            break
    for name in ("new-conversation", "open-sidebar", "model", "open-settings", "Another reply", "question"):
        assert name in reached
    assert (
        reached.index("new-conversation")
        < reached.index("model")
        < reached.index("Another reply")
        < reached.index("question")
    )
    page.evaluate("document.activeElement.blur()")
    page.press("/")
    assert page.evaluate("document.activeElement.id") == "question"


def test_what_the_test_waits_for_in_vain_is_told(page: Page):
    with pytest.raises(PageError, match="still not: window.never"):
        page.wait_for("window.never", 0.1)
