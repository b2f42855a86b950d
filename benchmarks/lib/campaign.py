"""Many loads on many contestants within a time: what is done, what is missing, what it brought."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from lib.bench_client import Server, open_session
from lib.bench_client import offer as offer_conversations
from lib.byte_client import WORD, Client, Found, Load
from lib.contestants import FIRST_TEXT, Contestant, Direct
from lib.report import percentile
from lib.score import summary
from lib.servers import MODEL
from lib.workloads import SHAPES, WORDS, arrivals, conversations

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

TTFT_GOAL_MS: Final = 500
ITL_GOAL_MS: Final = 50
"""What a good answer keeps: its first text, and 99 % of the gaps in it."""
_POISSON_SECONDS: Final = 20


@dataclass(frozen=True)
class Item:
    """A load."""

    kind: str
    """``lengths``, or the name of a workload of `workloads.py`, in a closed or an open loop."""
    prompt: int = 0
    answer: int = 0
    connections: int = 0
    rounds: int = 1
    """Answers over each connection."""
    rate: float = 0.0
    """Requests a second, at random moments; 0 for a closed loop."""

    @property
    def name(self) -> str:
        """As the results page has it."""
        if self.rate:
            return f"{self.kind} at {self.rate:g}/s"
        what = f"{self.prompt}/{self.answer}" if self.kind == "lengths" else self.kind
        return f"{what}, {self.connections} at once"

    @property
    def tokens(self) -> float:
        """Of all answers, about."""
        if self.rate:
            return self.rate * _POISSON_SECONDS * 200
        each = self.answer or 200 * SHAPES[self.kind].turns
        return float(each * self.connections * self.rounds)


@dataclass(frozen=True)
class Visit:
    """A contestant to be started once, and what is to be put on it."""

    target: str
    label: str
    engine: Mapping[str, Any]
    items: tuple[Item, ...]
    model: str
    word: bool
    """Answers are held to one word, so that they are as long as asked for."""
    options: tuple[str, ...] = ()
    """Of the target's own."""


class Book:
    """What was found so far, in a directory: a line of `results.jsonl` for each load."""

    def __init__(self, directory: Path, setting: Mapping[str, Any]) -> None:
        self.directory = directory
        self.results: dict[tuple[str, str], dict[str, Any]] = {}
        """By label and load."""
        self.notes: list[dict[str, Any]] = []
        """Starts and failures."""
        self._file = directory / "results.jsonl"
        if self._file.exists():
            for line in self._file.read_text().splitlines():
                self._take(json.loads(line))
        self.setting = dict(setting)
        self._write({"setting": self.setting})

    def _take(self, entry: dict[str, Any]) -> None:
        if "figures" in entry:
            self.results[entry["label"], entry["load"]] = entry["figures"]
        elif "setting" not in entry:
            self.notes.append(entry)

    def _write(self, entry: dict[str, Any]) -> None:
        self._take(entry)
        with self._file.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def missing(self, visit: Visit) -> list[Item]:
        """What is yet to be put on it."""
        return [item for item in visit.items if (visit.label, item.name) not in self.results]

    def note(self, visit: Visit, item: Item, figures: dict[str, Any]) -> None:
        """A load is over."""
        entry = {"label": visit.label, "load": item.name, "engine": dict(visit.engine)}
        self._write(entry | {"figures": figures})

    def note_start(self, visit: Visit, seconds: float) -> None:
        """It answers, after so long."""
        self._write({"label": visit.label, "started_in": round(seconds, 1)})

    def note_failure(self, visit: Visit, why: str) -> None:
        """It did not start, or ended."""
        self._write({"label": visit.label, "failed": why[-2000:]})

    def estimate(self, visit: Visit, item: Item) -> float:
        """Seconds that `item` will take, by what is known of it or of this contestant."""
        same = [figures for (_, load), figures in self.results.items() if load == item.name]
        if same:
            return 1.2 * max(float(figures["seconds"]) for figures in same)
        mine = [figures for (label, _), figures in self.results.items() if label == visit.label]
        if item.rate or not mine:
            return 2.0 * _POISSON_SECONDS if item.rate else 20.0
        return 5 + item.tokens / max(float(figures["tokens_per_second"]) for figures in mine)


@dataclass
class Watched(Found):
    """What one connection brought."""

    answers: list[tuple[float, float]] = field(default_factory=list)
    """Seconds to the first text, and the gap that 99 % do not exceed."""


class AnswerClient(Client):
    """Looks at each answer by itself."""

    _found: Watched
    _begun = 0
    """Of the gaps, the first of this answer."""
    _sent = 0.0
    _first = 0.0

    def _next(self) -> None:
        if self._last:
            gaps = self._found.gaps[self._begun :]
            self._found.answers.append((self._first, percentile(gaps, 0.99) if gaps else 0.0))
        self._begun, self._sent, self._first = len(self._found.gaps), time.perf_counter(), 0.0
        super()._next()

    def data_received(self, data: bytes) -> None:
        if not self._first and FIRST_TEXT.search(data):
            self._first = time.perf_counter() - self._sent
        super().data_received(data)


