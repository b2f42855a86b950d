"""`/v1/messages` over a scripted engine: bodies, events and errors as Anthropic's API has them."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import anthropic
import httpx
import pytest
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from anthropic.types.shared import ErrorResponse
from chat_api import PIECES, key_file
from pydantic import BaseModel, TypeAdapter
from serving import Running, running

from synthia_vllm.engine.fake import FakeEngine
from synthia_vllm.errors import EngineFault

if TYPE_CHECKING:
    from pathlib import Path

MESSAGES, COUNT, CHAT = "/v1/messages", "/v1/messages/count_tokens", "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}
BODY: dict[str, Any] = {"model": "synthia-demo", "max_tokens": 99, "messages": [USER]}
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def post(
    server: Running, body: dict[str, Any] | None = None, path: str = MESSAGES, **options: Any
) -> httpx.Response:
    if "content" not in options:
        options["json"] = BODY | (body or {})
    return httpx.post(f"{server.url}{path}", timeout=30, **options)


def text(body: str) -> dict[str, Any]:
    return {"type": "text", "text": body}


def known(found: BaseModel, said: Any) -> None:
    """Every field that was `said` is one that the client's type has."""
    assert not found.model_extra, found.model_extra
    for name, value in said.items():
        inner = getattr(found, name)
        if isinstance(inner, BaseModel):
            known(inner, value)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream; each is one the client knows, under the name it has in itself."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *blocks, rest = response.text.split("\n\n")
    assert rest == ""
    found = []
    for block in blocks:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] == "error":
            assert ErrorResponse.model_validate(event)
        elif event["type"] != "ping":
            known(EVENT.validate_python(event), event)
        found.append(event)
    return found


