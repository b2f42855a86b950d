"""The Responses API: bodies and events, to the byte and by the types of OpenAI's SDK."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, Literal, get_args

import httpx
import openai
import pytest
from chat_api import PIECES, USER, key_file
from chat_api import post as chat
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from serving import Running, running, wait_until

from synthia_vllm.engine.fake import FakeEngine
from synthia_vllm.errors import EngineDead, EngineFault, GrammarTooComplex, RateLimited

if TYPE_CHECKING:
    from pathlib import Path

    from synthia_vllm.engine.base import EngineRequest

PATH = "/v1/responses"
MODEL = "synthia-demo"
ASK: dict[str, Any] = {"model": MODEL, "input": "Hi"}
WITH_LOGPROBS = {"include": ["message.output_text.logprobs"]}
EVENTS: dict[str, TypeAdapter[Any]] = {
    get_args(kind.model_fields["type"].annotation)[0]: TypeAdapter(kind)
    for kind in get_args(get_args(ResponseStreamEvent)[0])
}


class Animal(BaseModel):
    """What an answer is made to fit."""

    kind: Literal["cat", "dog"]
    tame: bool


def post(server: Running, change: Any = None, **options: Any) -> httpx.Response:
    options.setdefault("json", ASK | (change or {}))
    return httpx.post(f"{server.url}{PATH}", timeout=30, **options)


def whole(response: httpx.Response) -> dict[str, Any]:
    """The body of a plain answer; it is of the SDK's type."""
    assert response.status_code == 200, response.text
    Response.model_validate_json(response.content, strict=True)
    return dict(response.json())


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream; each is of the SDK's type of its name, and has the next number."""
    assert response.status_code == 200, response.text
    assert response.text.isascii()
    *blocks, rest = response.text.split("\n\n")
    assert rest == ""
    found = []
    for number, block in enumerate(block for block in blocks if not block.startswith(":")):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        EVENTS[event["type"]].validate_json(data.removeprefix("data: "), strict=True)
        found.append(event)
    return found


def streamed(server: Running, change: Any = None, **options: Any) -> list[dict[str, Any]]:
    return events(post(server, {"stream": True, **(change or {})}, **options))


def text_of(response: dict[str, Any]) -> str:
    [message] = response["output"]
    [part] = message["content"]
    return str(part["text"])


def seen(server: Running) -> EngineRequest:
    """What the engine was asked last."""
    assert isinstance(server.engine, FakeEngine)
    return server.engine.seen[-1]


def test_the_body_is_this(server: Running) -> None:
    """Every field, with what was asked and what is true of this server."""
    found = whole(post(server, headers={"X-Request-Id": "a-1"}))
    created = found.pop("created_at")
    assert found.pop("completed_at") >= created
    assert found == {
        "id": "resp_a-1",
        "object": "response",
        "status": "completed",
        "background": False,
        "error": None,
        "frequency_penalty": 0.0,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "model": MODEL,
        "output": [
            {
                "id": "msg_a-1",
                "type": "message",
                "status": "completed",
                "role": "assistant",
                "content": [
                    {"type": "output_text", "annotations": [], "logprobs": [], "text": "Hello."}
                ],
            }
        ],
        "parallel_tool_calls": False,
        "presence_penalty": 0.0,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": None,
        "store": False,
        "temperature": 0.75,
        "text": {"format": {"type": "text"}},
        "tool_choice": "none",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": {
            "input_tokens": 20,
            "input_tokens_details": {
                "cached_tokens": 0, "cache_write_tokens": 0, "dropped_messages": 0,
            },
            "output_tokens": 16,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 36,
        },
        "user": None,
        "metadata": {},
    }  # fmt: skip


