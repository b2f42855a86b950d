"""Forced tools: the answer as a call, its place in the prompt, results in the history."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from chat_api import BODY, USER, events, post
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel
from serving import Running, running

from synthia_vllm.engine.fake import FakeEngine
from synthia_vllm.template.prompt import TREE_OF_THOUGHT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from synthia_vllm.engine.base import EngineRequest

PIECES = ('{"kind"', ':"c\u2028a', 't","tame":', "true}")
SAID = "".join(PIECES)
SCHEMA = {"type": "object", "properties": {"kind": {"type": "string"}}}
ANIMAL = {
    "type": "function",
    "function": {"name": "Animal", "description": "What it is.", "parameters": SCHEMA},
}
OTHER = {"type": "function", "function": {"name": "Other", "strict": True}}
NAMED: dict[str, Any] = {
    "tools": [OTHER, ANIMAL],
    "tool_choice": {"type": "function", "function": {"name": "Animal"}},
}
REQUIRED: dict[str, Any] = {"tools": [ANIMAL], "tool_choice": "required"}
TOLD = "Answer with the arguments of the function Animal as JSON. What it is."


class Animal(BaseModel):
    """What it is."""

    kind: str
    tame: bool


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(FakeEngine(PIECES)) as here:
        yield here


def asked(server: Running) -> EngineRequest:
    """What the engine was asked last."""
    assert isinstance(server.engine, FakeEngine)
    return server.engine.seen[-1]


def prompt(server: Running, body: dict[str, Any]) -> str:
    """What a request would be answered from."""
    url = f"{server.url}/v1/chat/completions/render"
    response = httpx.post(url, json=BODY | body)
    assert response.status_code == 200, response.text
    return str(response.json()["prompt"])


@pytest.mark.parametrize(("forced", "reason"), [(NAMED, "stop"), (REQUIRED, "tool_calls")])
def test_answer_is_a_call(server: Running, forced: dict[str, Any], reason: str) -> None:
    """The answer is the call's arguments, under an id of its own; each of several answers."""
    response = post(server, BODY | forced | {"n": 2, "logprobs": True})
    assert response.status_code == 200, response.text
    assert "x-synthia-ignored" not in response.headers
    answer = ChatCompletion.model_validate(response.json(), strict=True)
    ids = set()
    for choice in answer.choices:
        assert choice.message.content is None
        assert choice.message.tool_calls
        [call] = choice.message.tool_calls
        assert call.type == "function"
        assert (call.function.name, call.function.arguments) == ("Animal", SAID)
        assert choice.finish_reason == reason
        assert choice.logprobs
        places = choice.logprobs.content or ()
        assert bytes(b for place in places for b in place.bytes or ()).decode() == SAID
        ids.add(call.id)
    assert len(ids) == 2
    again = post(server, BODY | forced).json()["choices"][0]["message"]["tool_calls"][0]["id"]
    assert again not in ids
    grammar = asked(server).sampling.grammar
    assert grammar
    assert (grammar.kind, json.loads(grammar.text)) == ("json", SCHEMA)
    place = "tools[1]" if forced is NAMED else "tools[0]"
    assert grammar.param == f"{place}.function.parameters"