def streamed(found: list[dict[str, Any]]) -> tuple[str, Any, Any]:
    """Text, delta and usage at the end of a whole stream, which has all events in their order."""
    kinds = [event["type"] for event in found]
    deltas = [event["delta"] for event in found if event["type"] == "content_block_delta"]
    assert kinds == [
        "message_start", "content_block_start", "ping", *["content_block_delta"] * len(deltas),
        "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert all(delta["text"] for delta in deltas)
    return "".join(delta["text"] for delta in deltas), found[-2]["delta"], found[-2]["usage"]


def refusal(response: httpx.Response, status: int, kind: str) -> str:
    """The message of an error in Anthropic's envelope."""
    assert response.status_code == status, response.text
    said = response.json()
    assert said == {
        "type": "error",
        "error": {"type": kind, "message": said["error"]["message"]},
        "request_id": response.headers["x-request-id"],
    }
    if kind != "request_too_large":  # documented, and missing from the client's types
        known(ErrorResponse.model_validate(said), said)
    return str(said["error"]["message"])


def client(server: Running, key: str = "none", **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key=key, **{"max_retries": 0} | options)


def test_the_whole_body(server: Running) -> None:
    """Each field of a plain answer."""
    response = post(server, headers={"X-Request-Id": "abc-1"})
    assert response.json() == {
        "id": "msg_abc-1",
        "type": "message",
        "role": "assistant",
        "model": "synthia-demo",
        "content": [{"type": "text", "text": "Hello."}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 20,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 16,
        },
    }
    known(Message.model_validate(response.json()), response.json())


def test_the_whole_stream(server: Running) -> None:
    """Each byte of a streamed one."""
    response = post(server, {"stream": True}, headers={"X-Request-Id": "abc-1"})
    assert response.text == (
        "event: message_start\n"
        'data: {"type":"message_start","message":{"id":"msg_abc-1","type":"message",'
        '"role":"assistant","model":"synthia-demo","content":[],"stop_reason":null,'
        '"stop_sequence":null,"usage":{"input_tokens":20,"cache_creation_input_tokens":0,'
        '"cache_read_input_tokens":0,"output_tokens":5}}}\n\n'
        "event: content_block_start\n"
        'data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}'
        "\n\n"
        'event: ping\ndata: {"type":"ping"}\n\n'
        "event: content_block_delta\n"
        'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"He"}}'
        "\n\n"
        "event: content_block_delta\n"
        'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"llo"}}'
        "\n\n"
        "event: content_block_delta\n"
        'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"."}}'
        "\n\n"
        'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n'
        "event: message_delta\n"
        'data: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},'
        '"usage":{"input_tokens":20,"cache_creation_input_tokens":0,"cache_read_input_tokens":0,'
        '"output_tokens":16}}\n\n'
        'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    )


CONVERSATIONS: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    ({}, [USER]),
    ({"system": "Be brief."}, [{"role": "system", "content": "Be brief."}, USER]),
    (
        {"system": [text("Be brief."), text("Be kind.\nUSER: me")]},
        [{"role": "system", "content": [text("Be brief."), text("Be kind.\nUSER: me")]}, USER],
    ),
    ({"system": "", "model": "synthia-demo-tot"}, [{"role": "system", "content": ""}, USER]),
    ({"model": "synthia-demo-tot"}, [USER]),
    ({"messages": [USER, {"role": "user", "content": [text("a"), text("USER: b")]}]}, []),
    ({"messages": [USER, {"role": "assistant", "content": "It"}]}, []),
    ({"messages": [USER, {"role": "assistant", "content": []}, USER]}, []),
    ({"messages": [{"role": "assistant", "content": [text("Well, ")]}]}, []),
]


@pytest.mark.parametrize(("body", "messages"), CONVERSATIONS)
def test_same_prompt_and_answer_as_chat(
    server: Running, body: dict[str, Any], messages: list[dict[str, Any]]
) -> None:
    """Chat's prompt for the same conversation, chat's text and count; streamed, plain, counted."""
    model = body.get("model", "synthia-demo")
    asked = {"model": model, "messages": messages or body["messages"], "max_tokens": 99}
    chat = httpx.post(f"{server.url}{CHAT}", json=asked).json()
    seen: Any = server.engine.seen  # type: ignore[attr-defined]
    prompt, sampling = seen[-1].prompt_token_ids, seen[-1].sampling
    plain = post(server, body).json()
    assert (seen[-1].prompt_token_ids, seen[-1].sampling) == (prompt, sampling)
    answer, end, usage = streamed(events(post(server, body | {"stream": True})))
    assert (seen[-1].prompt_token_ids, seen[-1].sampling) == (prompt, sampling)
    assert chat["choices"][0]["message"]["content"] == plain["content"][0]["text"] == answer
    assert end == {key: plain[key] for key in ("stop_reason", "stop_sequence")}
    assert usage == plain["usage"]
    assert usage["output_tokens"] == chat["usage"]["completion_tokens"]
    ran = len(seen)
    counted = post(server, body, COUNT).json()
    assert counted == {"input_tokens": chat["usage"]["prompt_tokens"]}
    known(MessageTokensCount.model_validate(counted), counted)
    assert len(seen) == ran


@pytest.mark.parametrize(
    ("body", "answer", "end"),
    [
        ({}, "Hello.", ("end_turn", None)),
        ({"stop_sequences": []}, "Hello.", ("end_turn", None)),
        ({"stop_sequences": ["zzz", "lo"]}, "Hel", ("stop_sequence", "lo")),
        ({"stop_sequences": ["USER:"]}, "Hello.", ("stop_sequence", "USER:")),
        ({"stop_sequences": ["\n"]}, "Hello.", ("stop_sequence", "\n")),
        ({"stop_sequences": ["\t"]}, "Hello.", ("end_turn", None)),
        ({"max_tokens": 6}, "Hel", ("max_tokens", None)),
        ({"min_tokens": 30}, "Hello.", ("end_turn", None)),
        ({"min_tokens": 30, "stop_sequences": ["USER:"]}, "Hello.", ("stop_sequence", "USER:")),
    ],
)
def test_why_it_ended(
    server: Running, body: dict[str, Any], answer: str, end: tuple[str, str | None]
) -> None:
    """Only a stop of the client's own is told as one."""
    plain = post(server, body).json()
    assert plain["content"] == [text(answer)]
    assert (plain["stop_reason"], plain["stop_sequence"]) == end
    said, delta, _ = streamed(events(post(server, body | {"stream": True})))
    assert (said, tuple(delta.values())) == (answer, end)


def test_a_stop_token_of_the_clients_own() -> None:
    """It ends the answer at a stop of the client's, which has no text; another token does not."""

    class Ends(FakeEngine):
        def submit(self, request: Any, sink: Any) -> Any:
            class Sink:
                def put(self, output: Any, cached: int) -> bool:
                    if output.finish_reason:
                        output.stop_reason = 7
                    return bool(sink.put(output, cached))

            return super().submit(request, Sink())  # type: ignore[arg-type]

    with running(Ends((" Hello",))) as server:
        for ids, reason in (([5, 7], "stop_sequence"), ([5], "end_turn"), (None, "end_turn")):
            found = post(server, {"stop_token_ids": ids}).json()
            assert (found["stop_reason"], found["stop_sequence"]) == (reason, None)


def test_what_the_cache_had_is_no_input() -> None:
    """The three kinds of input together are the prompt, in every place that tells them."""

    class Cached(FakeEngine):
        def submit(self, request: Any, sink: Any) -> Any:
            class Sink:
                ran, fail = sink.ran, sink.fail

                def put(self, output: Any, cached: int) -> bool:
                    return bool(sink.put(output, 12))

            return super().submit(request, Sink())

    with running(Cached(PIECES)) as server:
        expected = {
            "input_tokens": 8,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 12,
            "output_tokens": 16,
        }
        assert post(server).json()["usage"] == expected
        found = events(post(server, {"stream": True}))
        assert found[0]["message"]["usage"] == expected | {"output_tokens": 5}
        assert streamed(found)[2] == expected
        assert post(server, path=COUNT).json() == {"input_tokens": 20}


def test_an_empty_answer_is_an_answer() -> None:
    """A model that says nothing gives an empty text, and no delta."""
    with running(FakeEngine((" \n",))) as server:
        assert post(server).json()["content"] == [text("")]
        assert streamed(events(post(server, {"stream": True})))[0] == ""
        with client(server).messages.stream(**BODY) as stream:
            assert stream.get_final_text() == ""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"max_tokens": None}, "`max_tokens`"),
        ({"max_tokens": 0}, "`max_tokens`: Input should be greater than or equal to 1"),
        ({"max_tokens": "9"}, "`max_tokens`"),
        ({"messages": []}, "`messages`"),
        ({"messages": "Hi"}, "`messages`"),
        ({"messages": [USER] * 4097}, "`messages`"),
        ({"messages": [USER, {"role": "user"}]}, "`messages[1].content` is required"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "`messages[1].content`"),
        ({"messages": [{"role": "user", "content": [text("a")] * 1025}]}, "`messages[0].content`"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "`messages[0].content[0]`"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "`messages[0].content[0].text` is required",
        ),
        (
            {"messages": [{"role": "user", "content": [{"text": "a"}]}]},
            "`messages[0].content[0].type`",
        ),
        ({"messages": [{"role": "system", "content": "a"}]}, "`messages[0].role`"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "`messages[0].role` is 'tool'"),
        ({"system": 5}, "`system`"),
        ({"system": [text("a"), {"type": "text"}]}, "`system[1].text` is required"),
        ({"system": [{"type": "image", "source": {}}]}, "`system[0]`: a block of type 'image'"),
        ({"temperature": 1.5}, "`temperature`"),
        ({"temperature": -0.1}, "`temperature`"),
        ({"top_p": 1.5}, "`top_p`"),
        ({"top_k": -2}, "`top_k`"),
        ({"stop_sequences": "a"}, "`stop_sequences`"),
        ({"stop_sequences": [""]}, "`stop_sequences[0]`"),
        ({"stop_sequences": ["a"] * 65}, "`stop_sequences`"),
        ({"stop_sequences": ["a" * 257]}, "`stop_sequences[0]`"),
        ({"stop_sequences": ["a" * 256] * 17}, "`stop_sequences` has 4352 characters"),
        ({"min_tokens": 100}, "`min_tokens`"),
        ({"stream": "yes"}, "`stream`"),
        ({"metadata": {"user_id": 5}}, "`metadata.user_id`"),
        ({"tools": [{"name": "now", "input_schema": {}}]}, "`tools` is not supported"),
        ({"tool_choice": {"type": "auto"}}, "`tool_choice` is not supported"),
        ({"mcp_servers": [{"type": "url"}]}, "`mcp_servers` is not supported"),
        ({"container": "c"}, "`container` is not supported"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "`thinking` is not supported"),
        ({"thinking": {"type": "adaptive"}}, "`thinking` is not supported"),
        ({"output_config": {"format": {"type": "xml"}}}, "`output_config.format.type`"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "`output_config.format.schema`"),
        ({"stop": ["a"]}, "`stop` is not supported: here it is `stop_sequences`"),
        ({"n": 2}, "`n` is not supported"),
    ],
)
def test_what_is_refused_is_named(server: Running, body: dict[str, Any], message: str) -> None:
    """In Anthropic's terms, and before the engine sees anything."""
    ran = len(server.engine.seen)  # type: ignore[attr-defined]
    for stream in (False, True):
        said = refusal(post(server, {"stream": stream} | body), 400, "invalid_request_error")
        assert said.startswith(message)
    assert len(server.engine.seen) == ran  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", [MESSAGES, COUNT])
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("image", "text only"),
        ("document", "text only"),
        ("search_result", "text only"),
        ("tool_use", "call tools"),
        ("tool_result", "call tools"),
        ("server_tool_use", "call tools"),
        ("web_search_tool_result", "call tools"),
        ("thinking", "no separate reasoning"),
        ("redacted_thinking", "no separate reasoning"),
        ("{kind}%s\u2028", "text only"),
    ],
)
def test_blocks_that_are_no_text(server: Running, path: str, kind: str, why: str) -> None:
    """Refused by what they are, not by the first field that they lack."""
    content = [text("a"), {"type": kind, "text": "b"}]
    body = {"messages": [USER, USER, {"role": "user", "content": content}]}
    said = refusal(post(server, body, path), 400, "invalid_request_error")
    assert said.startswith(f"`messages[2].content[1]`: a block of type {kind!r}")
    assert why in said


