"""How the serving layer's cost grows: with open streams, idle connections, prompts, conversations.

CPU is that of the API process alone, by its own clock. What a token costs, and the gaps between
tokens, are taken while all streams stream: from when the last has begun to when the first ends, so
that neither has what requests cost in it.

- busy: so many streams at once;
- idle: so many open connections with nothing on them, beside a few busy streams;
- prompt: a request for one token, by the tokens of its prompt, up to the context;
- messages: the same, by the number of messages that the same text is cut into (each message adds
  some tokens of its own).

The demo model's engine makes a thousand tokens or so a second on two cores, however many streams
share them, so its gaps between tokens grow with the streams. `--fake` puts a fake engine behind
the same edge, in the edge's own process, that gives each stream its tokens at a fixed pace: then
the gaps, too, show the edge alone. Its CPU is the edge's and the fake's together; prompts mean
nothing to it and are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
import urllib.error
import urllib.request
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import psutil
import uvloop
from edge import Client, Found, Load, offer
from harness import free_port, machine, percentile, say, table
from targets import Running, start

from synthia_vllm.demo_training import dialogues

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

EXAMPLES = """\
examples:
  python benchmarks/scale.py
  python benchmarks/scale.py --plot . --json scale.json       also scale.png
  python benchmarks/scale.py --fake --plot . --json fake.json    also scale-fake.png
  python benchmarks/scale.py --sweeps busy --streams 1 64 1000 --rounds 1
"""
STREAMS: Final = (1, 4, 16, 64, 256, 1000)
BESIDE: Final = 16
"""Busy streams beside the idle connections."""
SHARES: Final = (1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 0.95)
"""Prompt lengths, as parts of the context."""
MESSAGES: Final = (1, 5, 17, 65, 129, 255)
"""An odd number of them, so that the last is the user's."""
MESSAGES_WORDS: Final = 255
FAKE_RATE: Final = 6000
"""Tokens a second of all streams of the fake engine together; enough streams provided."""
FAKE_FASTEST: Final = 0.005
"""Seconds between two tokens of one stream of the fake engine, at least."""
TRIES: Final = 5
STALLED: Final = 0.05
"""A measurement is made again, up to `TRIES` times, if this script itself stood still for a larger
part of it: the least disturbed counts."""
FLAT: Final = 1.25
"""What still passes for flat: the last value is at most so many times that of 16 streams."""
_ANSWERS: Final = " ".join(turn.assistant for dialogue in dialogues() for turn in dialogue).split()
PROSE: Final = random.Random(0).sample(_ANSWERS, len(_ANSWERS))
"""Words in no order, so that every part of them has as many tokens."""