@dataclass
class Prose(Load):
    """Prompts of so many words, each one token."""

    words: int = 1

    def conversation(self, number: int) -> list[dict[str, str]]:
        """What request `number` asks: no two begin alike."""
        begin = [WORDS[number // len(WORDS) ** i % len(WORDS)] for i in range(4)]
        rest = [WORDS[(number + i) % len(WORDS)] for i in range(max(0, self.words - len(begin)))]
        return [{"role": "user", "content": " ".join(begin + rest)}]


_numbers = iter(range(0, 10**12, 10**6))


async def measure(one: Contestant, item: Item, visit: Visit) -> dict[str, Any]:
    """Put `item` on `one`; the figures of it. Raises `RuntimeError` if answers are missing."""
    running = one.running
    at, api, engine = time.time(), running.api_cpu(), running.engine_cpu()
    client = time.process_time()
    if item.kind == "lengths":
        load = Prose(
            "stream", item.connections, item.connections * item.rounds, item.answer, True,
            visit.word, words=item.prompt,
        )  # fmt: skip
        figures = await (_direct(one, load) if isinstance(one, Direct) else _served(one, load))
    else:
        figures = await _conversations(one, item, visit)
    seconds = figures["seconds"]
    if running.api:
        figures["api_us_per_token"] = 1e6 * (running.api_cpu() - api) / figures["tokens"]
        figures["api_busy"] = (running.api_cpu() - api) / seconds
    figures["engine_busy"] = (running.engine_cpu() - engine) / seconds
    figures["client_busy"] = (time.process_time() - client) / seconds
    return figures | {"tokens_per_second": figures["tokens"] / seconds, "at": at}


async def _direct(one: Direct, load: Load) -> dict[str, Any]:
    measured = await one.measure(load, next(_numbers))
    _require(measured, load)
    found: dict[str, Any] = {"seconds": measured.seconds, "tokens": measured.tokens}
    if measured.firsts:  # the loop shows an answer when it is whole
        found["ttft_p50_ms"] = 1e3 * percentile(measured.firsts, 0.5)
    return found


async def _served(one: Contestant, load: Load) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    host, port = urlsplit(one.running.url).netloc.split(":")
    offset, each = next(_numbers), load.requests // load.connections
    connections, ends = [], []
    begun = time.perf_counter()
    for first in range(offset, offset + load.requests, each):
        done: asyncio.Future[None] = loop.create_future()
        found = Watched()
        bodies = [load.body(number) for number in range(first, first + each)]
        await loop.create_connection(
            lambda bodies=bodies, found=found, done=done: AnswerClient(bodies, found, done),  # type: ignore[misc]
            host,
            int(port),
        )
        connections.append(found)
        ends.append(done)
    await asyncio.wait_for(asyncio.gather(*ends), 600)
    seconds = time.perf_counter() - begun
    total = Found(
        answered=sum(found.answered for found in connections),
        tokens=sum(found.tokens for found in connections),
    )
    _require(total, load)
    answers = [answer for found in connections for answer in found.answers]
    gaps = [gap for found in connections for gap in found.gaps]
    good = sum(1e3 * f <= TTFT_GOAL_MS and 1e3 * g <= ITL_GOAL_MS for f, g in answers)
    firsts = [first for first, _ in answers]
    return {
        "seconds": seconds,
        "tokens": total.tokens,
        "good_share": good / len(answers),
        **{f"ttft_p{p}_ms": 1e3 * percentile(firsts, p / 100) for p in (50, 99)},
        **{f"itl_p{p}_ms": 1e3 * percentile(gaps, p / 100) for p in (50, 99)},
    }


def _require(found: Found, load: Load) -> None:
    wanted = load.requests, load.requests * load.tokens
    if (found.answered, found.tokens) != wanted:
        raise RuntimeError(
            f"{found.answered} answers of {found.tokens} tokens came instead of "
            f"{wanted[0]} of {wanted[1]}"
        )


async def _conversations(one: Contestant, item: Item, visit: Visit) -> dict[str, Any]:
    body: dict[str, Any] = {"ignore_eos": True, "temperature": 0}
    if visit.word:
        body["logit_bias"] = {WORD: 100}
    seed = next(_numbers) % 2**31
    async with open_session(600) as session:
        server = Server(session, one.running.url, MODEL, body)
        count = round(item.rate * _POISSON_SECONDS) or item.connections * item.rounds
        asked = conversations(SHAPES[item.kind], count, seed)
        moments = arrivals(count, item.rate, seed=seed) if item.rate else []
        run = await offer_conversations(
            server, asked, concurrency=item.connections, moments=moments
        )
    found = summary(run, {"ttft": TTFT_GOAL_MS, "itl": ITL_GOAL_MS})
    if found["refused"] + found["errors"]:
        reasons = found["refused_by_reason"] | found["errors_by_reason"]
        raise RuntimeError(f"Not all were answered: {dict(reasons)}")
    return {
        "seconds": found["duration"],
        "tokens": found["total_output_tokens"],
        "good_share": found["good_share"],
        **{f"{m}_p{p}_ms": found[f"p{p}_{m}_ms"] for m in ("ttft", "itl") for p in (50, 99)},
    }
