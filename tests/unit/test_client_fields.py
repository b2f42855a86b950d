"""What clients send beside what they mean: honoured, refused by name, or let pass and said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from serving import Running, running

from synthia_vllm.engine.fake import FakeEngine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from synthia_vllm.engine.base import Sampling

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "Hi"}
BODIES = json.loads((Path(__file__).parents[1] / "data" / "client_bodies.json").read_text())


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(FakeEngine((" Hello", ".", "\nUSER:"))) as here:
        yield here


def post(server: Running, body: dict[str, Any], path: str = CHAT) -> httpx.Response:
    basis = {"messages": [USER]} if "chat" in path else {"prompt": "Hi", "max_tokens": 99}
    return httpx.post(f"{server.url}{path}", json={"model": "synthia-demo"} | basis | body)


def sampling(server: Running) -> Sampling:
    """Of the request before."""
    assert isinstance(server.engine, FakeEngine)
    return server.engine.seen[-1].sampling


@pytest.mark.parametrize("client", BODIES, ids=lambda client: client["client"])
def test_bodies_of_real_clients(server: Running, client: dict[str, Any]) -> None:
    """Each body is answered, and what of it changed nothing is named."""
    response = post(server, client["body"], client["path"])
    assert response.status_code == 200, response.text
    assert response.headers.get("x-synthia-ignored", "") == client["ignored"]


@pytest.mark.parametrize("client", BODIES, ids=lambda client: client["client"])
def test_tools_of_real_clients_are_refused_by_name(server: Running, client: dict[str, Any]) -> None:
    """With tools to choose from in it, the same body is a 400 that says what is not to be had."""
    tools = [{"type": "function", "function": {"name": "now", "parameters": {}}}]
    body = client["body"] | {"tools": tools, "tool_choice": "auto"}
    error = post(server, body, client["path"]).json()["error"]
    assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")


def test_what_is_ignored_is_said(server: Running) -> None:
    """A field that is not known is named in a header and counted by a name from a closed set."""
    body = {
        "chat_id": 1,
        "frobnicate": {"a": 1},
        "bad name\r\n": 1,
        "messages": [USER | {"id": "a", "name": "Ann"}, USER | {"id": "b"}],
        "stream_options": {"include_usage": True, "x": 1},
        "nothing": None,
    }
    for stream in (False, True):
        before = {
            name: server.value("synthia_ignored_fields_total", field=name)
            for name in ("chat_id", "id", "other")
        }
        options = {} if stream else {"stream_options": None}
        response = post(server, body | {"stream": stream} | options)
        assert response.status_code == 200, response.text
        expected = ["chat_id", "frobnicate", "bad?name??", "messages[].id", "messages[].name"]
        told = response.headers["x-synthia-ignored"].split(", ")
        assert sorted(told) == sorted([*expected, *(["stream_options.x"] if stream else [])])
        gone = {
            name: server.value("synthia_ignored_fields_total", field=name) - count
            for name, count in before.items()
        }
        assert gone == {"chat_id": 1, "id": 1, "other": 3 if stream else 2}
    assert "x-synthia-ignored" not in post(server, {}).headers


def test_a_hundred_thousand_fields_are_said_in_short(server: Running) -> None:
    """Whatever is sent, the header stays short, and what must not be ignored is still refused."""
    many = {f"k{number}": 1 for number in range(30_000)}
    response = post(server, many)
    assert response.status_code == 200
    assert response.headers["x-synthia-ignored"].endswith("k15, ...")
    assert post(server, many | {"functions": [1]}).json()["error"]["param"] == "functions"


def test_unknown_fields_can_be_refused() -> None:
    """`unknown_fields: refuse`: the first of them is a 400, as null it still asks for nothing."""
    with running(FakeEngine(), unknown_fields="refuse") as here:
        for body, param in (
            ({"frobnicate": 1}, "frobnicate"),
            ({"store": True}, "store"),
            ({"messages": [USER, USER | {"id": "a"}]}, "messages[1].id"),
        ):
            response = post(here, body)
            assert response.status_code == 400
            assert response.json()["error"]["param"] == param
        assert post(here, {"frobnicate": None, "tools": []}).status_code == 200
        response = httpx.post(f"{here.url}/tokenize", json={"prompt": "a", "x": 1})
        assert response.json()["error"]["param"] == "x"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_what_vllm_knows_reaches_the_engine(server: Running, path: str) -> None:
    """Fields of vLLM's own server, on both routes."""
    body = {
        "stop_token_ids": [5, 6],
        "bad_words": ["orca"],
        "allowed_token_ids": [7, 8],
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "repetition_detection": {"max_pattern_size": 4, "min_count": 3},
        "stream_interval": 4,
        "repeat_penalty": 1.25,
        "length_penalty": 1,
        "use_beam_search": False,
        "cache_salt": "a",
        "n": 2.0,
        "min_tokens": 1.0,
        "top_k": 7.0,
        "seed": 3.0,
        "stop": [f"stop {number}" for number in range(40)],
    }
    assert post(server, body, path).status_code == 200
    found = sampling(server)
    assert found.stop_token_ids == (5, 6)
    assert found.bad_words == ("orca",)
    assert found.allowed_token_ids == (7, 8)
    assert not found.skip_special_tokens
    assert not found.spaces_between_special_tokens
    assert found.repetition == (4, 1, 3)
    assert found.stream_interval == 4
    assert found.repetition_penalty == 1.25
    assert (found.n, found.min_tokens, found.top_k, found.seed) == (2, 1, 7, 3)
    assert all(type(value) is int for value in (found.n, found.top_k, found.seed))
    assert len(found.stop) >= 40


