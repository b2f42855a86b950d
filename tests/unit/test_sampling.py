"""What reaches the engine of a request: sampling, stops, grammars."""

from __future__ import annotations

import json

import httpx
import pytest
from chat_api import BODY, events, post
from serving import Running, running

from synthia_vllm.engine.fake import FakeEngine


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
