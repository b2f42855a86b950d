"""The edge over a scripted engine, on a real socket, with real clients."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
import yaml
from serving import Running, running, wait_until

from synthia_vllm.admission.users import new_key
from synthia_vllm.engine.fake import FakeEngine
from synthia_vllm.errors import EngineFault, StartupError
from synthia_vllm.template.answer import AnswerFilter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PIECES = (" \n", " He", "llo", ".", " \n", "US", "ER", ": next", " question")
USER = {"role": "user", "content": "Hi"}
BODY: dict[str, Any] = {"model": "synthia-demo", "messages": [USER]}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(FakeEngine(PIECES)) as here:
        yield here


def post(server: Running, body: Any = None, **options: Any) -> httpx.Response:
    if "content" not in options:
        options["json"] = body or BODY
    return httpx.post(f"{server.url}/v1/chat/completions", timeout=30, **options)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON events of a stream; checks its framing."""
    *blocks, last, rest = response.text.split("\n\n")
    assert rest == ""
    found = [json.loads(block.removeprefix("data: ")) for block in blocks]
    if last == "data: [DONE]":
        return found
    return [*found, json.loads(last.removeprefix("data: "))]


def test_stream_is_the_plain_answer(server: Running) -> None:
    """Streamed deltas joined are the plain content; so are the counts and the reasons."""
    client = server.client
    plain = client.chat.completions.create(**BODY)
    chunks = list(
        client.chat.completions.create(**BODY, stream=True, stream_options={"include_usage": True})
    )
    *chunks, last = chunks
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Hello."
    assert plain.choices[0].message.content == "Hello."
    assert plain.usage == last.usage
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert plain.choices[0].finish_reason == "stop"
    assert plain.choices[0].model_extra["stop_reason"] == "USER:"
    assert all(c.usage is None for c in chunks)


def test_counts_with_every_event(server: Running) -> None:
    """vLLM's `continuous_usage_stats`: each event counts the tokens so far; the last, all."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = events(post(server, BODY | {"stream": True, "stream_options": options}))
    counts = [event["usage"]["completion_tokens"] for event in found]
    assert counts == sorted(counts)
    assert counts[0] < counts[-2] == counts[-1]
    assert found[-1]["choices"] == []
    alone = {"continuous_usage_stats": True}
    for event in events(post(server, BODY | {"stream": True, "stream_options": alone})):
        assert "usage" not in event


def test_first_event_has_the_first_text(server: Running) -> None:
    """No event before the first text; that one brings the role. None is empty."""
    first, *others = events(post(server, BODY | {"stream": True}))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "He"}
    assert [e["choices"][0]["delta"] for e in others] == [
        {"content": "llo"}, {"content": "."}, {}
    ]  # fmt: skip


def test_empty_answer_is_an_answer() -> None:
    """A model that says nothing gives an empty content, streamed and not."""
    with running(FakeEngine((" \n",))) as server:
        assert post(server).json()["choices"][0]["message"]["content"] == ""
        [only] = events(post(server, BODY | {"stream": True}))
        assert only["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_marker_never_leaves(server: Running) -> None:
    """With `min_tokens` the engine looks away from stops; the marker still ends the answer."""
    for extra in (
        {"min_tokens": 30},
        {"ignore_eos": True},
        {"n": 3, "min_tokens": 30},
        {"logprobs": True, "top_logprobs": 2, "min_tokens": 30},
    ):
        streamed = post(server, BODY | extra | {"stream": True})
        plain = post(server, BODY | extra)
        for response in (streamed, plain):
            assert response.status_code == 200
            text = response.text.replace('"stop_reason":"USER:"', "")
            assert "US" not in text
            assert "next" not in text
        for choice in plain.json()["choices"]:
            assert choice["message"]["content"] == "Hello."
            assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "USER:")


def test_own_stop(server: Running) -> None:
    """A request's own stop ends the answer before `USER:` and is reported."""
    choice = post(server, BODY | {"stop": ["zzz", "lo"]}).json()["choices"][0]
    assert choice["message"]["content"] == "Hel"
    assert choice["stop_reason"] == "lo"
    assert server.engine.seen[-1].sampling.stop == ("USER:", "zzz", "lo")  # type: ignore[attr-defined]


def test_logprobs_are_of_the_answer(server: Running) -> None:
    """The tokens reported are those of the answer's text, streamed and not, to the byte."""
    wanted = {"logprobs": True, "top_logprobs": 1}
    plain = post(server, BODY | wanted).json()["choices"][0]["logprobs"]["content"]
    assert "".join(place["token"] for place in plain) == "Hello."
    assert bytes(b for place in plain for b in place["bytes"]) == b"Hello."
    streamed = events(post(server, BODY | wanted | {"stream": True}))
    places = [e["choices"][0]["logprobs"]["content"] for e in streamed]
    assert [place for content in places for place in content] == plain


def test_logprobs_of_split_characters() -> None:
    """A character made of several tokens is reported with all of them."""
    with running(FakeEngine((" é", "😀", "ü", "\nUSER:"))) as server:
        body = BODY | {"logprobs": True}
        places = post(server, body).json()["choices"][0]["logprobs"]["content"]
        assert bytes(b for place in places for b in place["bytes"]).decode() == "é😀ü"