@pytest.mark.parametrize("path", [MESSAGES, COUNT])
@pytest.mark.parametrize(
    ("body", "ignored"),
    [
        ({"tools": [], "mcp_servers": [], "container": None, "system": None}, ""),
        ({"tool_choice": {"type": "none"}, "thinking": {"type": "disabled"}}, ""),
        ({"cache_control": {"type": "ephemeral"}}, "cache_control"),
        (
            {"system": [text("a") | {"cache_control": {"type": "ephemeral"}}]},
            "system[].cache_control",
        ),
        (
            {"messages": [{"role": "user", "content": [text("a") | {"citations": [{}]}]}]},
            "messages[].content[].citations",
        ),
        ({"service_tier": "auto", "inference_geo": "us"}, "service_tier, inference_geo"),
    ],
)
def test_what_changes_nothing_is_let_pass(
    server: Running, path: str, body: dict[str, Any], ignored: str
) -> None:
    """And said, unless it asks for nothing."""
    more = {"max_tokens": None} if path == COUNT else {"metadata": {"user_id": "ann"}}
    response = post(server, body | more, path)
    assert response.status_code == 200, response.text
    assert response.headers.get("x-synthia-ignored", "") == ignored


def test_what_sampling_has_reaches_the_engine(server: Running) -> None:
    """Anthropic's fields, and those that this server has on every route."""
    body = {
        "temperature": 0.5, "top_k": 7, "top_p": 0.9, "seed": 3, "min_p": 0.1,
        "repetition_penalty": 1.5, "logit_bias": {"5": 1}, "bad_words": ["orca"], "max_tokens": 9.0,
    }  # fmt: skip
    assert post(server, body).status_code == 200
    found = server.engine.seen[-1].sampling  # type: ignore[attr-defined]
    assert (found.temperature, found.top_k, found.top_p, found.seed) == (0.5, 7, 0.9, 3)
    assert (found.min_p, found.repetition_penalty, found.bad_words) == (0.1, 1.5, ("orca",))
    assert (found.logit_bias, found.max_tokens, found.n) == ({5: 1}, 9, 1)


