"""Traces as a collector gets them: the real server, a real OTLP receiver."""

from __future__ import annotations

import json
import time
from concurrent import futures
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from processes import LONG, command
from serving import free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ASK = {
    "model": "synthia-demo",
    "messages": [{"role": "user", "content": "What is rain, said the xylophone?"}],
    "temperature": 0,
}
PHASES = ["queue", "prefill", "decode"]


@dataclass
class Received:
    """One span, in plain values."""

    name: str
    trace: str
    id: str
    parent: str
    start: int
    end: int
    failed: bool
    service: str
    attributes: dict[str, Any]


@dataclass
class Receiver(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]  # has no types
    """Takes what is exported, and keeps it."""

    raw: list[bytes] = field(default_factory=list)
    spans: list[Received] = field(default_factory=list)

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        """What OTLP calls."""
        self.raw.append(request.SerializeToString())
        for resource in request.resource_spans:
            about = _plain(resource.resource.attributes)
            for scope in resource.scope_spans:
                self.spans += [_received(span, about["service.name"]) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def of(self, trace: str) -> dict[str, Received]:
        """The spans of one trace, by name."""
        return {span.name: span for span in self.spans if span.trace == trace}


def _received(span: Any, service: str) -> Received:
    return Received(
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        span.status.code == 2,
        service,
        _plain(span.attributes),
    )


def _plain(attributes: Any) -> dict[str, Any]:
    return {it.key: getattr(it.value, it.value.WhichOneof("value")) for it in attributes}


@pytest.fixture(scope="module")
def traced(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Receiver]]:
    """A server that exports to a receiver of this test."""
    receiver, port = Receiver(), free_port()
    collector = grpc.server(futures.ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, collector)
    collector.add_insecure_port(f"127.0.0.1:{port}")
    collector.start()
    log = tmp_path_factory.mktemp("traced") / "log"
    endpoint = f"otlp_traces_endpoint=http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        with command(demo, log, "--engine", endpoint) as (process, url):
            yield url, receiver
            process.terminate()
            assert process.wait(60) == 0
    collector.stop(None)
    assert "Traceback" not in log.read_text()


def ask(url: str, body: dict[str, Any], number: int, flags: str = "01") -> tuple[str, Any]:
    """Ask as a client that traces does; its trace's id and the response."""
    trace = f"{number:032x}"
    headers = {
        "traceparent": f"00-{trace}-{7:016x}-{flags}",
        "Authorization": "Bearer sk-do-not-tell",
    }
    return trace, httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_trace(traced: tuple[str, Receiver], stream: bool) -> None:
    """From the client's span to the engine's phases: linked, nested, in order, with true counts."""
    url, receiver = traced
    before = time.time_ns()
    body = ASK | {"stream": stream, "stream_options": {"include_usage": True} if stream else None}
    trace, response = ask(url, body, 0xA0 + stream)
    last = response.text.strip().split("\n\n")[-2].removeprefix("data: ") if stream else "null"
    usage = (json.loads(last) or response.json())["usage"]
    wait_until(lambda: len(receiver.of(trace)) == 5)
    arrived = time.time_ns()
    spans = receiver.of(trace)
    edge = spans["POST /v1/chat/completions"]
    assert edge.parent == f"{7:016x}"
    assert {spans[name].parent for name in [*PHASES, "llm_request"]} == {edge.id}
    assert {span.service for span in spans.values()} == {"synthia-vllm"}
    slack = 2_000_000  # ns; two clocks, read one after the other
    times = [edge.start, *(t for name in PHASES for t in (spans[name].start, spans[name].end))]
    assert before <= edge.start <= edge.end <= arrived
    assert all(early <= late + slack for early, late in pairwise(times))
    assert spans["decode"].end <= edge.end + slack
    assert spans["decode"].end > spans["decode"].start
    told = edge.attributes
    assert told["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert told["http.response.status_code"] == 200
    assert told["synthia.request_id"] == response.headers["x-request-id"]
    assert told["synthia.stream"] is stream
    if stream:
        took = (edge.end - edge.start) / 1e9 + 0.01
        assert 0 < told["synthia.time_to_first_token"] < took
    else:
        assert "synthia.time_to_first_token" not in told
    assert not edge.failed


def test_no_words_are_exported(traced: tuple[str, Receiver]) -> None:
    """Neither questions, nor answers, nor keys."""
    url, receiver = traced
    trace, response = ask(url, ASK, 0xB0)
    wait_until(lambda: len(receiver.of(trace)) == 5)
    exported = b"".join(receiver.raw)
    answer = response.json()["choices"][0]["message"]["content"]
    for words in ("xylophone", answer[:12], "sk-do-not-tell"):
        assert words.encode() not in exported


def test_unsampled_requests_are_not_exported(traced: tuple[str, Receiver]) -> None:
    """The client's choice holds for all spans below."""
    url, receiver = traced
    unsampled, response = ask(url, ASK, 0xC0, flags="00")
    assert response.status_code == 200
    sampled, _ = ask(url, ASK, 0xC1)
    wait_until(lambda: len(receiver.of(sampled)) == 5)
    assert not receiver.of(unsampled)


def test_what_goes_wrong_has_a_span(traced: tuple[str, Receiver]) -> None:
    """A refused request, a client that leaves, and one with a context that is none."""
    url, receiver = traced
    trace, response = ask(url, ASK | {"temperature": 9}, 0xD0)
    assert response.status_code == 400
    wait_until(lambda: receiver.of(trace))
    [refused] = receiver.of(trace).values()
    assert refused.attributes["http.response.status_code"] == 400
    assert refused.attributes["error.type"] == response.json()["error"]["code"]
    trace = f"{0xD1:032x}"
    headers = {"traceparent": f"00-{trace}-{7:016x}-01"}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG, headers=headers) as leaving:
        lines = leaving.iter_lines()
        next(lines)
    wait_until(lambda: receiver.of(trace))
    left = receiver.of(trace)["POST /v1/chat/completions"]
    assert left.attributes["http.response.status_code"] == 499
    assert left.attributes["gen_ai.usage.output_tokens"] > 0
    odd = httpx.post(
        f"{url}/v1/chat/completions",
        json=ASK,
        headers=[(b"traceparent", b"00-zz-\xff")],
        timeout=60,
    )
    assert odd.status_code == 200


def test_a_collector_that_is_not_there(demo: Path, tmp_path: Path) -> None:
    """Costs nobody an answer, nor the server its end."""
    log = tmp_path / "log"
    endpoint = f"otlp_traces_endpoint=http://127.0.0.1:{free_port()}"
    with command(demo, log, "--engine", endpoint, "--api-workers", "2") as (process, url):
        for number in range(4):
            assert ask(url, ASK, number)[1].status_code == 200
        process.terminate()
        assert process.wait(60) == 0
    assert "Traceback" not in log.read_text()
