"""The streaming path by itself: what is written, when, and in how many pieces."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import CollectorRegistry, Histogram

from synthia_vllm.api.chat.protocol import ChatMessage, ChatRequest
from synthia_vllm.api.chat.wire import ChatChunks
from synthia_vllm.engine.base import EngineRequest, Sampling
from synthia_vllm.engine.fake import FakeEngine, FakeOutput
from synthia_vllm.errors import EngineDead
from synthia_vllm.generate import response as generate_response
from synthia_vllm.generate.response import Delta, Prepared, ResponseState
from synthia_vllm.http.sse import Stream, WriteBatcher, stream_answer
from synthia_vllm.telemetry.metrics import BulkHistogram, Metrics, settle

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from synthia_vllm.engine.base import Output, Sink


@dataclass
class Hands(FakeEngine):
    """An engine that says what the test hands over, when it does."""

    sink: Any = None

    @asynccontextmanager
    async def submit(self, request: EngineRequest, sink: Sink) -> AsyncGenerator[None, None]:
        self.sink = sink
        async with super().submit(request, _Nobody()):
            yield


class _Nobody:
    def put(self, *_: Any) -> bool:
        return False

    def fail(self, *_: Any) -> None: ...

    def ran(self, *_: Any) -> None: ...


class Heard:
    """A choice whose answer is what the engine says."""

    def take(self, output: Output) -> Delta:
        return Delta(output.index, output.text, None, output.finish_reason, None)


@dataclass
class Response:
    """A stream, run by the test, and what reached its socket."""

    n: int = 1
    keeps_up: bool = True
    written: list[bytes] = field(default_factory=list)
    """By the direct way."""
    sent: list[Any] = field(default_factory=list)
    """By ASGI's."""
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    batcher: WriteBatcher = field(default_factory=WriteBatcher)

    def write(self, data: bytes) -> bool:
        self.written.append(data)
        return self.keeps_up

    async def send(self, message: Any) -> None:
        if not self.keeps_up:
            await self.gate.wait()
        self.sent.append(message)

    async def run(self) -> AsyncIterator[Any]:
        """Start the stream; yields its sink once, then waits for the end."""
        engine = Hands(delay=60)
        request = EngineRequest(
            request_id="x", prompt_token_ids=[1, 2], sampling=Sampling(max_tokens=9, n=self.n)
        )
        choices = tuple(Heard() for _ in range(self.n))
        asked = ChatRequest(
            model="m", messages=[ChatMessage(role="user", content="Hi")], stream=True
        )
        prepared = Prepared(asked, (request,), choices, usage="never", question="")
        state = ResponseState(prepared, "x")
        series = Metrics(CollectorRegistry()).of("m")
        stream = Stream(
            state, ChatChunks(state), self.batcher, series, arrived=0.0, write=self.write
        )
        task = asyncio.create_task(
            stream_answer(state, engine, stream, send=self.send, headers=[], keepalive=0)
        )
        await asyncio.sleep(0)
        yield engine.sink
        await asyncio.wait_for(task, 5)


def test_the_pace_is_of_each_whole_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """From its first token to its end; not of one token alone, nor of what broke off."""
    clock = iter([10.0, 12.0, 13.0])
    reads = SimpleNamespace(time=time.time, perf_counter=lambda: next(clock))
    monkeypatch.setattr(generate_response, "time", reads)
    request = EngineRequest(
        request_id="x", prompt_token_ids=[1, 2], sampling=Sampling(max_tokens=9, n=4)
    )
    asked = ChatRequest(model="m", messages=[ChatMessage(role="user", content="Hi")])
    choices = tuple(Heard() for _ in range(4))
    state = ResponseState(Prepared(asked, (request,), choices, usage="never", question=""), "x")
    state.take(FakeOutput(0, "a", [3]), 0)
    state.take(FakeOutput(1, "a", [3]), 0)
    state.take(FakeOutput(0, "bcde", [3, 3, 3, 3], finish_reason="stop"), 0)
    state.take(FakeOutput(1, "bc", [3, 3], finish_reason="length"), 0)
    state.take(FakeOutput(2, "a", [3], finish_reason="stop"), 0)
    state.take(FakeOutput(3, "abc", [3, 3, 3]), 0)
    assert state.token_seconds == [0.5, 1.5]


def say(sink: Any, text: str, choice: int = 0, end: str | None = None) -> None:
    sink.put(FakeOutput(choice, text, [3], None, end), 0)


def texts(chunks: list[bytes]) -> list[list[str]]:
    """The texts of the events in each chunk."""
    return [
        [
            json.loads(event.removeprefix("data: "))["choices"][0]["delta"].get("content", "")
            for event in chunk.decode().split("\n\n")
            if event and "[DONE]" not in event
        ]
        for chunk in chunks
    ]


async def turn() -> None:
    """Let the event loop come round, twice: what is due in it is done."""
    await asyncio.sleep(0.01)