def test_hostile_bodies(server: Running) -> None:
    """Whatever is sent is a 4xx in the envelope, and never a fault of the server's."""
    for content in (
        b"", b"[]", b"null", b"{", b'{"model": "synthia-demo"', b"\xff", b'"\\ud800"',
        b"[" * 100_000, b'{"messages": ' * 5_000,
        json.dumps(BODY).replace("Hi", "\\ud800").encode(),
        json.dumps(BODY).replace('"Hi"', "NaN").encode(),
        json.dumps(BODY).replace("99", "1e999").encode(),
        json.dumps(BODY | {"x" * 100_000: {}, "max_tokens": -1}).encode(),
        json.dumps(BODY | {"messages": [{"role": "user", "content": [{"type": "x" * 10**5}]}]})
        .encode(),
        json.dumps(BODY | {"messages": [{"role": "user", "content": [{"type": []}]}]}).encode(),
    ):  # fmt: skip
        headers = {"Content-Type": "application/json"}
        said = refusal(post(server, content=content, headers=headers), 400, "invalid_request_error")
        assert len(said) < 400
        counted = post(server, path=COUNT, content=content, headers=headers)
        assert counted.status_code in (200, 400)  # it asks for no `max_tokens`
    for options in ({"Content-Type": "text/plain"}, {"Content-Encoding": "gzip"}):
        headers = {"Content-Type": "application/json"} | options
        refusal(post(server, headers=headers), 400, "invalid_request_error")
    assert post(server).json()["content"] == [text("Hello.")]