def test_card_defaults_reach_the_engine(server: Running) -> None:
    """A request that asks for nothing gets the card's sampling; one that does, its own."""
    post(server)
    asked = server.engine.seen[-1].sampling  # type: ignore[attr-defined]
    assert (asked.temperature, asked.top_p, asked.top_k, asked.max_tokens) == (0.75, 1.0, 50, 1024)
    own = {
        "temperature": 0.0, "top_p": 0.5, "top_k": -1, "min_p": 0.1, "max_tokens": 7, "seed": 3,
        "presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 1.2,
        "ignore_eos": True,
    }  # fmt: skip
    post(server, BODY | own | {"logit_bias": {"5": -100}, "max_completion_tokens": 7})
    asked = server.engine.seen[-1].sampling  # type: ignore[attr-defined]
    assert {name: getattr(asked, name) for name in own} == own
    assert asked.logit_bias == {5: -100}


def test_structured_outputs_reach_the_engine(server: Running) -> None:
    """`json_object` asks for any object, `json_schema` for its schema, `text` for neither."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for wanted, expected in (
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}, schema),
    ):
        assert post(server, BODY | {"response_format": wanted}).status_code == 200
        grammar = server.engine.seen[-1].sampling.grammar  # type: ignore[attr-defined]
        assert (grammar and json.loads(grammar.text)) == expected


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_vllms_structured_outputs_reach_the_engine(server: Running, path: str) -> None:
    """vLLM's own field brings JSON, a regular expression, choices or EBNF, on both routes."""
    schema = {"type": "object", "required": ["a"]}
    for own, kind, text in (
        ({"json": schema}, "json", json.dumps(schema)),
        ({"json": json.dumps(schema)}, "json", json.dumps(schema)),
        ({"json_object": True}, "json", '{"type": "object"}'),
        ({"regex": "a+"}, "regex", "a+"),
        ({"choice": ["a", 'b"\n']}, "grammar", 'start: CHOICE\nCHOICE: "a" | "b\\"\\n"'),
        ({"grammar": 'start: "a"', "regex": None}, "grammar", 'start: "a"'),
    ):
        body = BODY if path.startswith("/v1/chat") else {"model": "synthia-demo", "prompt": "x"}
        response = httpx.post(f"{server.url}{path}", json=body | {"structured_outputs": own})
        assert response.status_code == 200, response.text
        sampling = server.engine.seen[-1].sampling  # type: ignore[attr-defined]
        assert (sampling.grammar.kind, sampling.grammar.text) == (kind, text)
        assert sampling.stop == ()


def test_a_grammar_ends_the_answer() -> None:
    """With a grammar ``USER:`` is text like any other, and so is white space at the ends."""
    said = (' {"a": "', "USER", ": b", '"}\n')
    with running(FakeEngine(said)) as here:
        for stream in (False, True):
            body = BODY | {"structured_outputs": {"regex": "x"}, "ignore_eos": True}
            for more, expected in (({}, "".join(said)), ({"stop": ["R: b"]}, ' {"a": "USE')):
                response = post(here, body | {"stream": stream} | more)
                if stream:
                    deltas = [event["choices"][0]["delta"] for event in events(response)]
                    assert "".join(delta.get("content", "") for delta in deltas) == expected
                else:
                    assert response.json()["choices"][0]["message"]["content"] == expected
            assert here.engine.seen[-1].sampling.ignore_eos is False  # type: ignore[attr-defined]


def test_a_grammar_that_cannot_be_followed_further_is_the_clients() -> None:
    """The engine's word that a grammar is at its limits is a 400, in a stream an event."""
    engine = FakeEngine((" a", " b"), ends_with="error")
    with running(engine) as here:
        body = BODY | {"response_format": {"type": "json_object"}}
        response = post(here, body)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "grammar_too_complex"
        assert "grammar_too_complex" in post(here, body | {"stream": True}).text
        assert post(here, BODY).status_code == 500  # without a grammar it is the engine's fault


def test_presets_by_model_name(server: Running) -> None:
    """The `-tot` name puts the card's sentence in front, unless the request has its own."""

    def prompt() -> str:
        ids = server.engine.seen[-1].prompt_token_ids  # type: ignore[attr-defined]
        return b"".join(server.engine.token_bytes(i) for i in ids).decode()

    answer = post(server, BODY | {"model": "synthia-demo-tot"}).json()
    assert answer["model"] == "synthia-demo-tot"
    assert prompt().startswith("SYSTEM: Elaborate on the topic using a Tree of Thoughts")
    own = [{"role": "developer", "content": "Be brief."}, USER]
    post(server, BODY | {"model": "synthia-demo-tot", "messages": own})
    assert prompt() == "SYSTEM: Be brief.\nUSER: Hi\nASSISTANT:"
    post(server)
    assert prompt() == "USER: Hi\nASSISTANT:"


