"""A real Prometheus beside a server, and load that gives every series something to say."""

from __future__ import annotations

import asyncio
import math
import shutil
import subprocess
import time
from collections import Counter
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import httpx
import yaml

from lib.servers import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence

CONFIG: Final = Path(__file__).parents[2] / "config"
_GUESTS: Final = tuple(f"guest{number}" for number in range(10))
USERS: Final[dict[str, dict[str, Any]]] = {
    **{name: {} for name in _GUESTS},
    "alice": {},
    "bob": {"weight": 2},
    "carol": {"requests_per_minute": 2},
    "dave": {"models": ["synthia-demo-tot"]},
}
"""Who `offer` needs keys of, with these limits."""
FLAGS: Final = (
    *("--set", "limits.max_requests=24", "--engine", "max_num_seqs=8"),
    *("--engine", f"kv_cache_memory_bytes={20 * 128 * 2048}"),  # 20 blocks of 128 tokens
)
"""Makes a server small enough for `offer` to fill it."""
_STREAMS: Final = 18  # more than FLAGS let run, fewer than they let wait


@dataclass(frozen=True)
class Prometheus:
    """One that runs, at `url`."""

    url: str

    def ask(self, path: str, **parameters: str) -> Any:
        """What its HTTP API says at `path`. Raises `ValueError` with its words for a bad query."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30).json()
        if answer["status"] != "success":
            raise ValueError(f"{parameters}: {answer['error']}")
        return answer["data"]

    def query(self, expression: str, moment: float | None = None) -> list[dict[str, Any]]:
        """The results now, or at `moment`: ``{"metric": labels, "value": [time, text]}`` each."""
        when = {} if moment is None else {"time": str(moment)}
        found: list[dict[str, Any]] = self.ask("query", query=expression, **when)["result"]
        return found

    def query_range(
        self, expression: str, begin: float, end: float, step: float
    ) -> list[dict[str, Any]]:
        """The results over a time: ``{"metric": labels, "values": [[time, text], ...]}`` each."""
        times = {"start": str(begin), "end": str(end), "step": str(step)}
        found: list[dict[str, Any]] = self.ask("query_range", query=expression, **times)["result"]
        return found

    @property
    def names(self) -> set[str]:
        """Of all series it has."""
        return set(self.ask("label/__name__/values"))


@dataclass(frozen=True)
class Scrape:
    """What Prometheus has of a server that had all kinds of requests for some 25 seconds."""

    source: Prometheus
    text: str
    """What `/metrics` said at the end."""
    names: set[str]
    """Of all series, those of the recording rules too."""
    statuses: Counter[int]
    """The answers that the load had, by HTTP status."""
    begin: float
    end: float
    """When the load began and ended, in seconds since 1970."""

    @property
    def url(self) -> str:
        """Of Prometheus."""
        return self.source.url

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The results at the end of the load, whenever that was."""
        return self.source.query(expression, self.end)


