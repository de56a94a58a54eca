"""Clients of a server that speaks OpenAI's protocol: how fast it answers them, and whether it survives them.

    python tools/benchmarks/serve_load.py speed http://127.0.0.1:8000 --clients 1 4 8
    python tools/benchmarks/serve_load.py abuse http://127.0.0.1:8000 --clients 64 --pid SERVER --texts-of RUN
    python tools/benchmarks/serve_load.py memory http://127.0.0.1:8000 --clients 16 --seconds 20 --pid SERVER

`speed` has each number of clients ask for streamed replies of equal length and prints tokens per second, all clients
together, and the time to the first token. `abuse` mixes whole and streamed requests with clients that leave at any
time, bodies that are no requests, and prompts of all lengths; it checks each greedy text against the first of its kind
(with `--texts-of` also against what the checkpoint writes without a server), and prints what was answered and how much
memory the server has. `memory` has many short texts written, then few long ones, then short ones again.
"""

import argparse
import asyncio
import collections
import json
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

PROMPTS = (
    "Tell me about the sea.",
    "What is a prime number?",
    "Write a sentence about rain.",
    "Why is the sky blue?",
    "How do I cook rice?",
    "Name three planets.",
    "Who wrote Hamlet?",
    "What does a compiler do?",
)
WRONG_BODIES = (
    b"", b"{", b"[]", b"null", b'"text"', b"{}", b'{"prompt": 5}', b'{"prompt": "a", "max_tokens": 0}', b"\xff\xfe",
    b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "\\ud800"}', b'{"prompt": [1, -2]}', b"[" * 100_000,
    b'{"prompt": "a", "max_tokens": 1000000}', b'{"model": "no such model", "prompt": "a"}', b'{"messages": []}',
    b'{"prompt": "a", "n": 1e99}', b'{"prompt": "a", "stop": [""]}', b'{"prompt": "a", "unknown": 1}',
)  # fmt: skip