def test_content_parts_are_joined(server: Running) -> None:
    """A content given in parts, as `vllm bench serve` sends it, is one text."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    by_parts = post(server, BODY | {"messages": [{"role": "user", "content": parts}]}).json()
    whole = post(server, BODY | {"messages": [{"role": "user", "content": "a\nb"}]}).json()
    assert by_parts["usage"] == whole["usage"]


def test_continued_answer() -> None:
    """A last assistant message is continued: the space between the texts is kept."""
    with running(FakeEngine((" is", " large. ", "\nUSER:"))) as server:
        messages = [USER, {"role": "assistant", "content": "The Orca "}]
        for extra in (
            {},
            {"continue_final_message": True, "add_generation_prompt": False},
            {"continue_final_message": False},  # as routers write it into every body
        ):
            body = BODY | extra | {"messages": messages}
            assert post(server, body).json()["choices"][0]["message"]["content"] == " is large."
        for extra in ({"continue_final_message": True}, {"add_generation_prompt": False}):
            refused = post(server, BODY | extra)
            assert refused.json()["error"]["param"] in extra


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"model": "gpt-4"}, "model", "synthia-demo-tot"),
        ({"tools": [{"type": "function"}]}, "tools", "not trained to call tools"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "tool"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "text only",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "required"),
        ({"messages": [{"role": "system"}, USER]}, "messages[0].content", "required"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "number"),
        ({"n": 100}, "n", "16"),
        ({"stop": ["a", ""]}, "stop[1]", "at least 1"),
        ({"stop": ["a"] * 65}, "stop", "64"),
        ({"stop": ["ab" * 100] * 21}, "stop", "4096"),
        ({"stop_token_ids": [32000]}, "stop_token_ids", "32000"),
        ({"allowed_token_ids": [5, 32000]}, "allowed_token_ids", "32000"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "at least 1"),
        ({"bad_words": [""]}, "bad_words[0]", "at least 1"),
        ({"stream_interval": 0}, "stream_interval", "greater than or equal to 1"),
        ({"n": 1.5}, "n", "integer"),
        ({"n": "1"}, "n", "integer"),
        ({"repetition_penalty": 1.1, "repeat_penalty": 1.2}, "repeat_penalty", "mean the same"),
        (
            {"repetition_detection": {"max_pattern_size": 4, "min_count": 1}},
            "repetition_detection.min_count",
            "greater than or equal to 2",
        ),
        ({"use_beam_search": True}, "use_beam_search", "samples"),
        ({"length_penalty": 1.5}, "length_penalty", "samples"),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output", "marker"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "overflow"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "/v1/completions"),
        ({"web_search_options": {"search_context_size": "low"}}, "web_search_options", "search"),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]},
                    USER,
                ]
            },
            "messages[1].tool_calls",
            "tools",
        ),
        ({"max_tokens": 0}, "max_tokens", "1"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "mean the same"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "at most 4"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        (
            {"stream_options": {"include_usage": True}, "stream": False},
            "stream_options",
            "stream: true",
        ),
        ({"logit_bias": {"32000": 1}}, "logit_bias", "32000"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "match"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        ({"structured_outputs": {}}, "structured_outputs", "needs one of"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
        (
            {"structured_outputs": {"regex": "a", "grammar": "b"}},
            "structured_outputs.grammar",
            "cannot both",
        ),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs.regex",
            "cannot both",
        ),
        (
            {"structured_outputs": {"structural_tag": "{}"}},
            "structured_outputs.structural_tag",
            "tools",
        ),
        (
            {"structured_outputs": {"regex": "a"}, "min_tokens": 1},
            "min_tokens",
            "the grammar ends the answer",
        ),
        ({"logit_bias": {"x": 1, **{str(i): 1 for i in range(2000)}}}, "logit_bias", "1024"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "16"),
        ({"seed": 2**64}, "seed", "less than or equal"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusal_names_the_field(
    server: Running, change: dict[str, Any], param: str, said: str, stream: bool
) -> None:
    """A request that cannot be served gets a 4xx in OpenAI's envelope, streamed or not."""
    response = post(server, BODY | {"stream": stream} | change)
    assert response.status_code in (400, 404)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert said in error["message"]


@pytest.mark.parametrize(
    "nothing",
    [{"tools": None}, {"tools": []}, {"tool_choice": "none"}, {"store": False}, {"user": "u"},
     {"metadata": {"a": "b"}}, {"service_tier": "auto"}, {"logprobs": False}, {"stop": None},
     {"messages": [USER, {"role": "assistant", "content": "a", "refusal": None,
                          "tool_calls": None, "annotations": []}, USER]}],
)  # fmt: skip
def test_asking_for_nothing_is_fine(server: Running, nothing: dict[str, Any]) -> None:
    """Fields clients send by habit, with values that ask for nothing, are no reason to refuse."""
    assert post(server, BODY | nothing).status_code == 200


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b'{"model":"\\ud800"}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"model":"m","messages":[],"n":' + b"9" * 5000 + b"}", "application/json", 400),
        (json.dumps(BODY).encode(), "text/plain", 400),
        (b" " * (512 * 1024 + 1), "application/json", 413),
    ],
)  # fmt: skip
def test_bad_bodies(server: Running, content: bytes, kind: str, status: int) -> None:
    """No body gives a 500: each gets its 4xx in the envelope."""
    response = httpx.post(
        f"{server.url}/v1/chat/completions", content=content, headers={"Content-Type": kind}
    )
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_body_without_length_is_limited(server: Running) -> None:
    """A chunked body is refused as soon as it is too large."""
    response = httpx.post(
        f"{server.url}/v1/chat/completions",
        content=(b" " * 65536 for _ in range(20)),
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/chat/completions", 405), ("POST", "/v1/models", 405), ("GET", "/nope", 404),
     ("GET", "/v1/models/nope", 404)],
)  # fmt: skip
def test_wrong_routes(server: Running, method: str, path: str, status: int) -> None:
    """Unknown routes, methods and models get the envelope too."""
    response = httpx.request(method, server.url + path)
    assert response.status_code == status
    assert response.json()["error"]["message"]


