"""A client of OpenAI-compatible chat endpoints (vLLM, SGLang, llama.cpp, …): one question, one answer, from any thread.

What passes by itself is tried again: lost connections, timeouts, overload (429), errors of the server (5xx).
"""

import json
import random
import threading
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

from megatron_7b.errors import ConfigError

_FIRST_WAIT_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 60.0
_PASSING = frozenset({408, 409, 425, 429})
_REFUSED_FOR_GOOD = frozenset({401, 403, 404, 405})


class AnswerError(Exception):
    """The endpoint works, and has no answer to this question (too long, filtered, cut)."""


class ChatEndpoint:
    """A model that is asked over HTTP.

    Args:
        url: Base, such as `http://localhost:8000/v1`.
        model: Its name there.
        api_key: Sent as bearer token; None sends none.
        temperature: Of sampling.
        max_tokens: Of an answer; None leaves it to the server.
        retries: Tries after the first one.
        timeout_seconds: For an answer.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None,
        temperature: float,
        max_tokens: int | None,
        retries: int,
        timeout_seconds: float,
    ) -> None:
        self._url = url.rstrip("/")
        self._model = model
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._sampling: dict[str, object] = {"temperature": temperature}
        if max_tokens is not None:
            self._sampling["max_tokens"] = max_tokens
        self._retries = retries
        self._timeout_seconds = timeout_seconds
        self._stopped = threading.Event()

    def ask(self, prompt: str) -> str:
        """Return the answer to a prompt.

        Raises:
            AnswerError: There is no answer to this prompt, and asking again would not help.
            ConfigError: There is no answer to any: wrong address, key or model, or the server is gone.
        """
        body = {"model": self._model, "messages": [{"role": "user", "content": prompt}], **self._sampling}
        request = urllib.request.Request(  # http and https only: check_augmentation
            f"{self._url}/chat/completions", data=json.dumps(body).encode(), headers=self._headers
        )
        return _read_answer(self._url, self._send(request))

    def check(self) -> None:
        """Refuse a server that does not answer at all, or not with this key.

        Raises:
            ConfigError: It does not.
        """
        request = urllib.request.Request(f"{self._url}/models", headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=min(10.0, self._timeout_seconds)):
                pass
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise self._refused(error.code, "") from error
        except (OSError, HTTPException) as error:
            raise self._gone(str(error), tries=1) from error

    def stop(self) -> None:
        """Let no thread wait for another try."""
        self._stopped.set()

    def _send(self, request: urllib.request.Request) -> Any:
        for attempt in range(self._retries + 1):
            after = None
            try:
                with urllib.request.urlopen(request, timeout=self._timeout_seconds) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                answer = error.read().decode(errors="replace")[:300]
                if error.code in _REFUSED_FOR_GOOD:
                    raise self._refused(error.code, answer) from error
                if error.code < 500 and error.code not in _PASSING:
                    raise AnswerError(f"HTTP {error.code}: {answer}") from error
                reason, after = f"HTTP {error.code}: {answer}", error.headers.get("Retry-After")
            except (OSError, HTTPException, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
            if attempt < self._retries and self._stopped.wait(_choose_wait(attempt, after)):
                break
        raise self._gone(reason, tries=attempt + 1)

    def _refused(self, code: int, answer: str) -> ConfigError:
        return ConfigError(
            f"augmentation.endpoint {self._url} refuses the model {self._model!r}: HTTP {code} {answer}".rstrip(),
            hint="check augmentation.endpoint (it ends in /v1 as a rule), augmentation.model, and the key in the "
            "environment variable that augmentation.api_key_variable names",
        )

    def _gone(self, reason: str, tries: int) -> ConfigError:
        return ConfigError(
            f"augmentation.endpoint {self._url} did not answer in {tries} tries: {reason}",
            hint="start it and run the same command again: the answers that came are kept",
        )


def _choose_wait(attempt: int, after: str | None) -> float:
    """Seconds before the next try: what the server asks for, else twice as long each time, spread over the threads."""
    if after is not None and after.strip().isdigit():
        return min(float(after), _LONGEST_WAIT_SECONDS)
    return min(_LONGEST_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2.0**attempt) * random.uniform(0.5, 1.0)


def _read_answer(url: str, answer: Any) -> str:
    try:
        choice = answer["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"augmentation.endpoint {url} does not speak the chat protocol: {json.dumps(answer)[:300]}",
            hint="it must answer POST …/chat/completions as OpenAI's does",
        ) from error
    if finish not in ("stop", None):
        raise AnswerError(f"the answer ended for the reason {finish!r}")
    if not isinstance(text, str) or not text.strip():
        raise AnswerError("the answer is empty")
    return text.strip()
