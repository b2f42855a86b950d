"""What is compared, each behind the same few calls: servers, and the processes of `direct.py`."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import urlsplit

import psutil

from lib.byte_client import Client, Found, Load
from lib.report import say
from lib.servers import ENGINE, Running, environment, own_group, start
from synthia_vllm.template.prompt import Message, normalize_messages, render

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

FIRST_TEXT: Final = re.compile(rb'"content": ?"[^"]')


DIRECT: Final = ("offline", "transformers")
"""What `direct.py` can run."""


@dataclass
class Measured(Found):
    """What one load brought."""

    firsts: list[float] = field(default_factory=list)
    """Seconds to the first text of each answer."""
    idle_cpu: float = 0.0
    """Cores that the targets which had nothing to do kept busy."""


class TimedClient(Client):
    """Also notes when the first text of each answer came."""

    _found: Measured

    def _next(self) -> None:
        self._sent, self._silent = time.perf_counter(), True
        super()._next()

    def data_received(self, data: bytes) -> None:
        if self._silent and FIRST_TEXT.search(data):
            self._silent = False
            self._found.firsts.append(time.perf_counter() - self._sent)
        super().data_received(data)


class Contestant(Protocol):
    """Something that answers prompts."""

    @property
    def running(self) -> Running: ...

    async def prompt_tokens(self, load: Load) -> int:
        """How many tokens it makes of the first prompt of `load`."""

    async def measure(self, load: Load, offset: int) -> Measured:
        """Put `load` on it; prompts are numbered from `offset`."""


@dataclass(frozen=True)
class Served:
    """A server."""

    running: Running

    async def prompt_tokens(self, load: Load) -> int:
        asked = json.loads(load.body(0)) | {"max_tokens": 1, "stream": False}
        del asked["stream_options"]
        request = urllib.request.Request(
            self.running.url + "/v1/chat/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with await asyncio.to_thread(urllib.request.urlopen, request, timeout=60) as response:
            return int(json.load(response)["usage"]["prompt_tokens"])

    async def measure(self, load: Load, offset: int) -> Measured:
        measured = Measured()
        loop = asyncio.get_running_loop()
        host, port = urlsplit(self.running.url).netloc.split(":")
        each = load.requests // load.connections
        ends = []
        cpu, begun = time.process_time(), time.perf_counter()
        for first in range(offset, offset + load.requests, each):
            done: asyncio.Future[None] = loop.create_future()
            bodies = [load.body(number) for number in range(first, first + each)]
            await loop.create_connection(
                lambda bodies=bodies, done=done: TimedClient(bodies, measured, done),  # type: ignore[misc]
                host,
                int(port),
            )
            ends.append(done)
        await asyncio.wait_for(asyncio.gather(*ends), 600)
        measured.seconds = time.perf_counter() - begun
        measured.client_cpu = time.process_time() - cpu
        return measured


@dataclass(frozen=True)
class Direct:
    """A process of `direct.py`."""

    running: Running
    pipes: asyncio.subprocess.Process

    async def ask(self, prompts: list[str], tokens: int, word: bool) -> dict[str, Any]:
        assert self.pipes.stdin is not None
        assert self.pipes.stdout is not None
        work = {"prompts": prompts, "tokens": tokens, "word": word}
        self.pipes.stdin.write(json.dumps(work).encode() + b"\n")
        reply: dict[str, Any] = json.loads(await self.pipes.stdout.readline())
        return reply

    async def prompt_tokens(self, load: Load) -> int:
        return int((await self.ask([prompt(load, 0)], 1, True))["prompt_tokens"])

    async def measure(self, load: Load, offset: int) -> Measured:
        measured = Measured()
        loop = self.running.name == "transformers"
        size = 1 if loop else load.connections
        for first in range(offset, offset + load.requests, size):
            prompts = [prompt(load, number) for number in range(first, first + size)]
            reply = await self.ask(prompts, load.tokens, load.word)
            measured.seconds += reply["seconds"]
            measured.tokens += reply["tokens"]
            measured.answered += size
            measured.firsts += [reply["seconds"]] if loop else []
        return measured


def prompt(load: Load, number: int) -> str:
    """The text that a server makes of request `number` of `load`."""
    turns = json.loads(load.body(number))["messages"]
    return render(normalize_messages([Message(turn["role"], turn["content"]) for turn in turns])[0])


def flags(name: str, engine: Mapping[str, Any]) -> list[str]:
    """Options of `AsyncEngineArgs`, as the target `name` takes them."""
    found: list[str] = []
    for option, value in engine.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        if name == "synthia":
            found += ["--engine", f"{option}={text}"]
        elif isinstance(value, bool):
            found.append(f"--{'' if value else 'no-'}{option.replace('_', '-')}")
        else:
            found.append(f"--{option.replace('_', '-')}={text}")
    return found


@asynccontextmanager
async def contestant(
    name: str,
    engine: Mapping[str, Any],
    *options: str,
    model: str = "demo",
    log: Path | None = None,
) -> AsyncIterator[Contestant]:
    """Start `name` with options of the engine's, and `options` of its own; stop it at the end."""
    if name not in DIRECT:
        async with start(name, *flags(name, engine), *options, model=model, log=log) as running:
            yield Served(running)
        return
    say(f"starting {name}")
    command = [sys.executable, str(Path(__file__).parents[1] / "direct.py"), name]
    command += [*(ENGINE if model == "demo" else ("--model", model)), *flags(name, engine)]
    with tempfile.TemporaryFile() as file, tempfile.TemporaryDirectory(prefix="bench-") as place:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=environment(Path(place)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            preexec_fn=own_group,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        family: list[psutil.Process] = []
        try:
            if not await process.stdout.readline():
                file.seek(0)
                raise SystemExit(f"{name} did not start:\n{file.read().decode()[-4000:]}")
            first = psutil.Process(process.pid)
            family = [first, *first.children(recursive=True)]
            yield Direct(Running(name, "", first, ()), process)
        finally:
            process.stdin.close()
            try:
                await asyncio.wait_for(process.wait(), 30)
            except TimeoutError:
                process.kill()
            for left in family:
                if left.is_running():
                    left.send_signal(signal.SIGKILL)


async def begin(
    names: Sequence[str], kv_cache_bytes: int, stack: AsyncExitStack
) -> list[Contestant]:
    """Start `names`, as many at a time as there are cores; `stack` stops them."""
    places = asyncio.Semaphore(psutil.cpu_count() or 1)

    async def one(name: str) -> Contestant:
        async with places:
            engine = {"kv_cache_memory_bytes": kv_cache_bytes}
            return await stack.enter_async_context(contestant(name, engine))

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(name)) for name in names]
    return [task.result() for task in tasks]