# --- long conversations -----------------------------------------------------------------------


def long_conversation(turns: int) -> list[dict[str, str]]:
    """A system message, `turns` exchanges of about 100 fake tokens each, and a question."""
    messages = [{"role": "system", "content": "S" * 50}]
    for turn in range(turns):
        messages += [
            {"role": "user", "content": f"question {turn} " + "x" * 30},
            {"role": "assistant", "content": f"answer {turn} " + "y" * 30},
        ]
    return [*messages, {"role": "user", "content": "last"}]


def test_overflow_error(server: Running) -> None:
    """A prompt beyond the context is a 400 that says the tokens counted and the limit."""
    error = post(server, BODY | {"messages": long_conversation(40)}).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "2048" in error["message"]
    client = server.client
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="synthia-demo", messages=long_conversation(40))  # type: ignore[arg-type]
    assert caught.value.code == "context_length_exceeded"


def test_hopeless_prompts_are_not_counted_to_the_end(server: Running) -> None:
    """What cannot fit by its length alone is refused without the work of tokenising all of it."""
    content = "x" * 500_000
    error = post(server, BODY | {"messages": [{"role": "user", "content": content}]}).json()[
        "error"
    ]
    assert error["code"] == "context_length_exceeded"
    assert "at least 2050 tokens" in error["message"]


def test_max_tokens_is_cut_to_the_room(server: Running) -> None:
    """`max_tokens` beyond what the context leaves is cut to it, up to the last token."""
    content = "x" * (2048 - len("USER: \nASSISTANT:") - 1 - 1)
    body = BODY | {"messages": [{"role": "user", "content": content}], "max_tokens": 10**9}
    answer = post(server, body).json()
    assert answer["usage"]["prompt_tokens"] == 2047
    assert server.engine.seen[-1].sampling.max_tokens == 1  # type: ignore[attr-defined]
    body["messages"] = [{"role": "user", "content": content + "x"}]
    assert post(server, body).json()["error"]["code"] == "context_length_exceeded"


def test_overflow_drop_oldest() -> None:
    """Whole exchanges go, oldest first, as few as it takes; header and usage say how many."""
    with running(FakeEngine(PIECES), overflow="drop-oldest") as server:
        messages = long_conversation(40)
        response = post(server, BODY | {"messages": messages})
        dropped = int(response.headers["x-synthia-dropped-messages"])
        usage = response.json()["usage"]
        assert usage["prompt_tokens_details"]["dropped_messages"] == dropped
        assert dropped % 2 == 0
        work = server.engine.seen[-1]  # type: ignore[attr-defined]
        text = b"".join(server.engine.token_bytes(i) for i in work.prompt_token_ids).decode()
        first = dropped // 2
        assert text.startswith("SYSTEM: " + "S" * 50 + f"\nUSER: question {first} ")
        assert text.endswith("\nUSER: last\nASSISTANT:")
        # One exchange fewer dropped would not have left the reserve.
        one_more = len(f"USER: question {first} \nASSISTANT: answer {first} \n") + 60
        assert usage["prompt_tokens"] + 256 <= 2048 < usage["prompt_tokens"] + 256 + one_more
        streamed = post(server, BODY | {"messages": messages, "stream": True})
        assert streamed.headers["x-synthia-dropped-messages"] == str(dropped)
        short = post(server, BODY)
        assert "x-synthia-dropped-messages" not in short.headers
        huge = post(server, BODY | {"messages": [{"role": "user", "content": "x" * 3000}]})
        assert huge.json()["error"]["code"] == "context_length_exceeded"


# --- faults and clients that leave ------------------------------------------------------------


def test_fault_before_the_first_token_is_a_status() -> None:
    """An error before anything was sent has its own status, streamed or not."""
    with running(FakeEngine(fault=EngineFault())) as server:
        for stream in (False, True):
            response = post(server, BODY | {"stream": stream})
            assert response.status_code == 500
            assert response.json()["error"]["code"] == "engine_fault"


def test_fault_in_a_stream_is_an_event() -> None:
    """Later it is the last event, in the same envelope; no `[DONE]` pretends success."""
    with running(FakeEngine(fault=EngineFault(), fault_at=2)) as server:
        response = post(server, BODY | {"stream": True})
        assert response.status_code == 200
        assert "[DONE]" not in response.text
        assert events(response)[-1]["error"]["code"] == "engine_fault"
        client = server.client
        with pytest.raises(openai.APIError, match="failed at this request"):
            list(client.chat.completions.create(**BODY, stream=True))


class _Breaks(FakeEngine):
    """An engine that has no meaning for what happened to it."""

    def submit(self, work: Any, sink: Any) -> Any:
        raise ZeroDivisionError


def test_faults_of_our_own_stay_in_the_envelope(caplog: pytest.LogCaptureFixture) -> None:
    """Any exception at all is an error the client can read."""
    with running(_Breaks(PIECES)) as server:
        for body in (BODY, BODY | {"stream": True}):
            answer = post(server, body)
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "engine_fault"
    assert "ZeroDivisionError" in caplog.text