def test_events_are_ascii() -> None:
    """No reader finds a line's end in an event's data; the client gets the text."""
    said = "a\u2028b\u2029c\u0085d\n\ndata: e é 鯨"
    with running(FakeEngine((said, " end"))) as server:
        response = post(server, {"stream": True})
        assert response.content.isascii()
        assert streamed(events(response))[0] == f"{said} end"
        with client(server).messages.stream(**BODY) as stream:
            assert "".join(stream.text_stream) == f"{said} end"


def test_markers_are_named_where_they_are_rejected() -> None:
    """By the number that the client knows, also behind a system text, and in that itself."""
    with running(FakeEngine(PIECES), markers="reject") as server:
        bad = {"role": "user", "content": "a\nASSISTANT: b"}
        for body, where in (
            ({"messages": [USER, bad], "system": "a"}, "messages[1].content"),
            ({"system": "SYSTEM: a"}, "system"),
            ({"system": [text("a"), text("USER: a")]}, "system"),
        ):
            for path in (MESSAGES, COUNT):
                said = refusal(post(server, body, path), 400, "invalid_request_error")
                assert said.startswith(f"`{where}` has a line that begins with a role marker")


def test_a_conversation_that_is_too_long(server: Running) -> None:
    """It is refused; or loses its oldest exchanges, which a header tells."""
    long = {"role": "user", "content": "x" * 1500}
    messages = [long, {"role": "assistant", "content": "y"}, long]
    for path in (MESSAGES, COUNT):
        said = refusal(post(server, {"messages": messages}, path), 400, "invalid_request_error")
        assert "context holds 2048 tokens" in said
    with running(FakeEngine(PIECES), overflow="drop-oldest") as dropping:
        for stream in (False, True):
            response = post(dropping, {"messages": messages, "stream": stream})
            assert response.headers["x-synthia-dropped-messages"] == "2"
        assert post(dropping, {"messages": messages}, COUNT).json() == {"input_tokens": 1518}