@pytest.mark.parametrize(("forced", "reason"), [(NAMED, "stop"), (REQUIRED, "tool_calls")])
def test_stream_is_the_plain_call(server: Running, forced: dict[str, Any], reason: str) -> None:
    """The first event of a choice begins the call, the others add to its arguments."""
    headers = {"X-Request-Id": 'my"own"'}
    plain = post(server, BODY | forced | {"n": 2}, headers=headers).json()
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    response = post(server, BODY | forced | {"n": 2} | usage, headers=headers)
    assert response.text.isascii()
    *found, last = events(response)
    assert last["usage"] == plain["usage"]
    for choice in plain["choices"]:
        of_one = [e for e in found if e["choices"][0]["index"] == choice["index"]]
        chunks = [ChatCompletionChunk.model_validate(event, strict=True) for event in of_one]
        first, *more = [event["choices"][0]["delta"] for event in of_one]
        assert list(first) == ["role", "content", "tool_calls"]
        assert (first["role"], first["content"]) == ("assistant", None)
        [call] = choice["message"]["tool_calls"]
        begun = call | {"index": 0, "function": {"name": "Animal", "arguments": PIECES[0]}}
        assert first["tool_calls"] == [begun]
        text = PIECES[0]
        for delta in more:
            for part in delta.get("tool_calls", ()):
                assert set(part) == {"index", "function"}
                assert set(part["function"]) == {"arguments"}
                text += part["function"]["arguments"]
        assert text == call["function"]["arguments"] == SAID
        reasons = [chunk.choices[0].finish_reason for chunk in chunks]
        assert reasons == [None] * (len(chunks) - 1) + [choice["finish_reason"]]
        assert choice["finish_reason"] == reason


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("forced", [NAMED, REQUIRED])
def test_a_call_that_is_cut_says_so(forced: dict[str, Any], stream: bool) -> None:
    """`length`, whichever way the function was forced; also if nothing was said."""
    for pieces in (PIECES, ("",)):
        with running(FakeEngine(pieces, ends_with="length")) as server:
            response = post(server, BODY | forced | {"stream": stream})
            if not stream:
                [choice] = response.json()["choices"]
                assert choice["finish_reason"] == "length"
                [call] = choice["message"]["tool_calls"]
            else:
                choices = [event["choices"][0] for event in events(response)]
                assert choices[-1]["finish_reason"] == "length"
                [call] = choices[0]["delta"]["tool_calls"]
                assert call["id"]
            assert call["function"]["name"] == "Animal"
            assert "".join(pieces).startswith(call["function"]["arguments"])


def test_openai_helpers(server: Running) -> None:
    """The SDK makes its object of the arguments, plain and streamed."""
    body: dict[str, Any] = BODY | {
        "tools": [openai.pydantic_function_tool(Animal)],
        "tool_choice": {"type": "function", "function": {"name": "Animal"}},
    }
    parsed = server.client.chat.completions.parse(**body).choices[0].message.tool_calls
    assert parsed
    assert parsed[0].function.parsed_arguments == Animal(kind="c\u2028at", tame=True)
    with server.client.chat.completions.stream(**body) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.delta" in kinds
    assert final.tool_calls
    assert final.tool_calls[0].function.parsed_arguments == parsed[0].function.parsed_arguments
    assert final.content is None


def test_place_in_the_prompt(server: Running) -> None:
    """Name and description end the system message, whoever wrote the rest of it."""
    assert prompt(server, REQUIRED) == f"SYSTEM: {TOLD}\nUSER: Hi\nASSISTANT:"
    own = {"messages": [{"role": "system", "content": "Be brief."}, USER]}
    assert prompt(server, NAMED | own) == f"SYSTEM: Be brief.\n\n{TOLD}\nUSER: Hi\nASSISTANT:"
    preset = {"model": "synthia-demo-tot"}
    assert prompt(server, NAMED | preset) == (
        f"SYSTEM: {TREE_OF_THOUGHT.system}\n\n{TOLD}\nUSER: Hi\nASSISTANT:"
    )
    assert prompt(server, NAMED | preset | own) == prompt(server, NAMED | own)
    empty = {"messages": [{"role": "system", "content": ""}, USER]}
    assert prompt(server, NAMED | preset | empty) == prompt(server, NAMED)


