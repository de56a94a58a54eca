"""A real Chromium for tests of pages, led over DevTools' pipe: nothing to install beside the browser.

with Chromium() as browser:
    page = browser.open("http://127.0.0.1:8000/")
    page.wait_for("document.querySelector('h1') !== null")
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--hide-scrollbars",
    "--disable-extensions", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--mute-audio", "--lang=en-US", "--window-size=1280,900",
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4",  # a mouse
)  # fmt: skip
KEYS = {"Enter": 13, "Escape": 27, "ArrowUp": 38, "Tab": 9, "Backspace": 8}
CONTROL, SHIFT = 2, 8


def chromium_path() -> str:
    """Return the browser's path; skip the calling test if there is none."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the PATH")


class PageError(AssertionError):
    """A script that a test ran in the page failed, or what it waited for did not come."""


class Chromium:
    """A browser with a profile of its own, which is gone afterwards."""

    def __init__(self) -> None:
        path = chromium_path()
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_read, self._to_browser = os.pipe()
        from_browser, to_write = os.pipe()
        # DevTools reads from descriptor 3 and writes to 4.
        command = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, path, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "LANG": "en_US.UTF-8"},
        )
        os.close(to_read)
        os.close(to_write)
        self._from_browser = os.fdopen(from_browser, "rb", buffering=0)
        self._rest = b""
        self._number = 0
        self.events: deque[dict[str, Any]] = deque(maxlen=10_000)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.command("Browser.close")
            self._process.wait(10)
        except (OSError, EOFError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._to_browser)
        self._from_browser.close()
        self._profile.cleanup()

    def command(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        content = memoryview(json.dumps(message).encode() + b"\0")
        while content:
            content = content[os.write(self._to_browser, content) :]
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise PageError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = self._from_browser.read(1 << 20)
            if not more:
                raise EOFError("the browser has ended")
            self._rest += more
        message, self._rest = self._rest.split(b"\0", 1)
        parsed: dict[str, Any] = json.loads(message)
        return parsed

    def open(self, address: str, *, languages: str = "en-US", storage: Mapping[str, str] | None = None) -> "Page":
        """Open a page in a context of its own, which shares no storage with others.

        Args:
            address: Of the page.
            languages: What the page sees as `navigator.languages`.
            storage: Put into localStorage before any script of the page runs.
        """
        context = self.command("Target.createBrowserContext")["browserContextId"]
        target = self.command("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, context)
        for domain in ("Page", "Runtime", "Log"):
            page.command(f"{domain}.enable")
        agent = self.command("Browser.getVersion")["userAgent"]
        page.command("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=languages)
        if storage:
            puts = ";".join(f"localStorage.setItem({json.dumps(k)}, {json.dumps(v)})" for k, v in storage.items())
            page.before_scripts(f"if (location.protocol !== 'about:') {{ {puts} }}")
        page.go(address)
        return page


class Page:
    """A tab."""

    def __init__(self, browser: Chromium, session: str, context: str) -> None:
        self.browser, self.session, self.context = browser, session, context

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol to this tab."""
        return self.browser.command(method, self.session, **parameters)

    def before_scripts(self, script: str) -> None:
        """Have a script run before those of every page that this tab loads."""
        self.command("Page.addScriptToEvaluateOnNewDocument", source=script)

    def go(self, address: str) -> None:
        """Load an address, and wait until its scripts have run."""
        self.command("Page.navigate", url=address)
        self.wait_for(f"location.href.startsWith({json.dumps(address)}) && document.readyState === 'complete'")

    def reload(self) -> None:
        """Load the page again."""
        self.evaluate("window.isOld = true")
        self.command("Page.reload")
        self.wait_for("!window.isOld && document.readyState === 'complete'")

    def close(self) -> None:
        """Close the tab and forget its storage."""
        self.browser.command("Target.disposeBrowserContext", browserContextId=self.context)

    def evaluate(self, script: str) -> Any:
        """Return the value of an expression, or of its promise."""
        found = self.command("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise PageError(f"{script}: {details.get('exception', {}).get('description', details['text'])}")
        return found["result"].get("value")

    def wait_for(self, condition: str, seconds: float = 15.0) -> Any:
        """Wait until an expression is true; returns its value."""
        until, trouble = time.monotonic() + seconds, ""
        while time.monotonic() < until:
            try:
                if value := self.evaluate(condition):
                    return value
            except PageError as error:  # the page is being replaced
                trouble = str(error)
            time.sleep(0.02)
        raise PageError(f"after {seconds} s still not: {condition} {trouble}")

    def text(self, selector: str) -> str:
        """Return the text of the last element that fits a selector, as it is shown."""
        return str(self.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].at(-1)?.innerText ?? ''"))

    def click(self, selector: str) -> None:
        """Click on the last element that fits a selector."""
        self.wait_for(f"document.querySelector({json.dumps(selector)}) !== null")
        self.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].at(-1).click()")

    def write(self, text: str) -> None:
        """Insert text where the focus is, as a keyboard or a clipboard does."""
        self.command("Input.insertText", text=text)

    def press(self, key: str, *, modifiers: int = 0, code: int | None = None) -> None:
        """Press and release a key."""
        number = KEYS.get(key, ord(key[0].upper())) if code is None else code
        name = key if key in KEYS else f"Key{key.upper()}" if key.isalpha() else key
        text = "\r" if key == "Enter" and code is None else key if key not in KEYS and modifiers == 0 else None
        event = {"key": key, "code": name, "windowsVirtualKeyCode": number, "modifiers": modifiers}
        down = {"type": "keyDown", "text": text} if text is not None else {"type": "rawKeyDown"}
        self.command("Input.dispatchKeyEvent", **event, **down)
        self.command("Input.dispatchKeyEvent", **event, type="keyUp")

    def resize(self, width: int, height: int, *, touch: bool = False, scale: float = 1.0) -> None:
        """Give the page a size in CSS pixels."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=touch
        )
        if touch:
            self.command("Emulation.setTouchEmulationEnabled", enabled=True)

    def prefer(self, **features: str) -> None:
        """Set media features, such as prefers_color_scheme="dark"."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.command("Emulation.setEmulatedMedia", features=named)

    def screenshot(self, file: Path) -> None:
        """Write what is shown as a PNG file."""
        file.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"]))

    def complaints(self) -> list[str]:
        """Return what the browser has complained about so far: exceptions, and what a policy forbade."""
        self.evaluate("1")  # so that what happened before has arrived
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                details = event["params"]["exceptionDetails"]
                found.append(details.get("exception", {}).get("description", details["text"]))
            if event["method"] == "Log.entryAdded" and event["params"]["entry"]["source"] in {"security", "javascript"}:
                found.append(event["params"]["entry"]["text"])
        return found