@dataclass
class Talk(Load):
    """A load whose conversations are `words` words of prose, cut into `messages` messages."""

    words: int = 4
    messages: int = 1

    def body(self, number: int) -> bytes:
        asked = json.loads(super().body(number))
        words = (PROSE * (self.words // len(PROSE) + 1))[: self.words]
        size, rest = divmod(len(words), self.messages)
        contents, place = [], 0
        for i in range(self.messages):
            end = place + size + (i < rest)
            contents.append(" ".join(words[place:end]))
            place = end
        contents[0] = f"{number}: {contents[0]}"  # so that no prompt is in the prefix cache
        asked["messages"] = [
            {"role": ("user", "assistant")[i % 2], "content": text}
            for i, text in enumerate(contents)
        ]
        return json.dumps(asked).encode()


@dataclass
class Sweep:
    """The figures of one row of the tables: by `x`, then by name, a value for each round."""

    title: str
    x: str
    flat: bool
    """Whether it should stay the same; else it should lie on a straight line."""
    found: dict[int, dict[str, list[float]]] = field(default_factory=dict)

    def note(self, x: int, **values: float) -> None:
        for name, value in values.items():
            self.found.setdefault(x, {}).setdefault(name, []).append(value)

    def medians(self, name: str) -> tuple[list[int], list[float]]:
        """The places and the medians there, for drawing."""
        places = sorted(self.found)
        return places, [statistics.median(self.found[x][name]) for x in places]


SWEEPS: Final = {
    "busy": ("CPU of a streamed token, by streams at once", "streams", True),
    "idle": (f"the same of {BESIDE} streams, by idle connections beside them", "idle", True),
    "prompt": ("CPU of a request for one token, by its prompt", "prompt tokens", False),
    "messages": ("the same, by messages of the same text", "messages", False),
}


# --- Servers -------------------------------------------------------------------------------------


def _fake_server(port: int, delay: float, tokens: int) -> None:
    """Serve a fake engine that gives a token every `delay` seconds to each stream; never returns.

    To be run in a process of its own.
    """
    from prometheus_client import CollectorRegistry

    from synthia_vllm.app import create_app
    from synthia_vllm.engine import Traits
    from synthia_vllm.fake import FakeEngine
    from synthia_vllm.metrics import Metrics
    from synthia_vllm.server import Server
    from synthia_vllm.settings import Settings

    engine = FakeEngine(
        pieces=("o",) * 2 * tokens,  # one byte is one token
        delay=delay,
        traits=Traits(max_model_len=4096, vocab_size=32000, longest_token=1, max_num_seqs=4096),
    )
    limits = {"max_requests": 4096, "max_queue_seconds": 1000}
    settings = Settings.model_validate({"model": "demo", "port": port, "limits": limits})
    app = create_app(engine, settings, Metrics(CollectorRegistry()))
    Server(app, settings).run()


@asynccontextmanager
async def start_fake(streams: int, tokens: int) -> AsyncIterator[Running]:
    """The edge over a fake engine that paces `streams` streams, with `tokens` as in `Meter`."""
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(
        target=_fake_server, args=(port, fake_delay(streams), tokens), daemon=True
    )
    process.start()
    assert process.pid is not None
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while not await asyncio.to_thread(_ready, url):
            if not process.is_alive() or time.monotonic() > deadline:
                raise SystemExit("The server with the fake engine did not start.")
            await asyncio.sleep(0.1)
        itself = psutil.Process(process.pid)
        yield Running("edge + fake engine", url, itself, (itself,))
    finally:
        process.terminate()
        await asyncio.to_thread(process.join, 30)
        if process.is_alive():
            process.kill()


def fake_delay(streams: int) -> float:
    """Seconds between two tokens of each of `streams` streams of the fake engine."""
    return max(streams / FAKE_RATE, FAKE_FASTEST)


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5):
            return True
    except OSError:
        return False


def context_of(target: Running) -> int:
    """Tokens that a prompt and its answer may have together."""
    with urllib.request.urlopen(f"{target.url}/v1/models", timeout=10) as response:
        return int(json.load(response)["data"][0]["max_model_len"])


def prompt_tokens(target: Running, load: Load) -> int:
    """Tokens of a prompt of `load`, as the server counts them. Raises `SystemExit` if refused."""
    asked = urllib.request.Request(
        f"{target.url}/v1/chat/completions",
        json.dumps(json.loads(load.body(0)) | {"stream": False, "stream_options": None}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(asked, timeout=60) as response:
            return int(json.load(response)["usage"]["prompt_tokens"])
    except urllib.error.HTTPError as error:
        raise SystemExit(f"refused: {error.read().decode()}") from error


# --- Measuring -----------------------------------------------------------------------------------


class Idle(asyncio.Protocol):
    """A connection that asked one thing, got its answer, and stays open."""

    def __init__(self, answered: asyncio.Future[None]) -> None:
        self._answered = answered
        self.open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is not one by class
        self.transport.write(b"GET /ready HTTP/1.1\r\nHost: bench\r\n\r\n")

    def data_received(self, data: bytes) -> None:
        if not self._answered.done():
            self._answered.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if not self._answered.done():
            self._answered.set_exception(exc or ConnectionError("closed by the server"))


@contextmanager
def closed_at_end(connections: Sequence[Idle]) -> Iterator[None]:
    """Close `connections`. Raises `SystemExit` if the server did so before."""
    try:
        yield
        lost = sum(not connection.open for connection in connections)
        if lost:
            raise SystemExit(
                f"The server closed {lost} of {len(connections)} idle connections during the "
                "measurement, which took longer than it keeps them: ask for fewer --tokens."
            )
    finally:
        for connection in connections:
            connection.transport.close()


async def idle_connections(target: Running, number: int) -> list[Idle]:
    """Open `number` connections and have each answered once."""
    loop = asyncio.get_running_loop()
    host, port = target.url.removeprefix("http://").split(":")
    found, answers = [], []
    for _ in range(number):
        answered: asyncio.Future[None] = loop.create_future()
        _, protocol = await loop.create_connection(partial(Idle, answered), host, int(port))
        found.append(protocol)
        answers.append(answered)
    await asyncio.wait_for(asyncio.gather(*answers), 60)
    return found


class Window:
    """The time in which all of `streams` streams stream, and what was seen in it."""

    def __init__(self, target: Running, found: Found, streams: int) -> None:
        self._target, self._found, self._to_begin = target, found, streams
        self.clients: list[Watched] = []
        self._is_open = self._is_over = False
        self._begun = self._cpu = 0.0
        self.events = self.all_events = 0
        self.seconds = self.api_cpu = self.stall = 0.0
        self.gaps: list[float] = []

    def saw(self, events: int, *, first: bool) -> None:
        """Some stream brought `events` events with text; `first` if it had brought none before."""
        self._to_begin -= first
        self.all_events += events
        if self._is_open:
            self.events += events
        elif not self._to_begin and not self._is_over:
            self._is_open = True
            self._found.gaps.clear()
            for client in self.clients:
                client.restart()
            self._begun, self._cpu = time.perf_counter(), self._target.api_cpu()

    async def watch_stalls(self) -> None:
        """Note the longest that this process did not get to run: gaps up to that may be its own."""
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(0.002)
            if self._is_open:
                self.stall = max(self.stall, time.perf_counter() - begun - 0.002)

    def close(self) -> None:
        """Some stream has ended."""
        if self._is_open:
            self.seconds = time.perf_counter() - self._begun
            self.api_cpu = self._target.api_cpu() - self._cpu
            self.gaps = list(self._found.gaps)
        self._is_open, self._is_over = False, True


class Watched(Client):
    """A client that tells `window` of what comes."""

    def __init__(
        self, window: Window, bodies: list[bytes], found: Found, done: asyncio.Future[None]
    ) -> None:
        super().__init__(bodies, found, done)
        self._window = window
        self._has_begun = False
        window.clients.append(self)

    def data_received(self, data: bytes) -> None:
        events = data.count(b'"content":')
        super().data_received(data)
        if events:
            self._window.saw(events, first=not self._has_begun)
            self._has_begun = True
        if self._found.answered:
            self._window.close()

    def restart(self) -> None:
        """Count no gap between what has come and what comes next."""
        self._last = 0.0


class Meter:
    """Takes the measurements, with prompts numbered so that none comes twice."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._numbers = count(0, 10_000)

    async def per_token(self, target: Running, streams: int) -> dict[str, float]:
        """What a token costs and the gaps between tokens, with `streams` streams at once."""
        # Fewer each where there are many, so that no point takes long; but they must outlast
        # the time in which the last ones begin.
        tokens = max(32, min(2 * self._tokens, 16 * self._tokens // streams))
        load = Talk("stream", streams, streams, tokens, True)
        # Where cores are few, this process may have to wait for one, while tokens pile up.
        tries = []
        for _ in range(TRIES):
            window, found = await self._stream(target, load)
            if window.events >= streams:
                tries.append((window.stall / window.seconds, window, found))
                if tries[-1][0] <= STALLED:
                    break
        if not tries:
            raise SystemExit(
                f"Some of {streams} streams ended before all had begun: ask for more --tokens, "
                "or for --max-num-seqs if that is less."
            )
        _, window, found = min(tries, key=itemgetter(0))
        seen = window.events * found.tokens / window.all_events  # an event can bring two tokens
        return {
            "us_per_token": 1e6 * window.api_cpu / seen,
            "itl_p50_ms": 1e3 * percentile(window.gaps, 0.5),
            "itl_p99_ms": 1e3 * percentile(window.gaps, 0.99),
            "client_stall_ms": 1e3 * window.stall,
            "tokens": seen,
            "tokens_per_second": seen / window.seconds,
            "tokens_per_event": found.tokens / window.all_events,
            "api_busy": window.api_cpu / window.seconds,
        }

    async def _stream(self, target: Running, load: Load) -> tuple[Window, Found]:
        found, offset = Found(), next(self._numbers)
        window = Window(target, found, load.connections)
        loop = asyncio.get_running_loop()
        host, port = target.url.removeprefix("http://").split(":")
        waiting = []
        for number in range(load.connections):
            done: asyncio.Future[None] = loop.create_future()
            client = partial(Watched, window, [load.body(offset + number)], found, done)
            await loop.create_connection(client, host, int(port))
            waiting.append(done)
        watching = asyncio.create_task(window.watch_stalls())
        try:
            await asyncio.wait_for(asyncio.gather(*waiting), 600)
        finally:
            watching.cancel()
        return window, found

    async def per_request(self, target: Running, load: Talk) -> dict[str, float]:
        """What a request of `load` costs."""
        found = await offer(target, load, next(self._numbers))
        return {"us_per_request": 1e6 * found.api_cpu / found.answered}


async def at_rest(target: Running) -> float:
    """The share of a core that the API process takes while there is nothing to do."""
    await asyncio.sleep(1)
    begun, cpu = time.perf_counter(), target.api_cpu()
    await asyncio.sleep(3)
    return (target.api_cpu() - cpu) / (time.perf_counter() - begun)


async def measure_streams(
    sweeps: dict[str, Sweep],
    meter: Meter,
    targets: dict[int, Running],
    counts: list[int],
    rounds: int,
) -> None:
    """The sweeps over streams and over idle connections; `targets` by the streams they are for."""
    await meter.per_token(targets[BESIDE], BESIDE)  # to warm up
    for number in range(rounds):
        for streams in counts:
            if "busy" in sweeps:
                say(f"round {number + 1} of {rounds}: {streams} streams")
                found = await meter.per_token(targets[streams], streams)
                one = Talk("request", streams, streams, 1, True)
                found |= await meter.per_request(targets[streams], one)
                sweeps["busy"].note(streams, **found)
            if "idle" in sweeps:
                say(f"round {number + 1} of {rounds}: {streams} idle connections")
                connections = await idle_connections(targets[BESIDE], streams)
                with closed_at_end(connections):
                    found = await meter.per_token(targets[BESIDE], BESIDE)
                sweeps["idle"].note(streams, **found)


async def measure_prompts(
    sweeps: dict[str, Sweep], meter: Meter, target: Running, rounds: int
) -> None:
    """The sweeps over prompt lengths and over numbers of messages."""

    def load(words: int, messages: int) -> Talk:
        return Talk("request", 8, 16, 1, True, words, messages)

    # Words of each prompt, from what the server makes of some.
    each = (prompt_tokens(target, load(900, 1)) - prompt_tokens(target, load(100, 1))) / 800
    lengths = [int(share * context_of(target) / each) for share in SHARES]
    loads = {"prompt": [load(words, 1) for words in lengths]}
    loads["messages"] = [load(MESSAGES_WORDS, messages) for messages in MESSAGES]
    sizes = {
        name: [prompt_tokens(target, point) for point in points] for name, points in loads.items()
    }
    await meter.per_request(target, load(100, 1))  # to warm up
    for number in range(rounds):
        for name in sweeps.keys() & loads.keys():
            for point, size in zip(loads[name], sizes[name], strict=True):
                x = size if name == "prompt" else point.messages
                say(f"round {number + 1} of {rounds}: {name} {x}")
                found = await meter.per_request(target, point)
                if name == "messages":
                    found["prompt_tokens"] = size
                sweeps[name].note(x, **found)


# --- Showing -------------------------------------------------------------------------------------


def shape(sweep: Sweep) -> str:
    """Whether the medians are flat, or on a line, in words with numbers."""
    name = "us_per_token" if sweep.flat else "us_per_request"
    places, values = sweep.medians(name)
    if len(places) < 3:
        return "too few points to tell"
    if sweep.flat:
        base = BESIDE if BESIDE in places else places[0]
        ratio = values[-1] / values[places.index(base)]
        judged = "flat" if ratio <= FLAT else "NOT FLAT"
        return f"{judged}: at {places[-1]} {ratio:.2f} times that at {base}"
    slope, start_ = statistics.linear_regression(places, values)
    off = max(abs(y - start_ - slope * x) / y for x, y in zip(places, values, strict=True))
    judged = "linear" if off <= FLAT - 1 else "NOT LINEAR"
    return (
        f"{judged}: {start_:.0f} + {slope:.3g} us for each of {sweep.x}; at most {off:.0%} off that"
    )


def show(sweep: Sweep) -> None:
    """Print the table and the shape of `sweep`."""
    names = list(next(iter(sweep.found.values())))
    rows = [[sweep.x, *names]]
    for x in sorted(sweep.found):
        rows.append([str(x), *(_spread(sweep.found[x][name]) for name in names)])
    print(f"{sweep.title}:\n\n{table(rows)}\n\n{shape(sweep)}\n")


def _spread(values: Sequence[float]) -> str:
    """Median and range, without exponents."""
    parts = (statistics.median(values), min(values), max(values))
    middle, low, high = (f"{v:.0f}" if v >= 100 else f"{v:.3g}" for v in parts)
    return f"{middle} ({low} to {high})"


def plot(sweeps: dict[str, Sweep], file: Path, note: str) -> None:
    """Draw all sweeps into the PNG `file`."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    panels = []
    for sweep in sweeps.values():
        panels.append((sweep, "us_per_token" if sweep.flat else "us_per_request", "us of CPU"))
        if sweep.flat:
            panels.append((sweep, "itl_p99_ms", "p99 between tokens, ms"))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.5 * columns, 3.5 * rows), squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (sweep, name, label) in zip(axes.flat, panels, strict=False):
        places, values = sweep.medians(name)
        low = [min(sweep.found[x][name]) for x in places]
        high = [max(sweep.found[x][name]) for x in places]
        axis.fill_between(places, low, high, alpha=0.25)
        axis.plot(places, values, marker="o")
        axis.set(title=sweep.title.replace(", by", ",\nby"), xlabel=sweep.x, ylabel=label)
        axis.title.set_fontsize(9)
        if sweep.flat:
            axis.set_xscale("log")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.suptitle(note, fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


async def main(args: argparse.Namespace) -> int:
    chosen = [n for n in SWEEPS if n in args.sweeps and not (args.fake and not SWEEPS[n][2])]
    sweeps = {name: Sweep(*SWEEPS[name]) for name in chosen}
    meter = Meter(args.tokens)
    async with AsyncExitStack() as stack:
        counts = sorted(set(args.streams))
        if args.fake:
            targets = {}
            for streams in sorted({*counts, BESIDE}):
                say(f"starting the edge with a fake engine for {streams} streams")
                fake = start_fake(streams, args.tokens)
                targets[streams] = await stack.enter_async_context(fake)
        else:
            options = [
                "--set", "limits.max_requests=4096", "--set", "limits.max_queue_seconds=1000",
                "--engine", f"max_num_seqs={args.max_num_seqs}",
            ]  # fmt: skip
            target = await stack.enter_async_context(start("synthia", *options))
            targets = dict.fromkeys((*counts, BESIDE), target)
        with suppress(PermissionError):  # the engine would take every core there is
            os.setpriority(os.PRIO_PROCESS, 0, -10)
        rest = await at_rest(targets[BESIDE])
        await measure_streams(sweeps, meter, targets, counts, args.rounds)
        if not args.fake:
            await measure_prompts(sweeps, meter, target, args.rounds)
    say("")
    engine = "a FAKE engine in the API process" if args.fake else "vLLM, demo model"
    note = f"Edge over {engine}; CPU of the API process; median (range) of {args.rounds} rounds."
    print(f"{note} At rest it takes {rest:.2%} of a core.\n")
    for sweep in sweeps.values():
        show(sweep)
    if args.plot:
        args.plot.mkdir(parents=True, exist_ok=True)
        plot(sweeps, args.plot / ("scale-fake.png" if args.fake else "scale.png"), note)
    if args.json:
        document = {
            "environment": machine(),
            "engine": engine,
            "rounds": args.rounds,
            "at_rest": rest,
            "sweeps": {
                name: {"title": s.title, "x": s.x, "shape": shape(s), "found": s.found}
                for name, s in sweeps.items()
            },
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fake", action="store_true", help="a fake engine instead of vLLM")
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--streams", nargs="+", type=int, default=STREAMS, metavar="N")
    parser.add_argument("--tokens", type=int, default=128, help="of a stream, where it is among 16")
    parser.add_argument(
        "--max-num-seqs", type=int, default=1000, help="streams that decode at the same time"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw the curves into this folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    sys.exit(uvloop.run(main(parser.parse_args())))