@dataclass
class Server:
    """Where requests go."""

    host: str
    port: int
    model: str | None
    key: str | None

    async def post(
        self, path: str, body: bytes
    ) -> tuple[int, asyncio.StreamReader, asyncio.StreamWriter, dict[str, str]]:
        """Send a request on a connection of its own, and return the status and where the body comes from."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        head = f"POST {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: application/json\r\n"
        head += f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        headers = {}
        while (line := (await reader.readline()).strip()) != b"":
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        return status, reader, writer, headers


async def body_of(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """Yield the pieces of a body."""
    if headers.get("transfer-encoding") != "chunked":
        yield await reader.read()
        return
    while size := int((await reader.readline()) or b"0", 16):
        yield await reader.readexactly(size)
        await reader.readline()


async def events_of(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[dict[str, Any]]:
    """Yield the objects of a stream."""
    rest = b""
    async for piece in body_of(reader, headers):
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield json.loads(line[6:])


# ------------------------------------------------------------------------------------------------------------ speed


@dataclass
class Speed:
    """What one number of clients has seen."""

    clients: int
    tokens_per_second: float
    first_token: float


async def measure(server: Server, clients: int, requests: int, tokens: int) -> Speed:
    """Let clients ask one request after the other."""
    firsts: list[float] = []
    counts: list[int] = []

    async def client(number: int) -> None:
        for index in range(requests):
            question = PROMPTS[(number * requests + index) % len(PROMPTS)]
            content: dict[str, Any] = {
                "model": server.model,
                "messages": [{"role": "user", "content": question}],
                "max_tokens": tokens,
                "temperature": 0,
                "stream": True,
            }
            begun, count = time.perf_counter(), 0
            status, reader, writer, headers = await server.post("/v1/chat/completions", json.dumps(content).encode())
            assert status == 200, (status, await reader.read())
            async for event in events_of(reader, headers):
                assert "error" not in event, event
                if event.get("choices") and event["choices"][0]["delta"].get("content"):
                    count += 1
                    if count == 1:
                        firsts.append(time.perf_counter() - begun)
            counts.append(count)
            writer.close()

    begun = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(clients)))
    return Speed(clients, sum(counts) / (time.perf_counter() - begun), statistics.median(firsts))


async def speed(server: Server, flags: argparse.Namespace) -> int:
    """Print the speed for each number of clients."""
    await measure(server, 1, 2, 4)
    for clients in flags.clients:
        found = await measure(server, clients, flags.requests, flags.tokens)
        print(
            f"{clients:3} clients  {found.tokens_per_second:8.1f} tokens/s  first token after {found.first_token:.3f} s"
        )
    return 0


# ------------------------------------------------------------------------------------------------------------ abuse


@dataclass
class Account:
    """What has become of requests."""

    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    texts: dict[bytes, set[str]] = field(default_factory=lambda: collections.defaultdict(set))
    problems: list[str] = field(default_factory=list)


async def abuse(server: Server, flags: argparse.Namespace) -> int:
    """Have clients behave in all ways for a while; returns 1 if the server did not stand it."""
    account, deadline = Account(), time.monotonic() + flags.seconds
    seen: list[float] = []

    async def watch() -> None:
        import psutil

        process = psutil.Process(flags.pid)
        while time.monotonic() < deadline:
            seen.append(process.memory_info().rss / 2**20)
            await asyncio.sleep(min(5.0, flags.seconds / 12))

    async def client(number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < deadline:
            try:
                await asyncio.wait_for(one_request(server, chance, account, flags), 120)
            except TimeoutError:
                account.problems.append("a request was not answered within 120 s")
            except (ConnectionError, asyncio.IncompleteReadError, IndexError) as error:
                account.outcomes[f"connection: {type(error).__name__}"] += 1

    await asyncio.gather(*(client(number) for number in range(flags.clients)), *([watch()] if flags.pid else []))
    for outcome, count in sorted(account.outcomes.items()):
        print(f"{count:6}  {outcome}")
    several = [texts for texts in account.texts.values() if len(texts) > 1]
    account.problems += [f"a greedy request had {len(texts)} texts: {sorted(texts)[:2]}" for texts in several]
    print(f"{len(account.texts)} kinds of greedy requests, {len(several)} of them with several texts")
    if flags.texts_of:
        compare_texts(account, flags.texts_of)
    if seen:
        print("memory in MiB:", " ".join(f"{one:.0f}" for one in seen))
    await asyncio.sleep(2)  # for what was left to be dropped
    await check_is_idle(server, account)
    for problem in account.problems[:10]:
        print("PROBLEM", problem)
    return 1 if account.problems else 0


async def one_request(server: Server, chance: random.Random, account: Account, flags: argparse.Namespace) -> None:
    """Make one request of a kind that chance decides."""
    kind = chance.choices(("whole", "stream", "leave", "wrong", "long"), (4, 4, 3, 2, 1))[0]
    if kind == "wrong":
        status, reader, writer, _ = await server.post("/v1/completions", chance.choice(WRONG_BODIES))
        content = json.loads(await reader.read())
        account.outcomes[f"wrong body: {status}"] += 1
        if not 400 <= status < 500 or "message" not in content["error"]:
            account.problems.append(f"a wrong body had {status}: {content}")
        writer.close()
        return
    number = chance.randrange(len(PROMPTS))
    words = flags.long_words if kind == "long" else chance.choice((1, 20))
    content = {
        "model": server.model,
        "prompt": f"{PROMPTS[number]} " * words,
        "max_tokens": chance.choice((1, 8, 24)),
        "temperature": 0,
        "stream": kind in ("stream", "leave") or chance.random() < 0.5,
    }
    asked = json.dumps(content).encode()
    status, reader, writer, headers = await server.post("/v1/completions", asked)
    if status != 200:
        error = json.loads(await reader.read())["error"]
        account.outcomes[f"{kind}: {status} {error['code']}"] += 1
        if status not in (400, 429):
            account.problems.append(f"{status}: {error}")
        writer.close()
        return
    text, left = "", chance.randrange(8) if kind == "leave" else None
    if content["stream"]:
        async for event in events_of(reader, headers):
            if "error" in event:
                account.problems.append(f"in a stream: {event['error']}")
                break
            text += event["choices"][0]["text"]
            if left is not None and (left := left - 1) < 0:
                writer.transport.abort()
                account.outcomes["left a stream"] += 1
                return
    else:
        text = json.loads(await reader.read())["choices"][0]["text"]
    account.outcomes[f"{kind}: 200"] += 1
    account.texts[json.dumps({**content, "stream": None}).encode()].add(text)
    writer.close()


def compare_texts(account: Account, checkpoint: str) -> None:
    """Compare each greedy text with what a session of the checkpoint writes."""
    from megatron_7b.generation import GenerationOptions, open_session

    kinds = [(json.loads(asked), texts) for asked, texts in account.texts.items()]
    num_equal = 0
    with open_session(checkpoint) as session:
        for length in sorted({kind["max_tokens"] for kind, _ in kinds}):
            options = GenerationOptions(temperature=0.0, num_beams=1, max_new_tokens=length)
            of_length = [(kind["prompt"], texts) for kind, texts in kinds if kind["max_tokens"] == length]
            samples = session.generate([prompt for prompt, _ in of_length], options)
            for (prompt, texts), sample in zip(of_length, samples, strict=True):
                num_equal += texts == {sample.text}
                if texts != {sample.text}:
                    account.problems.append(f"{prompt[-40:]!r}: {sorted(texts)}, but generate: {sample.text!r}")
    print(f"{num_equal} of {len(kinds)} kinds have the text that generate writes")


# ----------------------------------------------------------------------------------------------------------- memory


async def memory(server: Server, flags: argparse.Namespace) -> int:
    """Print the server's memory while short texts are written, then long ones, then short ones again."""
    import psutil

    process = psutil.Process(flags.pid)
    phases = (("short", flags.clients, 1, 16), ("long", max(1, flags.clients // 8), flags.long_words, 200))
    for name, clients, words, tokens in (*phases, *phases):
        deadline, count, most = time.monotonic() + flags.seconds, 0, 0.0
        while time.monotonic() < deadline:
            prompts = [f"{PROMPTS[(count + number) % len(PROMPTS)]} " * words for number in range(clients)]
            await asyncio.gather(*(one_text(server, prompt, tokens) for prompt in prompts))
            count += clients
            most = max(most, process.memory_info().rss / 2**20)
        print(f"{name:5} {count:5} texts, {clients} at once: at most {most:.0f} MiB", flush=True)
    await asyncio.sleep(5)
    print(f"idle: {process.memory_info().rss / 2**20:.0f} MiB")
    return 0


async def one_text(server: Server, prompt: str, tokens: int) -> None:
    """Have a text written."""
    content = {"model": server.model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
    status, reader, writer, _ = await server.post("/v1/completions", json.dumps(content).encode())
    body = await reader.read()
    assert status == 200, body
    writer.close()


async def check_is_idle(server: Server, account: Account) -> None:
    """Check that nothing is left to do once nobody asks any more."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    key = f"Authorization: Bearer {server.key}\r\n" if server.key else ""
    writer.write(f"GET /metrics HTTP/1.1\r\nHost: {server.host}\r\n{key}Connection: close\r\n\r\n".encode())
    figures = (await reader.read()).decode()
    writer.close()
    for line in figures.splitlines():
        if line.startswith(("megatron_7b_texts_running", "megatron_7b_texts_waiting")):
            print(line)
            if not line.endswith(" 0.0"):
                account.problems.append(f"still {line}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "abuse", "memory"))
    parser.add_argument("address")
    parser.add_argument("--model")
    parser.add_argument("--key")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--requests", type=int, default=2, help="of each client (speed)")
    parser.add_argument("--tokens", type=int, default=48, help="of each reply (speed)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (abuse), or each part (memory)")
    parser.add_argument("--pid", type=int, help="process of the server, whose memory is watched (abuse, memory)")
    parser.add_argument("--texts-of", metavar="RUN", help="checkpoint whose texts are compared (abuse)")
    parser.add_argument("--long-words", type=int, default=300, help="repetitions of a long prompt (abuse)")
    flags = parser.parse_args(argv)
    place = urlsplit(flags.address)
    server = Server(place.hostname or "127.0.0.1", place.port or 80, flags.model, flags.key)
    if flags.what != "speed":
        flags.clients = flags.clients[0] if len(flags.clients) == 1 else 64
    if flags.what == "memory" and flags.pid is None:
        parser.error("memory needs --pid, the process of the server")
    return asyncio.run({"speed": speed, "abuse": abuse, "memory": memory}[flags.what](server, flags))


if __name__ == "__main__":
    sys.exit(main())