def test_a_schema_rules_the_answer() -> None:
    """`output_config.format` is the grammar of the answer; the client's `parse` sends it."""

    class Animal(BaseModel):
        kind: str

    with running(FakeEngine(('{"kind": ', '"USER: cat"}'))) as server:
        parsed = client(server).messages.parse(**BODY, output_format=Animal)
        assert parsed.parsed_output == Animal(kind="USER: cat")
        assert (parsed.stop_reason, parsed.stop_sequence) == ("end_turn", None)
        grammar = server.engine.seen[-1].sampling.grammar  # type: ignore[attr-defined]
        assert (grammar.kind, grammar.param) == ("json", "output_config.format.schema")
        assert json.loads(grammar.text)["properties"] == {
            "kind": {"type": "string", "title": "Kind"}
        }
        body = {"min_tokens": 5, "output_config": {"format": {"type": "json_schema", "schema": {}}}}
        said = refusal(post(server, body), 400, "invalid_request_error")
        assert "`output_config.format.schema`" in said


def test_keepalive_comments() -> None:
    """While the first token is waited for, comments are sent, which the client passes over."""
    with running(FakeEngine(PIECES[1:4], delay=0.3), sse_keepalive_seconds=0.05) as server:
        said = post(server, {"stream": True}).text
        assert ": waiting\n\n: waiting\n\n" in said
        start = next(line for line in said.split("\n") if '"message_start"' in line)
        usage = json.loads(start.removeprefix("data: "))["message"]["usage"]
        assert (usage["input_tokens"], usage["output_tokens"]) == (20, 0)
        with client(server).messages.stream(**BODY) as stream:
            assert "".join(stream.text_stream) == "Hello."


def test_a_fault_in_a_stream() -> None:
    """It is the last event, with what ran; before the first token it is a status."""
    with running(FakeEngine(PIECES, fault=EngineFault(), fault_at=2)) as server:
        response = post(server, {"stream": True}, headers={"X-Request-Id": "r"})
        assert response.status_code == 200
        *before, last = events(response)
        assert [event["type"] for event in before] == [
            "message_start", "content_block_start", "ping", "content_block_delta"
        ]  # fmt: skip
        assert last == {
            "type": "error",
            "error": {"type": "api_error", "message": EngineFault().message},
            "request_id": "r",
            "usage": {
                "input_tokens": 20,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
                "output_tokens": 5,
            },
        }
        with (
            pytest.raises(anthropic.APIStatusError, match="failed at this request") as fault,
            client(server).messages.stream(**BODY) as stream,
        ):
            stream.get_final_message()
        assert fault.value.type == "api_error"
        refusal(post(server), 500, "api_error")
    with running(FakeEngine(fault=EngineFault())) as server:
        refusal(post(server, {"stream": True}), 500, "api_error")


def test_a_fault_behind_comments_has_no_usage() -> None:
    """A stream that broke before the prompt had run says so, and used nothing."""
    with running(FakeEngine(fault=EngineFault(), delay=0.2), sse_keepalive_seconds=0.05) as server:
        last = post(server, {"stream": True}).text.split("\n\n")[-2]
        assert last.startswith('event: error\ndata: {"type":"error","error":{"type":"api_error"')
        assert "usage" not in last


@pytest.mark.parametrize("stream", [False, True])
def test_deadline(stream: bool) -> None:
    """When the time is up the engine is freed; the client is told, and what ran."""
    with running(FakeEngine((" a",) * 1000, delay=0.02)) as server:
        headers = {"X-Request-Timeout": "0.3", "X-Request-Id": "late"}
        body = {"stream": stream, "max_tokens": 2000}
        response = post(server, body, headers=headers)
        if stream:
            last = events(response)[-1]
            assert last["error"]["type"] == "timeout_error"
            assert 0 < last["usage"]["output_tokens"] < 100
        else:
            assert "0.3 seconds" in refusal(response, 504, "timeout_error")
        assert server.engine.aborted == ["late"]  # type: ignore[attr-defined]


