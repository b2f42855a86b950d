"""From the engine core's outputs to the reader, past vLLM's way: the same text and counts."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from serving import Running

    from synthia_vllm.engine.vllm.outputs import OutputPath

CHAT = "/v1/chat/completions"
THE = {"272": 100}  # an answer of one word, as long as it is asked to be
BODY: dict[str, Any] = {
    "model": "synthia-demo",
    "messages": [{"role": "user", "content": "What is a token?"}],
    "temperature": 0,
    "ignore_eos": True,
    "logit_bias": {"272": 3},  # " the" here and there, so that no answer ends soon
    "max_tokens": 60,
    "return_token_ids": True,
}


def path_of(live: Running) -> OutputPath:
    path: OutputPath = live.engine._path  # type: ignore[attr-defined]
    return path


def choices(live: Running, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of a stream's events."""
    asked = BODY | {"stream": True} | body
    text = httpx.post(f"{live.url}{CHAT}", json=asked, timeout=60).text
    assert text.endswith("data: [DONE]\n\n")
    return [json.loads(line[6:])["choices"][0] for line in text.split("\n\n")[:-2]]


def put_together(events: list[dict[str, Any]]) -> dict[int, tuple[str, list[int], list[Any], Any]]:
    """By choice: text, tokens, log-probabilities and how it ended."""
    found: dict[int, tuple[str, list[int], list[Any], Any]] = {}
    for event in events:
        text, tokens, logprobs, _ = found.get(event["index"], ("", [], [], None))
        found[event["index"]] = (
            text + event["delta"].get("content", ""),
            tokens + event.get("token_ids", []),
            logprobs + ((event["logprobs"] or {}).get("content") or []),
            (event["finish_reason"], event.get("stop_reason")),
        )
    return found


@pytest.fixture
def busy(live: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process has so much to do that text waits longer than any answer takes."""
    path = path_of(live)
    monkeypatch.setattr(path.pace, "wait", 30.0)
    monkeypatch.setattr(type(path.pace), "look", lambda *_args, **_more: None)
    monkeypatch.setattr(type(path), "hold", lambda *_args: None)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"n": 3, "temperature": 0.8, "seed": 5},
        {"logprobs": True, "top_logprobs": 2},
        {"stop": ["the the"]},
        {"min_tokens": 20},
        {"logit_bias": {"243": 100}, "max_tokens": 5},  # a byte, of which no text can be made yet
        {"max_tokens": 1},
    ],
)
def test_waiting_changes_nothing_but_events(
    live: Running, body: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """Text, tokens, log-probabilities and end are those of a stream that did not wait.

    The first text of each choice and its end come at once: what waits is in between.
    """
    each = choices(live, body | {"stream_interval": 1})
    request.getfixturevalue("busy")
    paced = choices(live, body)
    assert put_together(paced) == put_together(each)
    by_choice = [[e for e in paced if e["index"] == i] for i in range(body.get("n", 1))]
    for events in by_choice:
        assert len(events) <= 3 + (body.get("n", 1) - 1)  # an end hands on what waits of others
        first = next((e for e in events if e["delta"].get("content")), events[-1])
        assert len(first["token_ids"]) <= 2 or first["finish_reason"]
    again = choices(live, body | {"stream_interval": 1})
    assert (
        len(again) > len(paced) or len(each) < 5
    )  # which asks for each token, and is not made to wait


@pytest.mark.usefixtures("busy")
def test_what_waits_goes_out_before_an_error(live: Running) -> None:
    """A stream that the server breaks off has the text of all tokens that it counts."""
    asked = BODY | {
        "stream": True,
        "max_tokens": 1900,
        "logit_bias": THE,
        "stream_options": {"include_usage": True},
    }
    headers = {"X-Request-Timeout": "1"}
    text = httpx.post(f"{live.url}{CHAT}", json=asked, headers=headers, timeout=60).text
    events = [json.loads(line[6:]) for line in text.split("\n\n")[:-1]]
    assert events[-1]["error"]["code"] == "deadline_exceeded"
    tokens = sum(len(event["choices"][0]["token_ids"]) for event in events[:-1])
    assert 2 < tokens == events[-1]["error"]["usage"]["completion_tokens"]


def test_nothing_waits_for_ever(live: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine makes no more of is handed on when its time has come."""
    path = path_of(live)
    monkeypatch.setattr(path.pace, "seconds", 0.05)
    monkeypatch.setattr(path.pace, "wait", 1000.0)
    monkeypatch.setattr(type(path.pace), "look", lambda *_args, **_more: None)
    events = choices(live, {"max_tokens": 400, "logit_bias": THE})
    assert len(events) > 3  # the sweep alone can have handed on what is between first and last


def test_counts_are_vllms(live: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step counts the same as in an output processor of vLLM's own that is given the same."""
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
    from vllm.v1.metrics.stats import IterationStats

    path = path_of(live)
    processor = path.processor
    shadow = OutputProcessor(processor.tokenizer, log_stats=True)
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    steps: list[int] = []
    own_add, own_process = processor.add_request, processor.process_outputs

    def add_request(
        request: Any, prompt: Any, parent: Any = None, index: int = 0, queue: Any = None
    ) -> None:
        own_add(request, prompt, parent, index, queue)
        collector = RequestOutputCollector(request.sampling_params.output_kind, request.request_id)
        shadow.add_request(copy.deepcopy(request), prompt, None, index, collector)

    def process_outputs(outputs: list[Any], timestamp: float, iteration: Any, **more: Any) -> Any:
        copied, same = copy.deepcopy(outputs), IterationStats()
        same.iteration_timestamp = iteration.iteration_timestamp
        shadow.process_outputs(copied, timestamp, same, **more)
        steps.append(len(outputs))
        found = own_process(outputs, timestamp, iteration, **more)
        for stats, kept in ((iteration, ours), (same, theirs)):
            facts = dict(vars(stats))
            facts["inter_token_latencies_iter"] = sorted(facts["inter_token_latencies_iter"])
            facts["finished_requests"] = sorted(map(repr, facts["finished_requests"]))
            facts["prompt_token_stats"] = vars(facts["prompt_token_stats"])
            kept.append(copy.deepcopy(facts))
        return found

    monkeypatch.setattr(processor, "add_request", add_request)
    monkeypatch.setattr(processor, "process_outputs", process_outputs)
    bodies: list[dict[str, Any]] = [
        {},
        {"stop": ["the the"]},
        {"min_tokens": 9},
        {"logprobs": True},
    ]
    bodies += [{"stream": False}, {"stream_interval": 4}, {"ignore_eos": False, "logit_bias": {}}]

    def ask(body: dict[str, Any]) -> None:
        httpx.post(f"{live.url}{CHAT}", json=BODY | {"stream": True} | body, timeout=60)

    with ThreadPoolExecutor(len(bodies)) as pool:
        list(pool.map(ask, bodies))
    assert max(steps) > 1
    assert sum(facts["num_generation_tokens"] for facts in ours) > 100
    assert ours == theirs
    assert not path.runs
    assert not path.waiting
