"""Structured outputs on the real engine: whole, exact, and nobody else's trouble."""

from __future__ import annotations

import asyncio
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from synthia_vllm.engine.base import Grammar
from synthia_vllm.engine.grammar_checker import GrammarChecker
from synthia_vllm.engine.vllm import watchdog
from synthia_vllm.engine.vllm.options import check_options
from synthia_vllm.errors import InvalidRequest

if TYPE_CHECKING:
    from pathlib import Path

    from serving import Running

BODY: dict[str, Any] = {
    "model": "synthia-demo",
    "messages": [{"role": "user", "content": "What is a token?"}],
    "max_tokens": 60,
}
SMALL = {
    "type": "object",
    "properties": {
        "said": {"enum": ["yes", "USER: hello", "no"]},
        "sure": {"type": "boolean"},
        "digit": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["said", "sure", "digit"],
    "additionalProperties": False,
}


def asked(schema: Any, **more: Any) -> dict[str, Any]:
    """A chat request whose answer shall be of `schema`."""
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return BODY | {"response_format": wanted} | more


def post(live: Running, body: dict[str, Any], path: str = "/v1/chat/completions") -> httpx.Response:
    return httpx.post(f"{live.url}{path}", json=body, timeout=60)


def test_answers_of_a_bounded_schema_end_and_parse(live: Running) -> None:
    """At temperature 1 every one of 64 answers is whole, of the schema, and nothing follows it."""
    for number in range(4):
        response = post(live, asked(SMALL, temperature=1, n=16, ignore_eos=number % 2 == 0))
        for choice in response.json()["choices"]:
            assert choice["finish_reason"] == "stop"
            found = json.loads(choice["message"]["content"])
            assert list(found) == ["said", "sure", "digit"]
            assert found["said"] in SMALL["properties"]["said"]["enum"]  # type: ignore[index]
            assert choice["message"]["content"] == json.dumps(found, separators=(",", ":"))


def test_streamed_is_plain(live: Running) -> None:
    """A marker in a JSON text cuts neither; greedy, both are the same to the byte."""
    schema = {"enum": [{"a": "USER: hello"}]}
    body = asked(schema, temperature=0)
    plain = post(live, body).json()["choices"][0]["message"]["content"]
    assert plain == '{"a":"USER: hello"}'
    with live.client.chat.completions.create(**body, stream=True) as stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == plain


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    ("own", "answers"),
    [
        ({"regex": "(yes|no), USER: [0-3]\n"}, {f"{a}, USER: {n}\n" for a in ("yes", "no")
                                                for n in range(4)}),
        ({"choice": ["red", " blue"]}, {"red", " blue"}),
        ({"grammar": 'start: "ab" ("!" | "?")'}, {"ab!", "ab?"}),
        ({"grammar": 'root ::= "yes" | "no"'}, {"yes", "no"}),
        ({"json": {"enum": [1, None]}}, {"1", "null"}),
    ],
)  # fmt: skip
def test_other_grammars(live: Running, path: str, own: Any, answers: set[str]) -> None:
    """vLLM's field rules chat and raw completions; the answer is one of those that it admits."""
    body = BODY if "chat" in path else {"model": "synthia-demo", "prompt": "Say", "max_tokens": 60}
    [choice] = post(live, body | {"structured_outputs": own}, path).json()["choices"]
    assert (choice["message"]["content"] if "chat" in path else choice["text"]) in answers
    assert choice["finish_reason"] == "stop"


def test_any_object(live: Running) -> None:
    """`json_object` begins one, and has no white space to lose itself in."""
    body = BODY | {"response_format": {"type": "json_object"}, "temperature": 0}
    content = post(live, body).json()["choices"][0]["message"]["content"]
    assert content.startswith("{")
    assert not content[1:2].isspace()


COSTLY: list[Grammar] = [
    Grammar("json", '{"type":"string","pattern":"(.*a.{10}){10}"}', "x"),
    Grammar("json", '{"type":"string","pattern":"^(\\\\w*[aeiou]\\\\w{15})*$"}', "x"),
    Grammar("regex", "(.|\n)*[a-m](.|\n){18}", "x"),
    Grammar("regex", ".*" * 2000, "x"),
    Grammar("grammar", "start: " + "a? " * 400 + "\na: /[a-z]/ | /[a-z][a-z]/", "x"),
    Grammar("grammar", 'start: s\ns: s s s | s s | /[a-z]/ | /[a-z][a-z]/ | s "x" s', "x"),
    Grammar("json", json.dumps({"properties": {f"p{i}": {} for i in range(3000)}}), "x"),
]