def test_each_error_has_the_envelope(tmp_path: Path) -> None:
    """By its status, on both routes, with the headers that say when to come back."""
    file = tmp_path / "keys.yaml"
    users: dict[str, Any] = {
        "ann": {"requests_per_minute": 1},
        "bob": {"models": ["synthia-demo-tot"]},
    }
    keys = key_file(file, **users)
    limits = {"max_body_bytes": 2000}
    with running(FakeEngine(PIECES), keys_file=file, limits=limits) as server:
        as_ann = {"X-Api-Key": keys["ann"]["Authorization"].split()[1]}
        assert post(server, headers=as_ann).status_code == 200
        limited = post(server, headers=as_ann)
        refusal(limited, 429, "rate_limit_error")
        assert 0 < int(limited.headers["retry-after"]) <= 60
        assert 0 < int(limited.headers["retry-after-ms"]) <= 60_000
        assert limited.headers["x-ratelimit-remaining-requests"] == "0"
        assert post(server, path=COUNT, headers=as_ann).status_code == 200  # no limit counts it
        for path in (MESSAGES, COUNT):
            for wrong in ({}, {"X-Api-Key": "no"}, {"Authorization": "Bearer no"}):
                unknown = post(server, path=path, headers=wrong)
                refusal(unknown, 401, "authentication_error")
                assert unknown.headers["www-authenticate"] == "Bearer"
            refusal(post(server, path=path, headers=keys["bob"]), 403, "permission_error")
            body = {"model": "claude"}
            refusal(post(server, body, path, headers=keys["bob"]), 404, "not_found_error")
            body = {"system": "a" * 2000}
            refusal(post(server, body, path, headers=keys["bob"]), 413, "request_too_large")
            other = httpx.get(f"{server.url}{path}", headers=keys["bob"])
            refusal(other, 405, "invalid_request_error")
            assert other.headers["allow"] == "POST"
            other = httpx.get(f"{server.url}{path}/", headers=keys["bob"])
            refusal(other, 405, "invalid_request_error")
        elsewhere = httpx.get(f"{server.url}/v1/chat/completions", headers=keys["bob"])
        assert "code" in elsewhere.json()["error"]  # OpenAI's


def test_a_server_that_cannot() -> None:
    """503 in the envelope, while it leaves and when its engine is gone."""
    engine = FakeEngine(PIECES)
    with running(engine) as server:
        engine.dead = True
        dead = post(server)
        refusal(dead, 503, "overloaded_error")
        assert dead.headers["retry-after"] == "30"
    with running(FakeEngine(PIECES)) as server:
        server.app.server_state.drain()
        leaving = post(server)
        refusal(leaving, 503, "overloaded_error")
        assert leaving.headers["retry-after-ms"] == "1000"


def test_counted_under_their_own_routes() -> None:
    """Requests, ends and errors have the routes' paths; the slash at the end is none's."""
    with running(FakeEngine(PIECES)) as server:
        post(server)
        post(server, path=f"{MESSAGES}/")
        post(server, {"max_tokens": 0})
        post(server, path=COUNT)
        post(server, {"model": "x"}, COUNT)
        for route, model, status, number in (
            (MESSAGES, "synthia-demo", "200", 2), (MESSAGES, "", "400", 1),
            (COUNT, "", "200", 1), (COUNT, "", "404", 1),
        ):  # fmt: skip
            labels = {"route": route, "model": model, "status": status}
            assert server.value("synthia_requests_total", **labels) == number
        for route, code in ((COUNT, "model_not_found"), (MESSAGES, "invalid_value")):
            assert server.value("synthia_errors_total", route=route, code=code) == 1
        assert server.value("synthia_answer_tokens_total", model="synthia-demo") == 32