def test_one_write_for_what_came_in_one_turn() -> None:
    """While the loop keeps up each output is a write; what came together goes together."""

    async def main() -> None:
        response = Response()
        async for sink in response.run():
            say(sink, "a")
            await turn()
            assert [m["type"] for m in response.sent] == [
                "http.response.start",
                "http.response.body",
            ]
            say(sink, "b")
            await turn()
            say(sink, "c")
            say(sink, "d")
            await turn()
            assert texts(response.written) == [["b"], ["cd"]]
            say(sink, "e", end="stop")
        assert texts([response.sent[-1]["body"]]) == [["e"]]
        assert response.sent[-1]["body"].endswith(b"data: [DONE]\n\n")

    asyncio.run(main())


def test_choices_are_events_of_their_own() -> None:
    """Pieces of two answers are never one event."""

    async def main() -> None:
        response = Response(n=2)
        async for sink in response.run():
            say(sink, "a")
            await turn()
            say(sink, "b", 0)
            say(sink, "x", 1)
            say(sink, "c", 0)
            await turn()
            assert texts(response.written) == [["bc", "x"]]
            say(sink, "", 0, end="stop")
            say(sink, "y", 1, end="length")
        assert texts([response.sent[-1]["body"]]) == [["", "y"]]

    asyncio.run(main())


def test_slow_client_gets_all_of_it_in_order() -> None:
    """What a client does not take is put together, sent when it can be, and never lost."""

    async def main() -> None:
        response = Response()
        async for sink in response.run():
            say(sink, "a")
            await turn()
            response.keeps_up = False
            for char in "bcdef":
                say(sink, char)
                await turn()
            assert texts(response.written) == [["b"]]
            response.keeps_up = True
            response.gate.set()
            await turn()
            say(sink, "g")
            await turn()
            say(sink, "h", end="stop")
        bodies = [m["body"] for m in response.sent[1:]]
        assert texts(bodies) == [["a"], ["c"], ["def"], ["h"]]
        assert texts(response.written) == [["b"], ["g"]]

    asyncio.run(main())


def test_error_comes_after_what_was_kept() -> None:
    """A stream whose engine dies ends with what there was and the error, without ``[DONE]``."""

    async def main() -> None:
        response = Response()
        async for sink in response.run():
            say(sink, "a")
            await turn()
            say(sink, "b")
            sink.fail(EngineDead())
        said = b"".join(m.get("body", b"") for m in response.sent) + b"".join(response.written)
        assert said.count(b'"content":"b"') == 1
        assert b"engine_dead" in response.sent[-1]["body"]
        assert b"[DONE]" not in said

    asyncio.run(main())


def test_broken_stream_breaks_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """Streams are flushed together; what goes wrong in one is told to its client alone."""

    class Broken(Response):
        def write(self, data: bytes) -> bool:
            raise ZeroDivisionError

    async def main() -> None:
        batcher = WriteBatcher()
        broken, sound = Broken(batcher=batcher), Response(batcher=batcher)
        async for bad in broken.run():
            async for good in sound.run():
                for sink in (bad, good):
                    say(sink, "a")
                await turn()
                for sink in (bad, good):
                    say(sink, "b")
                await turn()
                say(good, "c", end="stop")
        assert b"engine_fault" in broken.sent[-1]["body"]
        assert texts(sound.written) == [["b"]]
        assert texts([sound.sent[-1]["body"]]) == [["c"]]

    asyncio.run(main())
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("times", [1, 100], ids=["few", "many"])
def test_bulk_is_the_same_as_one_by_one(times: int) -> None:
    """Values that wait show as prometheus_client's own do, whenever somebody looks."""
    values = [0.0, 0.1, 0.1, 0.15, 0.2, 0.9, 1.0, 7.0] * times
    shown = []
    for kind in ("at once", "each", "prometheus_client"):
        registry = CollectorRegistry()
        made = Histogram if kind == "prometheus_client" else BulkHistogram
        histogram = made("x", "x", registry=registry, buckets=(0.1, 0.2, 1.0))
        if isinstance(histogram, BulkHistogram) and kind == "at once":
            histogram.observe_all(values)
            histogram.observe_all([])
        else:
            for value in values:
                histogram.observe(value)
        [family] = registry.collect()
        shown.append(
            {
                (s.name, *s.labels.items()): s.value
                for s in family.samples
                if "created" not in s.name
            }
        )
    assert shown[0] == pytest.approx(shown[2])
    assert shown[1] == pytest.approx(shown[2])


def test_what_waits_is_lost_to_no_look() -> None:
    """Scrapes in other threads, and the settling for other processes, find each value once."""
    registry = CollectorRegistry()
    histogram = BulkHistogram("x", "x", ["model"], registry=registry).labels("m")
    looks = 0

    def look() -> None:
        nonlocal looks
        while not over.is_set():
            registry.get_sample_value("x_count", {"model": "m"})
            settle()
            looks += 1

    over = threading.Event()
    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    for _ in range(20_000):
        histogram.observe(1.0)
    over.set()
    for looker in lookers:
        looker.join()
    assert looks
    assert registry.get_sample_value("x_count", {"model": "m"}) == 20_000
    assert registry.get_sample_value("x_sum", {"model": "m"}) == 20_000