@pytest.mark.parametrize("grammar", COSTLY, ids=range(len(COSTLY)))
def test_what_costs_too_much_is_refused(demo: Path, grammar: Grammar) -> None:
    """With the model's own tokens, what runs into the bounds at once is a 400."""

    async def ask() -> None:
        checker = GrammarChecker((demo / "tokenizer.json").read_text(), 32_000, 2)
        try:
            await checker.check(grammar, 0)
        finally:
            await checker.close()

    with pytest.raises(InvalidRequest):
        asyncio.run(ask())


def test_a_grammar_at_its_limits_is_the_clients_error(live: Running) -> None:
    """Where the engine finds a grammar too costly half-way, the answer is not taken for complete.

    The cost comes after a thousand characters, which the check in advance does not reach.
    """
    pattern = "[a-z]{1000}" + "(.|\n)*[a-m](.|\n){18}"
    body = BODY | {"structured_outputs": {"regex": pattern}, "max_tokens": 1000}
    response = post(live, body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == "grammar_too_complex"
    assert "grammar_too_complex" in post(live, body | {"stream": True}).text


def test_vllm_checks_no_grammar_in_the_servers_process(
    live: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names by which it is told not to are there, and the engine's backend is ours."""
    from vllm.v1.engine import core

    assert live.engine._llm.input_processor.structured_outputs_config is None  # type: ignore[attr-defined]
    # Loaded as vLLM loads it into the engine core; into this process it may have done so before
    # there was a server, for another test.
    monkeypatch.setenv(watchdog.SERVER, str(os.getpid()))
    monkeypatch.setattr(core, "StructuredOutputManager", core.StructuredOutputManager)
    plugins = metadata.entry_points(group="vllm.general_plugins")
    plugins["synthia-vllm-grammars"].load()()
    assert core.StructuredOutputManager.__module__ == "synthia_vllm.engine.vllm.grammar"
    with pytest.raises(Exception, match="structured_outputs_config cannot be changed"):
        check_options({"structured_outputs_config": {"backend": "xgrammar"}})


HOSTILE: list[dict[str, Any]] = [
    asked({"type": "string", "pattern": "(" * 30_000 + "a" + ")" * 30_000}),
    asked({"type": "string", "pattern": "^[a-z]{0,20000}$"}, max_tokens=200),
    asked({"type": "object", "minProperties": 250,
           "properties": {f"p{i}": {"type": "string"} for i in range(500)}}),
    asked({"properties": {f"p{i}": {"type": "string"} for i in range(900)}}, n=16),
    asked({"$ref": "#"}),
    asked({"type": "string", "pattern": "^([a-z]*[aeiou][a-z]{9})*$"}, n=16, max_tokens=300),
    BODY | {"structured_outputs": {"regex": r"(\w+ ){1,2000}"}, "n": 16, "max_tokens": 300},
    BODY | {"structured_outputs": {"regex": ".*" * 2000}},
]  # fmt: skip


def test_the_worst_grammars_hurt_nobody_else(live: Running) -> None:
    """Beside eight clients that send nothing else, others stream and get their structured answers.

    Counted, not timed: every one of them is whole, and none of the hostile ones is a 5xx. How long
    the others wait is measured by benchmarks/grammars.py.
    """
    over = time.monotonic() + 8
    small = asked(SMALL)
    expected = post(live, BODY | {"temperature": 0}).json()["choices"][0]["message"]["content"]

    def attack(first: int) -> set[int]:
        seen = set()
        for number in range(first, first + 1000):
            body = HOSTILE[number % len(HOSTILE)]
            if "structured_outputs" in body:  # one that nobody has checked yet
                own = {"regex": f"{body['structured_outputs']['regex']}{number}"}
                body = body | {"structured_outputs": own}
            seen.add(post(live, body).status_code)
            if time.monotonic() > over:
                break
        return seen

    with ThreadPoolExecutor(8) as pool:
        attacks = [pool.submit(attack, number) for number in range(8)]
        while time.monotonic() < over:
            json.loads(post(live, small).json()["choices"][0]["message"]["content"])
            answer = post(live, BODY | {"temperature": 0}).json()
            assert answer["choices"][0]["message"]["content"] == expected
        assert set().union(*(attack.result() for attack in attacks)) <= {200, 400}