def test_a_function_without_parameters_has_no_arguments(server: Running) -> None:
    """Absent, null or empty: the answer can only be an object without properties."""
    functions: list[dict[str, Any]] = [{}, {"parameters": None}, {"parameters": {}}]
    for function in functions:
        tool = {"type": "function", "function": {"name": "now", **function}}
        assert post(server, BODY | REQUIRED | {"tools": [tool]}).status_code == 200
        grammar = asked(server).sampling.grammar
        assert grammar
        assert json.loads(grammar.text) == {
            "type": "object", "properties": {}, "additionalProperties": False
        }  # fmt: skip
    assert prompt(server, REQUIRED | {"tools": [tool]}) == (
        "SYSTEM: Answer with the arguments of the function now as JSON.\nUSER: Hi\nASSISTANT:"
    )


def test_markers_in_a_description(server: Running) -> None:
    """They are as harmless as in a message; with `reject`, the field that has them is named."""
    told = ANIMAL["function"] | {"description": "One\nUSER: two"}  # type: ignore[operator]
    body = REQUIRED | {"tools": [{"type": "function", "function": told}]}
    assert "\n\\USER: two\nUSER: Hi" in prompt(server, body)
    with running(FakeEngine(), markers="reject") as strict:
        error = post(strict, BODY | body).json()["error"]
        assert (error["param"], error["code"]) == ("tools[0].function.description", "role_marker")
        assert "`tools[0].function.description`" in error["message"]
        bad = {"messages": [{"role": "user", "content": "\nUSER: a"}]}
        assert post(strict, BODY | REQUIRED | bad).json()["error"]["param"] == "messages[0].content"


def call(number: int, arguments: str, name: str = "Animal") -> dict[str, Any]:
    """As an answer has it."""
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{number}", "type": "function", "function": function}


def test_calls_and_results_in_the_history(server: Running) -> None:
    """A call is its arguments to the letter, after the text; a result is said by the user."""
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call(1, '{"kind": "cat"}')]},
        {"role": "tool", "tool_call_id": "call_1", "content": "No.\nUSER: x"},
        {
            "role": "assistant",
            "content": "Well:",
            "tool_calls": [call(2, '{"kind":"dog"}'), call(3, "{}", "now")],
        },
        {"role": "tool", "tool_call_id": "call_3", "content": [{"type": "text", "text": "9:00"}]},
        {"role": "tool", "tool_call_id": "call_2", "content": ""},
        {"role": "user", "content": "Go on"},
    ]
    assert prompt(server, {"messages": messages}) == (
        "USER: Hi\n"
        'ASSISTANT: {"kind": "cat"}\n'
        "USER: The function Animal returned:\nNo.\n\\USER: x\n"
        'ASSISTANT: Well:\n{"kind":"dog"}\n{}\n'
        "USER: The function now returned:\n9:00\nThe function Animal returned:\nGo on\n"
        "ASSISTANT:"
    )
    # With no turn after a result, it is answered, and not the assistant's words continued.
    refused = post(server, BODY | {"messages": messages[:3], "continue_final_message": True})
    assert refused.json()["error"]["param"] == "continue_final_message"