def test_fault_within_a_stream_ends_that_stream(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What goes wrong while the engine hands over a step never gets back to the engine."""
    with running(FakeEngine(PIECES, delay=0.02)) as server:
        feed = AnswerFilter.feed

        def breaks(answer: AnswerFilter, text: str) -> str:
            return feed(answer, text if text != "." else str(1 // 0))

        monkeypatch.setattr(AnswerFilter, "feed", breaks)
        said = events(post(server, BODY | {"stream": True}))
        assert said[0]["choices"][0]["delta"]["content"]
        assert said[-1]["error"]["code"] == "engine_fault"
        monkeypatch.undo()
        assert post(server).status_code == 200
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_is_noticed(stream: bool) -> None:
    """When the connection goes, the request is freed in the engine, also on the plain route."""
    with running(FakeEngine((" a",) * 1000, delay=0.01)) as server:
        body = json.dumps(BODY | {"stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as raw:
            raw.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
                b"Content-Type: application/json\r\nX-Request-Id: gone\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            if stream:
                assert raw.recv(15) == b"HTTP/1.1 200 OK"
            else:
                wait_until(lambda: server.engine.seen)  # type: ignore[attr-defined]
        wait_until(lambda: server.engine.aborted == ["gone"])  # type: ignore[attr-defined]
        wait_until(lambda: server.value("synthia_requests_in_flight") == 0)
        assert server.value("synthia_aborted_by_client_total", model="synthia-demo") == 1


# --- life -------------------------------------------------------------------------------------


class _Slow(FakeEngine):
    """Starts when it is told to."""

    async def start(self, progress: Callable[[str], None]) -> None:
        await asyncio.to_thread(wait_until, lambda: not self.dead)


def test_phases() -> None:
    """`/health` and `/ready` tell starting, serving, draining and dead apart, as do requests."""

    def statuses(server: Running) -> tuple[int, int, int]:
        paths = ("/health", "/ready")
        found = [httpx.get(server.url + path).status_code for path in paths]
        return found[0], found[1], post(server).status_code

    engine = _Slow(PIECES, dead=True)
    with running(engine, ready=False) as server:
        assert statuses(server) == (503, 503, 503)
        assert post(server).headers["retry-after"]
        engine.dead = False
        wait_until(lambda: server.app.server_state.phase == "serving")
        assert statuses(server) == (200, 200, 200)
        server.app.server_state.drain()
        assert statuses(server) == (200, 503, 503)
        server.app.server_state._phase = "serving"
        engine.dead = True
        wait_until(lambda: server.app.server_state.phase == "dead")
        assert statuses(server) == (503, 503, 503)
        assert post(server).json()["error"]["code"] == "engine_dead"


class _Broken(FakeEngine):
    """Does not start."""

    async def start(self, progress: Callable[[str], None]) -> None:
        raise StartupError("no weights")


def test_failed_start_is_known() -> None:
    """An engine that cannot start leaves its reason for the command line to print."""
    with running(_Broken(), ready=False) as server:
        wait_until(lambda: server.app.server_state.phase == "dead")
        assert str(server.app.server_state.failure) == "no weights"


def test_request_id(server: Running) -> None:
    """The client's request id is used and returned; a senseless one is replaced."""
    response = post(server, headers={"X-Request-Id": "abc-1"})
    assert response.headers["x-request-id"] == "abc-1"
    assert response.json()["id"] == "chatcmpl-abc-1"
    assert post(server, headers={"X-Request-Id": "a b"}).headers["x-request-id"] != "a b"


def test_models(server: Running) -> None:
    """Both names are listed with the context's size, and can be asked for one by one."""
    client = server.client
    listed = client.models.list().data
    assert [m.id for m in listed] == ["synthia-demo", "synthia-demo-tot"]
    assert (listed[0].model_extra or {})["max_model_len"] == 2048
    assert client.models.retrieve("synthia-demo-tot").id == "synthia-demo-tot"


def test_metrics_count_what_happened() -> None:
    """Each series of the edge moves by what one request of each kind did, and no more."""
    with running(FakeEngine(PIECES)) as server:
        messages = [{"role": "user", "content": "a\nUSER: b"}]
        plain = post(server, BODY | {"messages": messages}).json()["usage"]
        post(server, BODY | {"stream": True})
        post(server, BODY | {"n": 1000})
        post(server, BODY | {"model": "nobody's"})
        httpx.get(f"{server.url}/v1/models")
        httpx.get(f"{server.url}/unknown/path")
        name = {"model": "synthia-demo"}
        chat = {"route": "/v1/chat/completions"}
        assert server.value("synthia_requests_total", status="200", **chat, **name) == 2
        assert server.value("synthia_requests_total", status="400", model="", **chat) == 1
        assert server.value("synthia_requests_total", status="404", model="", **chat) == 1
        assert server.value("synthia_requests_total", route="other", model="", status="404") == 1
        assert server.value("synthia_finished_total", reason="stop", **name) == 2
        assert server.value("synthia_time_to_first_token_seconds_count", **name) == 1
        assert server.value("synthia_inter_token_latency_seconds_count", **name) == 2
        assert server.value("synthia_end_to_end_seconds_count", **name) == 2
        assert server.value("synthia_answer_tokens_total", **name) == 2 * plain["completion_tokens"]
        assert server.value("synthia_escaped_markers_total", **name) == 1
        shown = httpx.get(f"{server.url}/metrics").text
        assert "nobody" not in shown
        assert "unknown/path" not in shown


def test_openapi_describes_the_chat_route(server: Running) -> None:
    """The OpenAPI document has every route and every field of a chat request."""
    document = httpx.get(f"{server.url}/openapi.json").json()
    assert "/v1/chat/completions" in document["paths"]
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "stop", "top_k", "response_format"} <= set(fields)