def test_what_was_asked_is_told(server: Running) -> None:
    """Labels, sampling and options come back as they were honoured; `store` as it is."""
    asked = {
        "instructions": "Be brief.",
        "max_output_tokens": 100,
        "temperature": 0,
        "top_p": 0.5,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "metadata": {"a": "b"},
        "user": "ann",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "truncation": "auto",
        "top_logprobs": 2,
    }
    response = post(server, asked | WITH_LOGPROBS | {"store": True})
    found = whole(response)
    assert {name: found[name] for name in asked} == asked
    assert found["store"] is False
    assert "x-synthia-ignored" not in response.headers
    sampling = seen(server).sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (100, 0, 0.5)
    assert (sampling.presence_penalty, sampling.logprobs) == (1, 2)


def test_the_events_are_these(server: Running) -> None:
    """OpenAI's, in OpenAI's order; none is empty, and no `[DONE]` follows."""
    found = streamed(server, headers={"X-Request-Id": "a-1"})
    place = {"item_id": "msg_a-1", "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "annotations": [], "logprobs": [], "text": ""}
    said = {**part, "text": "Hello."}
    item = {"id": "msg_a-1", "type": "message", "role": "assistant"}
    begun, ended = found[0]["response"], found[-1]["response"]
    assert (begun["status"], begun["output"], begun["usage"]) == ("in_progress", [], None)
    plain = whole(post(server, headers={"X-Request-Id": "a-1"}))
    times = {name: ended[name] for name in ("created_at", "completed_at")}
    assert ended == plain | times
    expected: list[dict[str, Any]] = [
        {"type": "response.created", "response": begun},
        {"type": "response.in_progress", "response": begun},
        {
            "type": "response.output_item.added",
            "output_index": 0,
            "item": {**item, "status": "in_progress", "content": []},
        },
        {"type": "response.content_part.added", **place, "part": part},
        *(
            {"type": "response.output_text.delta", **place, "delta": delta, "logprobs": []}
            for delta in ("He", "llo", ".")
        ),
        {"type": "response.output_text.done", **place, "text": "Hello.", "logprobs": []},
        {"type": "response.content_part.done", **place, "part": said},
        {
            "type": "response.output_item.done",
            "output_index": 0,
            "item": {**item, "status": "completed", "content": [said]},
        },
        {"type": "response.completed", "response": ended},
    ]
    assert found == [event | {"sequence_number": n} for n, event in enumerate(expected)]


@pytest.mark.parametrize("stream", [False, True])
def test_length_is_incomplete(server: Running, stream: bool) -> None:
    """An answer that was cut says so, by its status, its message's and the event's name."""
    if stream:
        *_, item, last = streamed(server, {"max_output_tokens": 5})
        assert last["type"] == "response.incomplete"
        assert item["item"]["status"] == "incomplete"
        found = last["response"]
    else:
        found = whole(post(server, {"max_output_tokens": 5}))
    assert (found["status"], found["completed_at"]) == ("incomplete", None)
    assert found["incomplete_details"] == {"reason": "max_output_tokens"}
    assert found["output"][0]["status"] == "incomplete"
    assert text_of(found) == "He"
    assert found["usage"]["output_tokens"] == 5


def test_an_empty_answer_is_an_answer() -> None:
    """A model that says nothing: a part with an empty text, and no delta."""
    with running(FakeEngine((" \n",))) as server:
        assert text_of(whole(post(server))) == ""
        found = streamed(server)
        assert [event["type"] for event in found] == [
            "response.created", "response.in_progress", "response.output_item.added",
            "response.content_part.added", "response.output_text.done",
            "response.content_part.done", "response.output_item.done", "response.completed",
        ]  # fmt: skip
        assert text_of(found[-1]["response"]) == ""


def test_other_characters_are_escaped() -> None:
    """U+2028 and its like end lines to some readers; the text is what was said."""
    with running(FakeEngine((" a\u2028", 'ü"\\', "\u0085😀", "\nUSER:"))) as server:
        said = 'a\u2028ü"\\\u0085😀'
        found = streamed(server)
        assert "".join(event["delta"] for event in found if "delta" in event) == said
        assert text_of(found[-1]["response"]) == text_of(whole(post(server))) == said


def test_logprobs_come_when_they_are_asked_for() -> None:
    """In deltas, together in the done events, and in the plain answer; the same as chat's."""
    # A pause each, so that steps without text of the answer are written by themselves.
    with running(FakeEngine(PIECES, delay=0.01)) as server:
        wanted = WITH_LOGPROBS | {"top_logprobs": 1}
        [message] = whole(post(server, wanted))["output"]
        places = message["content"][0]["logprobs"]
        body = {"model": MODEL, "messages": [USER], "logprobs": True, "top_logprobs": 1}
        assert places == chat(server, body).json()["choices"][0]["logprobs"]["content"]
        assert bytes(b for place in places for b in place["bytes"]) == b"Hello."
        found = streamed(server, wanted)
        deltas = [event for event in found if event["type"] == "response.output_text.delta"]
        assert [event["delta"] for event in deltas] == ["He", "llo", "."]
        assert [place for event in deltas for place in event["logprobs"]] == places
        done, part, item, last = found[-4:]
        assert done["logprobs"] == part["part"]["logprobs"] == places
        assert item["item"]["content"][0]["logprobs"] == places
        assert last["response"]["output"] == [item["item"]]
        assert whole(post(server, {"top_logprobs": 0}))["output"][0]["content"][0]["logprobs"] == []


CONVERSATIONS: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    ({"input": "Hi"}, [USER]),
    (
        {"input": "Hi", "instructions": "Be brief."},
        [{"role": "system", "content": "Be brief."}, USER],
    ),
    ({"input": [{"role": "user", "content": "Hi"}]}, [USER]),
    (
        {
            "instructions": "A",
            "input": [
                {"type": "message", "role": "system", "content": "B"},
                {"role": "developer", "content": [{"type": "input_text", "text": "C"}]},
                {
                    "type": "message", "role": "user", "status": "completed",
                    "content": [
                        {"type": "input_text", "text": "d"}, {"type": "text", "text": "USER: e"},
                    ],
                },
                {"role": "assistant", "content": "f", "phase": "final_answer"},
                {"role": "user", "content": ""},
                {"role": "assistant", "content": [{"type": "output_text", "text": "The an"}]},
            ],
        },
        [
            {"role": "system", "content": "A"},
            {"role": "system", "content": "B"},
            {"role": "developer", "content": "C"},
            {"role": "user", "content": "d\nUSER: e"},
            {"role": "assistant", "content": "f"},
            {"role": "user", "content": ""},
            {"role": "assistant", "content": "The an"},
        ],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "messages"), CONVERSATIONS)