def test_null_asks_for_nothing_everywhere(server: Running) -> None:
    """At every level."""
    body: dict[str, Any] = {
        "stream_options": None, "stop": None, "n": None, "response_format": None,
        "logit_bias": None, "tools": None, "unknown": None, "structured_outputs": None,
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": None}]},
            {"role": "assistant", "content": None, "refusal": None, "audio": None,
             "function_call": None, "tool_calls": None, "annotations": None},
            {"role": "user", "content": "b", "name": None},
        ],
    }  # fmt: skip
    response = post(server, body)
    assert response.status_code == 200, response.text
    assert "x-synthia-ignored" not in response.headers
    body = {"stream": True, "stream_options": {"include_usage": None}}
    assert '"usage"' not in post(server, body).text
    body = {"response_format": {"type": "json_schema", "json_schema": {
        "name": None, "schema": None, "strict": None, "description": None}}}  # fmt: skip
    assert post(server, body).status_code == 200


def test_a_byte_order_mark_is_passed_over(server: Running) -> None:
    """Some editors and languages write one."""
    body = json.dumps({"model": "synthia-demo", "messages": [USER]})
    response = httpx.post(
        f"{server.url}{CHAT}",
        content=b"\xef\xbb\xbf" + body.encode(),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 200


def test_greedy_choices_are_equal(server: Running) -> None:
    """`n` above 1 at temperature 0 samples only the likeliest token."""
    assert len(post(server, {"n": 3, "temperature": 0}).json()["choices"]) == 3
    found = sampling(server)
    assert (found.n, found.top_k) == (3, 1)
    assert found.temperature > 0


@pytest.mark.parametrize(("seed", "n"), [(-1, 1), (-3, 4), (-1, 3)])
def test_no_answer_has_vllms_seed_of_none(server: Running, seed: int, n: int) -> None:
    """-1 means none to vLLM: no answer of the request gets it, and the same one gets the same."""
    found = set()
    for _ in range(2):
        post(server, {"seed": seed, "n": n})
        used = sampling(server).seed
        assert used is not None
        assert -1 not in range(used, used + n)
        found.add(used)
    assert len(found) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text", "found"),
    [
        (" ", "Hello", " "),
        ("\n", "Hello there", "\n"),
        (["\n\n", "!"], "Hello there\nUS", "!"),
        (["\t"], "Hello there\nUS!", "USER:"),
    ],
)
def test_blank_stops_leave_the_front_alone(stream: bool, stop: Any, text: str, found: str) -> None:
    """White space in front of an answer is no part of it, and so ends none."""
    with running(FakeEngine((" \n Hel", "lo there", "\nUS", "! ", "USER", ": more"))) as here:
        response = post(here, {"stop": stop, "stream": stream})
        if stream:
            events = [json.loads(line[6:]) for line in response.text.split("\n\n")[:-2]]
            choices = [event["choices"][0] for event in events]
            assert "".join(choice["delta"].get("content", "") for choice in choices) == text
            assert choices[-1]["stop_reason"] == found
        else:
            [choice] = response.json()["choices"]
            assert choice["message"]["content"] == text
            assert choice["stop_reason"] == found


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_token_ids_are_shown_on_request(server: Running, path: str) -> None:
    """`return_token_ids`: the prompt's once, the answer's all, streamed as plain."""
    plain = post(server, {"return_token_ids": True}, path).json()
    [choice] = plain["choices"]
    prompt = plain["prompt_token_ids"] if path == CHAT else choice["prompt_token_ids"]
    assert prompt == server.engine.seen[-1].prompt_token_ids  # type: ignore[attr-defined]
    assert len(choice["token_ids"]) == plain["usage"]["completion_tokens"]
    text = post(server, {"return_token_ids": True, "stream": True}, path).text
    events = [json.loads(line[6:]) for line in text.split("\n\n")[:-2]]
    shown = [event["choices"][0]["token_ids"] for event in events]
    assert [token for ids in shown for token in ids] == choice["token_ids"]
    places = events if path == CHAT else [event["choices"][0] for event in events]
    assert [place.get("prompt_token_ids") for place in places] == [prompt] + [None] * (
        len(events) - 1
    )
    for more in ({}, {"stream": True}):
        assert "token_ids" not in post(server, more, path).text


def test_prompt_logprobs_in_vllms_form(server: Running) -> None:
    """Null for the first token, then a mapping for each, with rank and text."""
    [choice] = post(server, {"prompt": "ab", "prompt_logprobs": 1}, COMPLETIONS).json()["choices"]
    first, a, b = choice["prompt_logprobs"]
    assert first is None
    assert [next(iter(place.values()))["decoded_token"] for place in (a, b)] == ["a", "b"]
    assert choice["logprobs"] is None


def test_a_prompt_can_be_cut_to_its_last_tokens(server: Running) -> None:
    """`truncate_prompt_tokens` keeps so many; -1 as many as there is room for."""
    seen = server.engine.seen  # type: ignore[attr-defined]
    assert post(server, {"truncate_prompt_tokens": 3}, COMPLETIONS).status_code == 200
    assert len(seen[-1].prompt_token_ids) == 3
    long = {"prompt": "x" * 5000, "truncate_prompt_tokens": -1, "max_tokens": 10}
    assert post(server, long, COMPLETIONS).status_code == 200
    assert len(seen[-1].prompt_token_ids) == 2048 - 10


def test_completions_can_keep_the_stop(server: Running) -> None:
    """`include_stop_str_in_output`, where there are no turns."""
    for keep, text in ((False, " Hello."), (True, " Hello.\nUSER:")):
        body = {"stop": ["\nUSER:"], "include_stop_str_in_output": keep}
        assert post(server, body, COMPLETIONS).json()["choices"][0]["text"] == text