# --- users ------------------------------------------------------------------------------------


def key_file(place: Path, **users: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Write a key file with `users`; return the header each of them sends."""
    headers, document = {}, {}
    for name, limits in users.items():
        key, key_hash = new_key()
        headers[name] = {"Authorization": f"Bearer {key}"}
        document[name] = {"keys": [key_hash], **limits}
    place.write_text(yaml.safe_dump({"users": document}))
    return headers


def test_routes_that_need_a_key(tmp_path: Path) -> None:
    """With a key file all but the probes need a key; `/metrics` as it is set."""
    file = tmp_path / "keys.yaml"
    keys = key_file(file, alice={})
    for metrics, without, with_key in (("open", 200, 200), ("key", 401, 200), ("off", 401, 404)):
        with running(FakeEngine(PIECES), keys_file=file, metrics=metrics) as server:
            for path, expected in (
                ("/health", 200), ("/ready", 200), ("/metrics", without), ("/version", 401),
                ("/v1/models", 401), ("/openapi.json", 401), ("/nope", 401),
            ):  # fmt: skip
                response = httpx.get(server.url + path)
                assert response.status_code == expected, path
                if expected == 401:
                    assert response.json()["error"]["code"] == "invalid_api_key"
                    assert response.headers["www-authenticate"] == "Bearer"
            assert post(server).status_code == 401
            assert post(server, headers={"Authorization": "Bearer wrong"}).status_code == 401
            assert post(server, headers=keys["alice"]).status_code == 200
            found = httpx.get(f"{server.url}/metrics", headers=keys["alice"])
            assert found.status_code == with_key


def test_the_stock_client_with_a_wrong_key(tmp_path: Path) -> None:
    """OpenAI's client sees its own exception types for 401, 403 and 429."""
    file = tmp_path / "keys.yaml"
    keys = key_file(file, alice={"models": ["synthia-demo-tot"], "requests_per_minute": 2})
    with running(FakeEngine(PIECES), keys_file=file) as server:
        client = server.client
        with pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(**BODY)
        client = client.with_options(api_key=keys["alice"]["Authorization"].split()[1])
        assert [m.id for m in client.models.list().data] == ["synthia-demo-tot"]
        with pytest.raises(openai.PermissionDeniedError) as forbidden:
            client.chat.completions.create(**BODY)
        assert forbidden.value.param == "model"
        client.chat.completions.create(**BODY | {"model": "synthia-demo-tot"})
        with pytest.raises(openai.RateLimitError) as limited:
            client.chat.completions.create(**BODY | {"model": "synthia-demo-tot"})
        assert limited.value.code == "requests_per_minute"
        assert 0 < int(limited.value.response.headers["retry-after"]) <= 30
        assert server.value(
            "synthia_user_refusals_total", user="alice", code="requests_per_minute"
        ) == 1  # fmt: skip


def test_waiting_as_told_is_enough(tmp_path: Path) -> None:
    """A client that waits for as long as `Retry-After` says is served."""
    file = tmp_path / "keys.yaml"
    keys = key_file(file, alice={"requests_per_minute": 20, "tokens_per_minute": 100_000})
    with running(FakeEngine(PIECES), keys_file=file) as server:
        refused = post(server, headers=keys["alice"])
        while refused.status_code == 200:
            refused = post(server, headers=keys["alice"])
        assert refused.status_code == 429
        time.sleep(int(refused.headers["retry-after-ms"]) / 1000)
        served = post(server, headers=keys["alice"])
        assert served.status_code == 200
        assert served.headers["x-ratelimit-limit-requests"] == "20"
        assert served.headers["x-ratelimit-remaining-requests"] == "0"
        assert 0 < float(served.headers["x-ratelimit-reset-requests"].rstrip("s")) <= 60
        assert int(served.headers["x-ratelimit-remaining-tokens"]) > 90_000


def test_limits_of_a_user(tmp_path: Path) -> None:
    """The ceiling of an answer is the default too; more is refused by name; tokens run out."""
    file = tmp_path / "keys.yaml"
    keys = key_file(file, short={"max_tokens": 50}, poor={"tokens_per_minute": 60})
    with running(FakeEngine(PIECES), keys_file=file) as server:
        assert post(server, headers=keys["short"]).status_code == 200
        assert server.engine.seen[-1].sampling.max_tokens == 50  # type: ignore[attr-defined]
        refused = post(server, BODY | {"max_tokens": 51}, headers=keys["short"])
        assert refused.json()["error"]["param"] == "max_tokens"
        small = BODY | {"max_tokens": 10}
        codes = [post(server, small, headers=keys["poor"]).status_code for _ in range(4)]
        assert codes[0] == 200
        assert codes[-1] == 429
        told = post(server, small, headers=keys["poor"])
        assert told.json()["error"]["code"] == "tokens_per_minute"
        tokens = sum(
            server.value("synthia_user_tokens_total", user="poor", kind=kind)
            for kind in ("prompt", "answer")
        )
        assert 0 < tokens <= 60


def test_keys_are_reloaded(tmp_path: Path) -> None:
    """A changed key file is taken over while streams go on; a broken one changes nothing."""
    file = tmp_path / "keys.yaml"
    keys = key_file(file, alice={})
    with running(FakeEngine((" a",) * 400, delay=0.005), keys_file=file) as server:
        with httpx.stream(
            "POST",
            f"{server.url}/v1/chat/completions",
            json=BODY | {"stream": True},
            headers=keys["alice"],
        ) as response:
            lines = response.iter_lines()
            next(lines)
            other = key_file(file, bob={})
            wait_until(
                lambda: (
                    httpx.get(f"{server.url}/v1/models", headers=other["bob"]).status_code == 200
                )
            )
            assert post(server, headers=keys["alice"]).status_code == 401
            assert [line for line in lines if line][-1] == "data: [DONE]"
        file.write_text("users: [")
        wait_until(lambda: server.value("synthia_key_reload_failures_total"))
        assert httpx.get(f"{server.url}/v1/models", headers=other["bob"]).status_code == 200
        server.app.server_state.admission.reload_wanted = True  # as SIGHUP does
        wait_until(lambda: server.value("synthia_key_reload_failures_total") == 2)


def test_priorities_reach_the_engine(tmp_path: Path) -> None:
    """A flood's later requests are stamped behind those of a user who comes after them."""
    file = tmp_path / "keys.yaml"
    keys = key_file(file, flood={}, light={})
    with running(FakeEngine((" a",) * 1000, delay=0.02), keys_file=file) as server:
        with ThreadPoolExecutor(9) as pool:
            for _ in range(8):
                pool.submit(post, server, BODY | {"max_tokens": 100}, headers=keys["flood"])
            wait_until(lambda: len(server.engine.seen) == 8)  # type: ignore[attr-defined]
            pool.submit(post, server, BODY | {"max_tokens": 100}, headers=keys["light"])
            wait_until(lambda: len(server.engine.seen) == 9)  # type: ignore[attr-defined]
        *flood, light = [work.priority for work in server.engine.seen]  # type: ignore[attr-defined]
        assert flood == sorted(flood)
        assert len(set(flood)) == 8
        assert light <= flood[1]


# --- overload, deadlines, stopping ------------------------------------------------------------


def test_a_full_server_says_when_to_come_back() -> None:
    """Beyond `max_requests` there is a 503 at once, before the body is looked at."""
    with running(FakeEngine((" a",) * 1000, delay=0.02), limits={"max_requests": 2}) as server:
        with ThreadPoolExecutor(2) as pool:
            for _ in range(2):
                pool.submit(post, server, BODY | {"max_tokens": 60})
            wait_until(lambda: len(server.engine.seen) == 2)  # type: ignore[attr-defined]
            refused = post(server, content=b"not even JSON")
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "server_full"
            assert int(refused.headers["retry-after"]) >= 1
        assert post(server, BODY | {"max_tokens": 5}).status_code == 200
        route = "/v1/chat/completions"
        assert server.value("synthia_errors_total", code="server_full", route=route) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_deadline(stream: bool) -> None:
    """When the time is up the engine is freed, and the client is told: by a status or an event."""
    with running(FakeEngine((" a",) * 1000, delay=0.02)) as server:
        headers = {"X-Request-Timeout": "0.3", "X-Request-Id": "late"}
        response = post(server, BODY | {"stream": stream}, headers=headers)
        assert response.status_code == (200 if stream else 504)
        error = events(response)[-1]["error"] if stream else response.json()["error"]
        assert error["code"] == "deadline_exceeded"
        assert "0.3 seconds" in error["message"]
        assert server.engine.aborted == ["late"]  # type: ignore[attr-defined]
        for wrong in ("0", "-1", "nan", "soon", ""):
            refused = post(server, headers={"X-Request-Timeout": wrong})
            assert refused.json()["error"]["param"] == "X-Request-Timeout"


def test_the_servers_own_deadline() -> None:
    """Without a header, and for a header that asks for more, the server's limit holds."""
    limits = {"request_seconds": 0.2}
    with running(FakeEngine((" a",) * 1000, delay=0.02), limits=limits) as server:
        assert post(server).status_code == 504
        assert post(server, headers={"X-Request-Timeout": "inf"}).status_code == 504


def test_keepalive_comments() -> None:
    """While the first token is waited for, comments are sent; the events are as without them."""
    with running(FakeEngine(PIECES, delay=0.3), sse_keepalive_seconds=0.05) as server:
        response = post(server, BODY | {"stream": True})
        assert response.text.startswith(": waiting\n\n: waiting\n\n")
        chunks = list(server.client.chat.completions.create(**BODY, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Hello."
    with running(FakeEngine(fault=EngineFault(), delay=0.2), sse_keepalive_seconds=0.05) as server:
        response = post(server, BODY | {"stream": True})
        assert response.status_code == 200
        assert '"code":"engine_fault"' in response.text.split("\n\n")[-2]
    with running(FakeEngine(PIECES, delay=0.01), sse_keepalive_seconds=5) as server:
        assert "waiting" not in post(server, BODY | {"stream": True}).text


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_before_the_first_token(stream: bool) -> None:
    """Also with keep-alive comments, a client that leaves while it waits frees the engine."""
    with running(FakeEngine(PIECES, delay=30), sse_keepalive_seconds=0.05) as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{server.url}/v1/chat/completions",
                json=BODY | {"stream": stream},
                timeout=httpx.Timeout(5, read=0.02 if stream else 0.3),
            ).read()
        wait_until(lambda: server.value("synthia_requests_in_flight") == 0)
        assert len(server.engine.aborted) == 1  # type: ignore[attr-defined]


def test_leaving() -> None:
    """SIGTERM with a delay: not ready, yet answering, each answer closing its connection."""
    with (
        running(FakeEngine(PIECES), shutdown_delay_seconds=1) as server,
        httpx.Client() as client,
    ):
        url = f"{server.url}/v1/chat/completions"
        assert "connection" not in client.post(url, json=BODY).headers
        server.server.handle_exit(signal.SIGTERM, None)
        assert httpx.get(f"{server.url}/ready").status_code == 503
        assert httpx.get(f"{server.url}/health").status_code == 200
        for stream in (False, True):
            answer = client.post(url, json=BODY | {"stream": stream})
            assert answer.status_code == 200
            assert answer.headers["connection"] == "close"
        wait_until(lambda: server.app.server_state.phase == "draining")


def test_the_end_of_the_grace_time_is_told() -> None:
    """SIGTERM: what is not finished in time gets an error event or a 503, not a broken pipe."""
    engine = FakeEngine((" a",) * 1000, delay=0.02)
    with running(engine, shutdown_grace_seconds=0.3) as server, ThreadPoolExecutor(2) as pool:
        streamed = pool.submit(post, server, BODY | {"stream": True})
        plain = pool.submit(post, server)
        wait_until(lambda: len(engine.seen) == 2)
        server.server.handle_exit(signal.SIGTERM, None)
        refused = post(server)
        assert refused.status_code == 503
        assert refused.headers["connection"] == "close"
        assert refused.headers["retry-after"]
        assert events(streamed.result())[-1]["error"]["code"] == "draining"
        assert plain.result().status_code == 503
        assert plain.result().json()["error"]["code"] == "draining"
    assert len(engine.aborted) == 2


def test_transcripts(tmp_path: Path) -> None:
    """Whole answers are kept, a file a user, as the card keeps them; a cut one is not."""
    file = tmp_path / "keys.yaml"
    keys = key_file(file, alice={}, bob={})
    place = tmp_path / "transcripts"
    with running(FakeEngine(PIECES), keys_file=file, transcripts={"directory": place}) as server:
        for stream in (False, True):
            assert post(server, BODY | {"stream": stream}, headers=keys["alice"]).status_code == 200
        post(server, BODY | {"n": 2}, headers=keys["bob"])
        post(server, BODY | {"n": 99}, headers=keys["bob"])
        wait_until(lambda: server.value("synthia_transcript_lines_total") == 4)
    line = {"prompt": "Hi", "answer": "Hello."}
    for name in ("alice", "bob"):
        found = (place / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(text) for text in found] == [line, line]


def test_transcripts_that_cannot_be_written(tmp_path: Path) -> None:
    """Answers go on when transcripts cannot be kept, and the loss is counted."""
    place = tmp_path / "transcripts"
    with running(FakeEngine(PIECES), transcripts={"directory": place}) as server:
        (place / "anonymous.jsonl").mkdir()  # whatever is in the way of writing
        assert post(server).status_code == 200
        wait_until(lambda: server.value("synthia_transcript_failures_total") == 1)
        assert post(server).status_code == 200


def test_logs_say_who_and_how_much(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A line a request, with id, user, counts and times; the texts only if they are asked for."""
    caplog.set_level("INFO")
    file = tmp_path / "keys.yaml"
    keys = key_file(file, alice={})
    for content in (False, True):
        caplog.clear()
        with running(FakeEngine(PIECES), keys_file=file, log_content=content) as server:
            usage = post(server, headers=keys["alice"] | {"X-Request-Id": "r1"}).json()["usage"]
            post(server)
            post(server, {**BODY, "stream": True}, headers=keys["alice"])
        [answered, refused, streamed] = [
            vars(r)["fields"] for r in caplog.records if r.getMessage() == "chat"
        ]
        assert answered["id"] == "r1"
        assert (answered["user"], answered["status"]) == ("alice", 200)
        assert answered["prompt_tokens"] == usage["prompt_tokens"]
        assert answered["answer_tokens"] == usage["completion_tokens"]
        assert answered["first_token_ms"] is None  # a plain answer has no first token
        assert 0 <= streamed["first_token_ms"] <= streamed["total_ms"]
        assert answered["finish"] == "stop"
        assert ("Hello." in answered.get("answers", [])) == content
        assert ("Hi" in answered.get("prompt", "")) == content
        assert (refused["user"], refused["status"]) == ("-", 401)
        assert keys["alice"]["Authorization"].split()[1] not in caplog.text


def test_refused_bodies_leave_no_memory_behind(server: Running) -> None:
    """A refused request is gone with its answer: no cycle keeps its body for the collector."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    body = b'{"model":"x","messages":[' + b",".join([b"{}"] * 150_000) + b"]}"
    headers = {"Content-Type": "application/json"}
    gc.disable()
    try:
        for number in range(40):
            if number == 10:
                before = resident()
            assert post(server, content=body, headers=headers).status_code == 400
        assert resident() - before < 100_000_000  # it was 10 MB each
    finally:
        gc.enable()