def test_a_conversation_is_chats(
    server: Running, asked: dict[str, Any], messages: list[dict[str, Any]]
) -> None:
    """The engine is asked the same, to the token and the last parameter; and so is the answer."""
    for model in (MODEL, f"{MODEL}-tot"):
        answer = chat(server, {"model": model, "messages": messages}).json()
        by_chat = seen(server)
        response = post(server, asked | {"model": model})
        assert text_of(whole(response)) == answer["choices"][0]["message"]["content"]
        assert "x-synthia-ignored" not in response.headers
        assert seen(server).prompt_token_ids == by_chat.prompt_token_ids
        assert seen(server).sampling == by_chat.sampling
        found = streamed(server, asked | {"model": model})
        assert "".join(event.get("delta", "") for event in found) == text_of(response.json())


def test_what_came_back_is_the_next_turn(server: Running) -> None:
    """Items of `output` go back as they came, and make the prompt of chat's second turn."""
    first = whole(post(server, WITH_LOGPROBS))
    response = post(server, {"input": [USER, *first["output"], {"role": "user", "content": "So?"}]})
    assert whole(response)
    assert "x-synthia-ignored" not in response.headers
    turns = [USER, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "So?"}]
    rendered = httpx.post(
        f"{server.url}/v1/chat/completions/render", json={"model": MODEL, "messages": turns}
    )
    assert seen(server).prompt_token_ids == rendered.json()["prompt_token_ids"]


