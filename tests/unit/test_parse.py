"""Bodies that are refused, and what the refusal says."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from chat_api import BODY, USER, post

if TYPE_CHECKING:
    from serving import Running


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"model": "gpt-4"}, "model", "synthia-demo-tot"),
        ({"tools": [{"type": "function"}]}, "tools", "not trained to call tools"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role", "tools"),
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
            "messages[1].tool_calls[0].type",
            "required",
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