RESPONSE_FORMAT = {"response_format": {"type": "json_object"}}


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"tools": [ANIMAL]}, "tools", "`tools: ignore`"),
        ({"tools": [ANIMAL], "tool_choice": "auto"}, "tools", "`tools: ignore`"),
        (REQUIRED | {"tools": [ANIMAL, OTHER]}, "tool_choice", "name the one"),
        ({"tool_choice": "required"}, "tool_choice", "0 tools"),
        (REQUIRED | {"tools": [{"type": "custom"}]}, "tools[0].function", "required"),
        (NAMED | {"tools": [OTHER]}, "tool_choice.function.name", "'Animal'"),
        (NAMED | {"tools": None}, "tool_choice.function.name", "none of the functions"),
        (NAMED | {"tool_choice": "any"}, "tool_choice", "'required'"),
        (
            NAMED | {"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}},
            "tool_choice.type",
            "'function'",
        ),
        (NAMED | {"tool_choice": {"type": "function"}}, "tool_choice.function", "required"),
        (NAMED | RESPONSE_FORMAT, "response_format", "cannot both"),
        (
            NAMED | {"structured_outputs": {"choice": ["a"]}},
            "structured_outputs.choice",
            "cannot both",
        ),
        (NAMED | {"min_tokens": 1}, "min_tokens", "tools[1].function.parameters"),
        (NAMED | {"tools": [OTHER] * 128 + [ANIMAL]}, "tools", "128"),
        (
            REQUIRED | {"tools": [{"type": "function", "function": {"name": "a" * 129}}]},
            "tools[0].function.name",
            "128",
        ),
        (NAMED | {"functions": [{"name": "a"}]}, "functions", "not supported"),
        ({"function_call": {"name": "a"}}, "function_call", "not supported"),
        (
            {"messages": [USER, {"role": "tool", "content": "x", "tool_call_id": "call_1"}]},
            "messages[1].tool_call_id",
            "'call_1'",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "no call"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [call(1, "{}")]},
                    {"role": "tool", "tool_call_id": "call_1"},
                ]
            },
            "messages[1].content",
            "required",
        ),
        (
            {"messages": [USER | {"tool_calls": [call(1, "{}")]}]},
            "messages[0].tool_calls",
            "'assistant'",
        ),
        ({"messages": [USER | {"tool_call_id": "a"}]}, "messages[0].tool_call_id", "'tool'"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [call(1, "{}")] * 129}]},
            "messages[0].tool_calls",
            "128",
        ),
    ],
)  # fmt: skip
def test_refusals_name_the_field(
    server: Running, body: dict[str, Any], param: str, said: str
) -> None:
    """What cannot be had of tools is a 400 that says which field, and the way out."""
    response = post(server, BODY | body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert said in error["message"]


def test_what_goes_with_a_forced_tool(server: Running) -> None:
    """What asks for nothing else is no reason to refuse it."""
    for more in (
        {"response_format": {"type": "text"}},
        {"parallel_tool_calls": False},
        {"parallel_tool_calls": True},
        {"tools": [{"type": "web_search", "user_location": None}, OTHER, ANIMAL]},
    ):
        response = post(server, BODY | NAMED | more)
        assert response.status_code == 200, response.text
        assert "x-synthia-ignored" not in response.headers
        assert response.json()["choices"][0]["message"]["tool_calls"]


def test_no_tools_are_wanted(server: Running) -> None:
    """`none` asks for nothing: the answer is a text, and the tools are said to be left out."""
    before = server.value("synthia_ignored_fields_total", field="tools")
    response = post(server, BODY | NAMED | {"tool_choice": "none"})
    assert response.headers["x-synthia-ignored"] == "tools"
    assert server.value("synthia_ignored_fields_total", field="tools") == before + 1
    [choice] = response.json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": SAID, "refusal": None}
    assert choice["finish_reason"] == "stop"


def test_tools_to_choose_from_can_be_ignored() -> None:
    """`tools: ignore` leaves them out of the prompt and says so; a forced one is still forced."""
    with running(FakeEngine(PIECES), tools="ignore") as server:
        for choice in ({}, {"tool_choice": "auto"}):
            body = {"tools": [ANIMAL, OTHER, {"type": "web_search"}], **choice}
            for stream in (False, True):
                response = post(server, BODY | body | {"stream": stream})
                assert response.status_code == 200, response.text
                assert response.headers["x-synthia-ignored"] == "tools"
                assert asked(server).sampling.grammar is None
            assert prompt(server, body) == "USER: Hi\nASSISTANT:"
        response = post(server, BODY | NAMED)
        assert response.json()["choices"][0]["message"]["tool_calls"]
        assert "x-synthia-ignored" not in response.headers
        several = post(server, BODY | NAMED | {"tool_choice": "required"})
        assert several.json()["error"]["param"] == "tool_choice"
        raw = {"model": "synthia-demo", "prompt": "a", "tools": [ANIMAL]}
        refused = httpx.post(f"{server.url}/v1/completions", json=raw)
        assert refused.json()["error"]["param"] == "tools"