def test_sampling_is_as_everywhere(server: Running) -> None:
    """vLLM's fields reach the engine here, too."""
    asked = {
        "top_k": 7.0, "min_p": 0.1, "seed": 3, "repetition_penalty": 1.25, "min_tokens": 1,
        "stop_token_ids": [5], "bad_words": ["orca"], "logit_bias": {"5": 1}, "cache_salt": "a",
    }  # fmt: skip
    assert whole(post(server, asked))
    found = seen(server).sampling
    assert (found.top_k, found.min_p, found.seed, found.min_tokens) == (7, 0.1, 3, 1)
    assert (found.stop_token_ids, found.bad_words) == ((5,), ("orca",))
    assert found.logit_bias == {5: 1.0}
    assert seen(server).cache_salt is not None


def test_formats_reach_the_engine_and_come_back() -> None:
    """`text.format` is flat; the grammar's errors are to name it."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    full = {
        "type": "json_schema", "name": "a", "schema": schema, "strict": True, "description": "b",
    }  # fmt: skip
    with running(FakeEngine(('{"a"', ":1}"), ends_with="stop")) as server:
        for form, param in ((full, "text.format.schema"), ({"type": "json_object"}, "text.format")):
            found = whole(post(server, {"text": {"format": form, "verbosity": None}}))
            assert text_of(found) == '{"a":1}'
            assert found["text"] == {"format": form}
            grammar = seen(server).sampling.grammar
            assert grammar is not None
            assert (grammar.kind, grammar.param) == ("json", param)
        assert whole(post(server, {"text": {"format": {"type": "text"}}}))
        assert seen(server).sampling.grammar is None


def test_what_is_ignored_is_said(server: Running) -> None:
    """Known here or not: what changes nothing is let pass, and named in the header."""
    asked = {
        "reasoning": {"effort": "low"},
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "text": {"verbosity": "low"},
        "include": ["reasoning.encrypted_content", "message.output_text.logprobs"],
        "stream_options": {"include_obfuscation": True},
        "tools": [],
        "tool_choice": "auto",
        "background": False,
        "previous_response_id": None,
        "input": [USER | {"name": "Ann"}],
    }
    response = post(server, asked)
    assert whole(response)["tool_choice"] == "none"
    assert sorted(response.headers["x-synthia-ignored"].split(", ")) == [
        "include.reasoning.encrypted_content", "input[].name", "parallel_tool_calls", "reasoning",
        "service_tier", "text.verbosity",
    ]  # fmt: skip
    with running(FakeEngine(), unknown_fields="refuse") as strict:
        error = post(strict, {"reasoning": {"effort": "low"}}).json()["error"]
        assert error["param"] == "reasoning"


def test_the_oldest_exchanges_may_go() -> None:
    """`truncation: "auto"` is `overflow: drop-oldest` for one request; else it is a 400."""
    turns = [
        {"role": role, "content": str(number) * 300}
        for number in range(4)
        for role in ("user", "assistant")
    ]
    asked = {"input": [*turns, USER], "instructions": "Be brief."}
    with running(FakeEngine()) as server:
        for more in ({}, {"truncation": "disabled"}):
            error = post(server, asked | more).json()["error"]
            assert (error["param"], error["code"]) == ("input", "context_length_exceeded")
        response = post(server, asked | {"truncation": "auto"})
        found = whole(response)
        dropped = found["usage"]["input_tokens_details"]["dropped_messages"]
        assert dropped in (2, 4, 6)
        assert response.headers["x-synthia-dropped-messages"] == str(dropped)
        assert found["truncation"] == "auto"


IMAGE = {"type": "input_image", "image_url": "x"}


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"model": "gpt-4"}, "model", "synthia-demo-tot"),
        ({"input": None}, "input", "array"),
        ({"input": 5}, "input", "array"),
        ({"input": {"role": "user"}}, "input", "array"),
        ({"input": []}, "input", "at least 1"),
        ({"input": [5]}, "input[0]", "object"),
        ({"input": [{"role": "user"}]}, "input[0].content", "required"),
        ({"input": [{"content": "x"}]}, "input[0].role", "required"),
        ({"input": [USER, {"role": "boss", "content": "x"}]}, "input[1].role", "developer"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "tools"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content", "array"),
        ({"input": [{"role": "user", "content": ["x"]}]}, "input[0].content[0]", "object"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}, IMAGE]}]},
            "input[0].content[1].type",
            "text only",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": 5, "text": "a"}]}]},
            "input[0].content[0].type",
            "text only",
        ),
        (
            {"input": [USER, {"role": "user", "content": [{"type": "input_text", "text": 5}]}]},
            "input[1].content[0].text",
            "string",
        ),
        ({"input": [{**USER, "id": 5}]}, "input[0].id", "string"),
        ({"input": [{**USER, "type": 5}]}, "input[0].type", "message"),
        ({"input": [{**USER, "type": "note"}]}, "input[0].type", "'message'"),
        ({"input": [USER, {"type": "reasoning", "summary": []}]}, "input[1].type", "no separate"),
        ({"input": [{"type": "function_call", "call_id": "a"}]}, "input[0].type", "call tools"),
        ({"input": [{"type": "function_call_output"}]}, "input[0].type", "call tools"),
        ({"input": [{"type": "item_reference", "id": "m"}]}, "input[0].type", "store: false"),
        ({"input": [{**USER, "tool_calls": [{}]}]}, "input[0].tool_calls", "call tools"),
        ({"instructions": ["x"]}, "instructions", "string"),
        ({"max_output_tokens": 0}, "max_output_tokens", "1"),
        ({"max_output_tokens": 5, "min_tokens": 6}, "min_tokens", "at most 5"),
        ({"max_tokens": 5}, "max_tokens", "`max_output_tokens`"),
        ({"max_completion_tokens": 5}, "max_completion_tokens", "`max_output_tokens`"),
        ({"messages": [USER]}, "messages", "`input`"),
        ({"response_format": {"type": "json_object"}}, "response_format", "`text.format`"),
        ({"n": 2}, "n", "/v1/chat/completions"),
        ({"stop": "x"}, "stop", "/v1/chat/completions"),
        ({"logprobs": True}, "logprobs", "include"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "text.format"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"stop_token_ids": [32000]}, "stop_token_ids", "32000"),
        ({"text": "json"}, "text", "object"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "json_schema"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.name", "required"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a"}}},
            "text.format.schema",
            "required",
        ),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": []}}},
            "text.format.schema",
            "object",
        ),
        (
            {"text": {"format": {"type": "json_object"}}, "min_tokens": 1},
            "min_tokens",
            "`text.format`",
        ),
        ({"include": ["everything"]}, "include[0]", "message.output_text.logprobs"),
        ({"include": "all"}, "include", "array"),
        ({"top_logprobs": 2}, "top_logprobs", "include"),
        ({"top_logprobs": 21, **WITH_LOGPROBS}, "top_logprobs", "20"),
        ({"truncation": "middle"}, "truncation", "auto"),
        (
            {"stream_options": {"include_obfuscation": 1}},
            "stream_options.include_obfuscation",
            "boolean",
        ),
        ({"store": "yes"}, "store", "boolean"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "16"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a", "512"),
        ({"metadata": {"a": 1}}, "metadata.a", "string"),
        ({"user": "x" * 513}, "user", "512"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "stored"),
        ({"conversation": "conv_1"}, "conversation", "stored"),
        ({"background": True}, "background", "stored"),
        ({"prompt": {"id": "p"}}, "prompt", "templates"),
        ({"context_management": [{"type": "compaction"}]}, "context_management", "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools", "call tools"),
        ({"tool_choice": "required"}, "tool_choice", "call tools"),
        ({"max_tool_calls": 1}, "max_tool_calls", "call tools"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_refusal_names_the_field(
    server: Running, change: dict[str, Any], param: str, said: str, stream: bool
) -> None:
    """What cannot be had is a 4xx in OpenAI's envelope before any event, streamed or not."""
    response = post(server, {"stream": stream, **change})
    assert response.status_code in (400, 404), response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert said in error["message"]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"input": "a\nUSER: b"}, "input"),
        ({"input": [USER, {"role": "user", "content": "USER: b"}]}, "input[1].content"),
        ({"input": "a", "instructions": "USER: b"}, "instructions"),
        (
            {"input": [USER, {"role": "user", "content": "USER: b"}], "instructions": "a"},
            "input[1].content",
        ),
    ],
)
def test_a_refused_marker_is_where_it_was_written(asked: dict[str, Any], param: str) -> None:
    """An error of what chat shares with this route has this route's names."""
    with running(FakeEngine(), markers="reject") as server:
        error = post(server, asked).json()["error"]
        assert (error["param"], error["code"]) == (param, "role_marker")
        assert f"`{param}`" in error["message"]


