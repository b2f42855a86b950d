"""A server of a script's own, and a streaming client that sees what users see.

There are two more clients, each for what this one cannot do: `byte_client` costs next to nothing,
for measuring what a server costs; `bench_client` sends with vLLM's own benchmark's code.
"""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import yaml

from lib.report import machine
from lib.servers import free_port, serve_command, started
from synthia_vllm.admission.users import new_key

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Mapping


@dataclass
class Outcome:
    """What became of one request. Times are seconds from its sending."""

    status: int = 0
    """The HTTP status; 0 if the connection broke."""
    code: str | None = None
    """OpenAI's error code, from the response or from an event in the stream."""
    retry_after: float | None = None
    to_status: float = 0.0
    to_first: float | None = None
    took: float = 0.0
    gaps: list[float] = field(default_factory=list)
    """Between events with text."""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    text: str = ""
    whole: bool = False
    """The answer came to its own end."""


@dataclass
class Target:
    """A server that takes load."""

    url: str
    keys: dict[str, str]
    process: asyncio.subprocess.Process
    session: aiohttp.ClientSession
    log: Path

    def headers(self, user: str | None, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """What `user` sends along."""
        key = {"Authorization": f"Bearer {self.keys[user]}"} if user else {}
        return key | dict(more or {})

    async def chat(
        self, body: Mapping[str, Any], user: str | None, more: Mapping[str, str] | None = None
    ) -> Outcome:
        """One request, streamed or plain as `body` says, to its end. Never raises for a refusal."""
        outcome = Outcome()
        begun = time.perf_counter()
        try:
            async with self.session.post(
                f"{self.url}/v1/chat/completions", json=body, headers=self.headers(user, more)
            ) as response:
                outcome.status = response.status
                outcome.to_status = time.perf_counter() - begun
                if "retry-after" in response.headers:
                    outcome.retry_after = float(response.headers["retry-after"])
                if response.content_type == "text/event-stream":
                    await _read_stream(response, outcome, begun)
                else:
                    _read_plain(await response.json(), outcome)
        except (aiohttp.ClientError, ConnectionError, ValueError) as error:
            outcome.status, outcome.code = 0, type(error).__name__
        outcome.took = time.perf_counter() - begun
        return outcome

    async def metrics(self) -> dict[str, float]:
        """All samples of ``/metrics``, by name and labels as they are written."""
        async with self.session.get(f"{self.url}/metrics") as response:
            text = await response.text()
        found = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                found[name] = float(value)
        return found


async def _read_stream(response: aiohttp.ClientResponse, outcome: Outcome, begun: float) -> None:
    last = None
    pieces: list[str] = []
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            outcome.whole = True
            break
        event = json.loads(line[6:])
        if "error" in event:
            outcome.code = event["error"]["code"]
            break
        if event.get("usage"):
            outcome.prompt_tokens = event["usage"]["prompt_tokens"]
            outcome.answer_tokens = event["usage"]["completion_tokens"]
        for choice in event["choices"]:
            pieces.append(choice["delta"].get("content") or "")
            now = time.perf_counter()
            if last is None:
                outcome.to_first = now - begun
            else:
                outcome.gaps.append(now - last)
            last = now
    outcome.text = "".join(pieces)


def _read_plain(answer: dict[str, Any], outcome: Outcome) -> None:
    if "error" in answer:
        outcome.code = answer["error"]["code"]
        return
    outcome.prompt_tokens = answer["usage"]["prompt_tokens"]
    outcome.answer_tokens = answer["usage"]["completion_tokens"]
    outcome.text = answer["choices"][0]["message"]["content"]
    outcome.whole = True


@asynccontextmanager
async def serve(
    *options: str, users: Mapping[str, Mapping[str, Any]] | None = None
) -> AsyncIterator[Target]:
    """Start `synthia-vllm serve --model demo` with `options` and a key for each of `users`."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        keys, flags = {}, list(options)
        if users:
            document = {}
            for name, limits in users.items():
                keys[name], key_hash = new_key()
                document[name] = {"keys": [key_hash], **limits}
            file = Path(place, "keys.yaml")
            file.write_text(yaml.safe_dump({"users": document}))
            flags += ["--set", f"keys_file={file}"]
        log = Path(place, "log")
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=300)
        async with (
            started("the server", [*serve_command(port), *flags], port, log) as process,
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
        ):
            yield Target(f"http://127.0.0.1:{port}", keys, process, session, log)


async def environment(target: Target) -> dict[str, Any]:
    """What a number means nothing without."""
    user = next(iter(target.keys), None)
    async with target.session.get(f"{target.url}/version", headers=target.headers(user)) as got:
        return machine() | {"versions": await got.json()}