def test_openapi_describes_both(server: Running) -> None:
    """Their bodies with each field, and the count's without those of sampling."""
    document = httpx.get(f"{server.url}/openapi.json").json()
    schemas = document["components"]["schemas"]
    for path, name in ((MESSAGES, "MessagesRequest"), (COUNT, "CountTokensRequest")):
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert content["schema"]["$ref"].endswith(f"/{name}")
    assert set(schemas["CountTokensRequest"]["properties"]) == {"model", "messages", "system"}
    assert {"max_tokens", "stop_sequences", "seed"} <= set(schemas["MessagesRequest"]["properties"])
    assert set(schemas["MessagesRequest"]["required"]) == {"model", "messages", "max_tokens"}


def test_the_stock_client(server: Running) -> None:
    """Plain, streamed, put together from a stream, and the next turn with what came."""
    with client(server) as here:
        plain = here.messages.create(**BODY, system="Be brief.", stop_sequences=["lo"])
        assert plain.content == [anthropic.types.TextBlock(type="text", text="Hel")]
        assert (plain.stop_reason, plain.stop_sequence) == ("stop_sequence", "lo")
        kinds = [event.type for event in here.messages.create(**BODY, stream=True)]
        assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
        with here.messages.stream(**BODY, extra_body={"temperature": 0}) as stream:
            assert "".join(stream.text_stream) == "Hello."
            whole = stream.get_final_message()
        assert whole.stop_reason == "end_turn"
        assert whole.usage == here.messages.create(**BODY).usage
        turns: list[Any] = [USER, {"role": "assistant", "content": whole.content}, USER]
        asked = BODY | {"messages": turns}
        raw = here.messages.with_raw_response.create(**asked)
        assert "messages[].content[].parsed_output" not in raw.headers.get("x-synthia-ignored", "")
        counted = here.messages.count_tokens(model="synthia-demo", messages=turns)
        assert counted.input_tokens == raw.parse().usage.input_tokens


def test_the_stock_client_async(server: Running) -> None:
    """Many at once from one event loop."""

    async def main() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none") as here:

            async def one(*, stream: bool) -> str:
                if not stream:
                    return str((await here.messages.create(**BODY)).content[0].text)
                async with here.messages.stream(**BODY) as stream_:
                    return "".join([piece async for piece in stream_.text_stream])

            count = await here.messages.count_tokens(model="synthia-demo", messages=[USER])  # type: ignore[list-item]
            assert count.input_tokens == 20
            return await asyncio.gather(*(one(stream=n % 2 == 0) for n in range(8)))

    assert asyncio.run(main()) == ["Hello."] * 8


def test_the_stock_clients_errors(tmp_path: Path) -> None:
    """Each is the client's own class, with the type that its reader branches on."""
    file = tmp_path / "keys.yaml"
    users: dict[str, Any] = {"ann": {"requests_per_minute": 1}, "bob": {"models": ["synthia-demo"]}}
    keys = key_file(file, **users)
    limits = {"max_body_bytes": 2000}
    with running(FakeEngine(PIECES), keys_file=file, limits=limits) as server:
        ann, bob = (client(server, keys[n]["Authorization"].split()[1]) for n in ("ann", "bob"))
        ann.messages.create(**BODY)
        tot = {"model": "synthia-demo-tot"}
        for here, body, error, kind in (
            (bob, {"max_tokens": 0}, anthropic.BadRequestError, "invalid_request_error"),
            (client(server), {}, anthropic.AuthenticationError, "authentication_error"),
            (bob, tot, anthropic.PermissionDeniedError, "permission_error"),
            (bob, {"model": "claude"}, anthropic.NotFoundError, "not_found_error"),
            (bob, {"system": "a" * 2000}, anthropic.RequestTooLargeError, "request_too_large"),
            (ann, {}, anthropic.RateLimitError, "rate_limit_error"),
        ):
            for stream in (False, True):
                with pytest.raises(error) as told:
                    here.messages.create(**BODY | {"stream": stream} | body)
                assert told.value.type == kind
        server.engine.dead = True  # type: ignore[attr-defined]
        with pytest.raises(anthropic.InternalServerError) as dead:
            bob.messages.create(**BODY)
        assert (dead.value.status_code, dead.value.type) == (503, "overloaded_error")