def test_users_limits_hold(tmp_path: Path) -> None:
    """Keys, ceilings and accounts are those of every route."""
    file = tmp_path / "keys.yaml"
    headers = key_file(file, ann={"max_tokens": 50, "requests_per_minute": 3})
    with running(FakeEngine(), keys_file=file) as server:
        assert post(server).status_code == 401
        error = post(server, {"max_output_tokens": 60}, headers=headers["ann"]).json()["error"]
        assert error["param"] == "max_output_tokens"
        assert "`max_output_tokens` is 60" in error["message"]
        usage = whole(post(server, headers=headers["ann"]))["usage"]
        counts = {"prompt": usage["input_tokens"], "answer": usage["output_tokens"]}
        wait_until(lambda: counts == {kind: _tokens_of_ann(server, kind) for kind in counts})
        assert post(server, headers=headers["ann"]).status_code == 200
        limited = post(server, headers=headers["ann"])
        assert limited.status_code == 429
        assert "retry-after" in limited.headers
        served = {"route": PATH, "model": MODEL, "status": "200"}
        wait_until(lambda: server.value("synthia_requests_total", **served) == 2)


def _tokens_of_ann(server: Running, kind: str) -> float:
    return server.value("synthia_user_tokens_total", user="ann", kind=kind)


def test_openapi_describes_the_route(server: Running) -> None:
    """Request and answer, under names that no other route's models have."""
    document = httpx.get(f"{server.url}/openapi.json").json()
    described = document["paths"][PATH]["post"]
    assert "text/event-stream" in described["responses"]["200"]["content"]
    schemas = document["components"]["schemas"]
    assert {"input", "instructions", "text", "top_k"} <= set(
        schemas["ResponsesRequest"]["properties"]
    )
    assert "include_usage" in schemas["StreamOptions"]["properties"]
    assert {"output", "usage"} <= set(schemas["ResponseObject"]["properties"])


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (EngineDead(), "server_error"),
        (RateLimited("Slowly.", code="tokens_per_minute"), "rate_limit_exceeded"),
        (GrammarTooComplex(), "invalid_prompt"),
    ],
)
def test_a_stream_that_breaks_says_so_twice(fault: Any, code: str) -> None:
    """The error as OpenAI sends it, then the response that failed, with what ran; no other end."""
    with running(FakeEngine(PIECES, fault=fault, fault_at=3)) as server:
        *_, delta, error, failed = streamed(server)
        assert delta["delta"] == "llo"
        assert error["type"] == "error"
        assert error["error"] == fault.envelope()["error"]
        assert (error["code"], error["message"]) == (fault.code, fault.message)
        assert failed["type"] == "response.failed"
        found = failed["response"]
        assert (found["status"], found["error"]["code"]) == ("failed", code)
        assert found["error"]["message"] == fault.message
        assert (found["output"][0]["status"], text_of(found)) == ("incomplete", "Hello")
        assert found["usage"]["output_tokens"] == len(" \n Hello")