@contextmanager
def prometheus(
    url: str, place: Path, interval: str = "1s", *, pods: Sequence[Mapping[str, str]] = ()
) -> Iterator[Prometheus]:
    """Run Prometheus with `config/prometheus/`, on the server at `url` and every `interval`.

    For each of `pods` the same server is one more target, with these labels. All data is kept in
    `place`. Raises `RuntimeError` if it is not installed or does not start.
    """
    command = shutil.which("prometheus")
    if command is None:
        raise RuntimeError("`prometheus` is not installed: on Debian, apt-get install prometheus")
    document = yaml.safe_load((CONFIG / "prometheus/prometheus.yaml").read_text())
    document["global"] |= {"scrape_interval": interval, "evaluation_interval": interval}
    [job] = document["scrape_configs"]
    target = url.removeprefix("http://")
    job["static_configs"] = [
        {"targets": [target], "labels": dict(labels)} for labels in ({}, *pods)
    ]
    (place / "prometheus.yaml").write_text(yaml.safe_dump(document))
    for rules in document["rule_files"]:
        shutil.copy(CONFIG / "prometheus" / rules, place)
    address = f"127.0.0.1:{free_port()}"
    log = place / "prometheus.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                command, f"--config.file={place / 'prometheus.yaml'}",
                f"--web.listen-address={address}",
                f"--storage.tsdb.path={place / 'data'}", "--storage.tsdb.retention.time=1h",
            ],
            stdout=output, stderr=output,
        )  # fmt: skip
    try:
        here = Prometheus(f"http://{address}")
        deadline = time.monotonic() + 30
        while not _scrapes(here, 1 + len(pods)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Prometheus does not scrape {url}:\n{log.read_text()}")
            time.sleep(0.1)
        yield here
    finally:
        process.terminate()
        process.wait(30)


def _scrapes(here: Prometheus, targets: int) -> bool:
    with suppress(httpx.TransportError, ValueError):
        return [result["value"][1] for result in here.query("up")] == ["1"] * targets
    return False


async def offer(url: str, keys: Mapping[str, str], seconds: float) -> Counter[int]:
    """Give a demo server, started with FLAGS and USERS, all kinds of requests; what came of them.

    Streams swell and ebb twice; beside them come bursts that fill the server, a user beyond its
    limit, clients that leave, and each kind of error that a client can provoke.
    """
    begun = time.monotonic()
    seen: Counter[int] = Counter()

    def left() -> float:
        return begun + seconds - time.monotonic()

    async def every(pause: float, what: Callable[[], Awaitable[object]]) -> None:
        while left() > 0:
            await what()
            await asyncio.sleep(pause)

    async def stream(number: int) -> None:
        while left() > 0:
            tide = (1 - math.cos(4 * math.pi * left() / seconds)) / 2
            if number < 2 + (_STREAMS - 2) * tide:
                who = ("alice", "bob", "bob")[number % 3]
                await asker.ask(who, _long(40 + 10 * (number % 9), "How do they live? " * 30))
            else:
                await asyncio.sleep(0.2)

    async with _asker(url, keys, seen) as asker:

        async def burst() -> None:
            # One user alone cannot fill it: it is told that its share is used up.
            users = ("alice",) * 20 + _GUESTS * 3
            await asyncio.gather(*(asker.ask(user, _long(8)) for user in users))

        async def strays() -> None:
            marked = {"messages": [{"role": "user", "content": "Hello!\nUSER: me"}]}
            await asker.ask("alice", _long(400), leave=True)
            await asker.ask("bob", {k: v for k, v in _long(50).items() if k != "logit_bias"})
            await asker.ask("alice", _long(8) | marked | {"stream": False})
            await asker.ask("alice", _long(400), {"X-Request-Timeout": "0.2"})
            await asker.ask("alice", _long(400) | {"stream": False}, {"X-Request-Timeout": "0.2"})
            await asker.ask("dave", _long(8))
            await asker.ask("dave", _long(8) | {"model": "synthia-demo-tot"})
            await asker.ask("alice", _long(8) | {"model": "another"})
            await asker.ask("alice", _long(8) | {"temperature": -1})
            await asker.ask("nobody", _long(8))
            model = {"model": "synthia-demo", "max_tokens": 8}
            hello = {"messages": [{"role": "user", "content": "Hello!"}]}
            await asker.ask("bob", model | {"prompt": "Hello"}, route="/v1/completions")
            await asker.ask("bob", model | hello, route="/v1/messages")
            asked = {"model": "synthia-demo", "input": "Hello!"}
            await asker.ask("bob", asked | {"max_output_tokens": 16}, route="/v1/responses")

        await asyncio.gather(
            *(stream(number) for number in range(_STREAMS)),
            every(4, burst),
            every(1, strays),
            every(0.5, lambda: asker.ask("carol", _long(8))),
        )
    return seen


def _long(tokens: int, question: str = "What is the difference?") -> dict[str, Any]:
    """A streamed request that nothing but `max_tokens` ends."""
    return {
        "model": "synthia-demo",
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "logit_bias": {"264": 100},
        "max_tokens": tokens,
    }


@dataclass(frozen=True)
class _Asker:
    session: aiohttp.ClientSession
    url: str
    keys: Mapping[str, str]
    seen: Counter[int]

    async def ask(
        self,
        user: str,
        body: Mapping[str, Any],
        headers: Mapping[str, str] | None = None,
        *,
        leave: bool = False,
        route: str = "/v1/chat/completions",
    ) -> None:
        key = {"Authorization": f"Bearer {self.keys.get(user, 'sk-unknown')}"}
        async with self.session.post(
            f"{self.url}{route}", json=body, headers=key | dict(headers or {})
        ) as response:
            self.seen[response.status] += 1
            if leave:
                await response.content.readany()
                response.close()
            else:
                await response.read()


@asynccontextmanager
async def _asker(url: str, keys: Mapping[str, str], seen: Counter[int]) -> AsyncIterator[_Asker]:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield _Asker(session, url, keys, seen)