def cpu(contestants: Sequence[Contestant]) -> float:
    """Seconds of CPU that all processes of `contestants` have used."""
    return sum(one.running.api_cpu() + one.running.engine_cpu() for one in contestants)


async def rest(contestants: Sequence[Contestant]) -> None:
    """Wait until `contestants` leave the cores alone, for some seconds at most.

    vLLM's processes go on looking for work for a second after the last, a whole core each.
    """
    until = time.monotonic() + 5
    while time.monotonic() < until:
        before = cpu(contestants)
        await asyncio.sleep(0.2)
        if cpu(contestants) - before < 0.2 * 0.05:
            return


async def take(one: Contestant, load: Load, offset: int, others: Sequence[Contestant]) -> Measured:
    """Measure `one` under `load`, and that `others` rest. Raises `SystemExit` if answers lack."""
    await rest(others)
    before, begun = cpu(others), time.perf_counter()
    measured = await one.measure(load, offset)
    measured.idle_cpu = (cpu(others) - before) / (time.perf_counter() - begun)
    wanted = (load.requests, load.requests * load.tokens)
    if (measured.answered, measured.tokens) != wanted:
        raise SystemExit(
            f"{one.running.name}: {measured.answered} answers of {measured.tokens} tokens in all "
            f"instead of {wanted[0]} of {wanted[1]}"
        )
    return measured


async def same_prompts(contestants: Sequence[Contestant], load: Load) -> int:
    """The tokens of the first prompt. Raises `SystemExit` if they are not as many everywhere."""
    counts = {one.running.name: await one.prompt_tokens(load) for one in contestants}
    if len(set(counts.values())) > 1:
        raise SystemExit(f"The prompt is not the same everywhere, in tokens: {counts}")
    return next(iter(counts.values()))