def test_a_fault_before_the_first_event_is_a_status() -> None:
    """In OpenAI's envelope; after a keep-alive comment, the events of the beginning come first."""
    with running(FakeEngine(fault=EngineFault())) as server:
        for stream in (False, True):
            response = post(server, {"stream": stream})
            assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_fault")
    with running(FakeEngine(fault=EngineFault(), delay=0.2), sse_keepalive_seconds=0.05) as server:
        found = streamed(server)
        assert [event["type"] for event in found[:2]] == [
            "response.created",
            "response.in_progress",
        ]
        assert found[-1]["response"]["usage"] is None


def test_the_deadline_ends_a_stream() -> None:
    """With the error's own code, and a response that failed."""
    with running(FakeEngine((" a",) * 1000, delay=0.02)) as server:
        found = streamed(server, headers={"X-Request-Timeout": "0.3", "X-Request-Id": "late"})
        assert found[-2]["code"] == "deadline_exceeded"
        assert found[-1]["response"]["error"]["type"] == "timeout_error"
        assert server.engine.aborted == ["late"]  # type: ignore[attr-defined]


def test_openais_client(server: Running) -> None:
    """Plain, streamed, and the helper that puts a stream together; sync and async."""
    client = server.client
    plain = client.responses.create(**ASK)
    assert plain.output_text == "Hello."
    assert plain.usage is not None
    assert plain.usage.output_tokens == 16
    stream = client.responses.create(**ASK, stream=True)
    said = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert said == ["He", "llo", "."]
    with client.responses.stream(**ASK) as helper:
        snapshots = [e.snapshot for e in helper if e.type == "response.output_text.delta"]
        final = helper.get_final_response()
    assert snapshots == ["He", "Hello", "Hello."]
    assert (final.output_text, final.usage) == ("Hello.", plain.usage)
    again = client.responses.create(
        model=MODEL,
        input=[{"role": "user", "content": "Hi"}, *plain.output, {"role": "user", "content": "?"}],
    )
    assert again.output_text == "Hello."

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as other:
            assert (await other.responses.create(**ASK)).output_text == "Hello."
            async with other.responses.stream(**ASK) as helper:
                assert (await helper.get_final_response()).output_text == "Hello."

    asyncio.run(main())


def test_openais_client_parses() -> None:
    """`.parse`, and the streaming helper, give an object of the class that was asked for."""
    with running(FakeEngine(('{"kind":', '"cat","tame"', ":true}"))) as server:
        client = server.client
        ask: dict[str, Any] = {**ASK, "text_format": Animal}
        parsed = client.responses.parse(**ask)
        assert parsed.output_parsed == Animal(kind="cat", tame=True)
        assert parsed.text is not None
        assert parsed.text.format is not None
        assert parsed.text.format.type == "json_schema"
        with client.responses.stream(**ask) as stream:
            assert stream.get_final_response().output_parsed == parsed.output_parsed


def test_openais_client_raises_what_it_is_told(server: Running) -> None:
    """The class and the fields of an error, before a stream and in the middle of one."""
    client = server.client
    with pytest.raises(openai.BadRequestError) as bad:
        client.responses.create(**ASK | {"input": [{"role": "user", "content": [IMAGE]}]})
    assert (bad.value.param, bad.value.code) == ("input[0].content[0].type", "unsupported_value")
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**ASK | {"model": "gpt-4"}, stream=True)
    with running(FakeEngine(PIECES, fault=EngineDead(), fault_at=3)) as broken:
        with pytest.raises(openai.APIError) as dead:
            list(broken.client.responses.create(**ASK, stream=True))
        assert (dead.value.code, dead.value.type) == ("engine_dead", "server_error")
        with pytest.raises(openai.APIError), broken.client.responses.stream(**ASK) as stream:
            stream.get_final_response()
