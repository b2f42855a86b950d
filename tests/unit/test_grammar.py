"""Grammars: enforced, or refused with a reason and a place; at a bounded cost."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from contextlib import asynccontextmanager
from itertools import permutations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from llguidance import LLTokenizer
from processes import children

from synthia_vllm.engine.base import Grammar
from synthia_vllm.engine.grammar import Refused, check, compile_grammar
from synthia_vllm.engine.grammar_checker import GrammarChecker
from synthia_vllm.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

SUITE = Path(sys.prefix) / "json-schema-suite" / "tests" / "draft2020-12"
DOCS = Path(__file__).parents[2] / "docs" / "structured.md"
BYTES = LLTokenizer("byte")
FIELD = "response_format.json_schema.schema"

# Known to be accepted although they are not valid: what a regular expression cannot tell.
BEYOND_REGEX = {
    "optional/format/date.json": 2,  # 29 February of other years
    "optional/format/date-time.json": 2,  # leap seconds at other times than 23:59:60Z
    "optional/format/time.json": 10,
    "optional/ecmascript-regex.json": 1,  # U+FEFF is white space in JavaScript
}


def schema(value: Any) -> Grammar:
    """The grammar of a JSON schema."""
    return Grammar("json", json.dumps(value), FIELD)


def admits(grammar: Grammar, text: str) -> bool:
    """Whether `text`, whole, is what the grammar can give."""
    matcher = compile_grammar(grammar, BYTES)
    tokens = BYTES.tokenize_bytes(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def spellings(value: Any) -> Iterator[str]:
    """The texts of a JSON value: its keys in any order, a whole number with and without a point."""
    if isinstance(value, float) and value == int(value):
        yield from (json.dumps(value), str(int(value)))
    elif isinstance(value, list):
        for parts in product(*map(list, map(spellings, value))):
            yield f"[{','.join(parts)}]"
    elif isinstance(value, dict):
        for items in permutations(value.items()):
            for parts in product(*(list(spellings(inner)) for _, inner in items)):
                names = (json.dumps(name, ensure_ascii=False) for name, _ in items)
                named = zip(names, parts, strict=True)
                yield "{" + ",".join(f"{name}:{part}" for name, part in named) + "}"
    else:
        yield json.dumps(value, ensure_ascii=False)


def cases(*patterns: str) -> Iterator[tuple[str, Any, list[Any]]]:
    """File, schema and tests of each group of the official suite."""
    files = sorted(file for pattern in patterns for file in SUITE.glob(pattern))
    assert files, f"{SUITE} is not there: `make test-unit` fetches it"
    for file in files:
        for group in json.loads(file.read_text()):
            yield str(file.relative_to(SUITE)), group["schema"], group["tests"]


def test_official_suite() -> None:
    """Each schema of draft 2020-12 is refused, or admits exactly the instances that are valid.

    `format` is enforced here where it is known; the suite's own file has it as an annotation.
    """
    served = refused = 0
    for file, asked, tests in cases("*.json"):
        if file == "format.json":
            continue
        grammar = schema(asked)
        try:
            check(grammar, BYTES)
        except Refused:
            refused += 1
            continue
        served += 1
        for test in tests:
            found = any(admits(grammar, text) for text in spellings(test["data"]))
            assert found == test["valid"], (file, asked, test)
    said = re.search(r"(\d+) of the (\d+) schemas of the official", DOCS.read_text())
    assert said is not None
    assert (served, served + refused) == tuple(map(int, said.groups()))


def test_optional_suite_admits_nothing_invalid() -> None:
    """Formats and regular expressions: what is admitted is valid, but for what is known."""
    found: dict[str, int] = {}
    for file, asked, tests in cases("optional/**/*.json"):
        grammar = schema(asked)
        try:
            check(grammar, BYTES)
        except Refused:
            continue
        for test in tests:
            if not test["valid"] and any(admits(grammar, it) for it in spellings(test["data"])):
                found[file] = found.get(file, 0) + 1
    assert found == BEYOND_REGEX


@asynccontextmanager
async def checker() -> AsyncGenerator[GrammarChecker, None]:
    """A checker whose tokens are bytes."""
    here = GrammarChecker("byte")
    try:
        yield here
    finally:
        await here.close()


def refusal(grammar: Grammar) -> InvalidRequest | None:
    """What a checker says of `grammar`."""

    async def ask() -> InvalidRequest | None:
        async with checker() as here:
            try:
                await here.check(grammar, 0)
            except InvalidRequest as error:
                return error
            return None

    return asyncio.run(ask())


NESTED = "(" * 30_000 + "a" + ")" * 30_000


@pytest.mark.parametrize(
    ("asked", "place"),
    [
        ({"type": "string", "pattern": NESTED}, ".pattern"),
        ({"properties": {"a": {"properties": {"b c": {"pattern": "("}}}}},
         '.properties.a.properties["b c"].pattern'),
        ({"properties": {"not": {"not": {}}}}, ".properties.not.not"),
        ({"if": {"type": "string"}, "then": {"maxLength": 1}}, ".if"),
        ({"$ref": "https://example.com/schema"}, ".$ref"),
        ({"$ref": "#"}, ""),
        ({"anyOf": [{"const": 1}, {"$defs": {"a": {"uniqueItems": True}}}]},
         ".anyOf[1].$defs.a.uniqueItems"),
        ({"type": "string", "pattern": "^(?=a)b"}, ".pattern"),
        ({"const": 2**63}, ".const"),
        ({"enum": [1, [{"a": -(2**63) - 1}]]}, ".enum"),
        ({"maximum": int("9" * 300)}, ".maximum"),
        ({"minimum": 2**53 + 1}, ".minimum"),
        ({"multipleOf": 999_983}, ".multipleOf"),
        ({"type": "string", "format": "colour"}, ".format"),
        ({"x-guidance": {"lenient": True}, "not": {}}, '["x-guidance"]'),
        ({"dependencies": {"a": ["b"]}}, ".dependencies"),
        ({"oneOf": [{"minimum": 1}, {"maximum": 3}]}, ".oneOf"),
        ({"type": "object", "minProperties": 250, "properties": {f"p{i}": {} for i in range(500)}},
         ".minProperties"),
        ({"type": "strnig"}, ".type"),
        (7, ""),
    ],
)  # fmt: skip
def test_what_is_refused_says_where(asked: Any, place: str) -> None:
    """A schema that cannot be enforced, or not at a bounded cost, is a 400 that names the place."""
    error = refusal(schema(asked))
    assert error is not None
    assert (error.status, error.param, error.code) == (400, FIELD + place, "unsupported_grammar")
    assert error.message.startswith(f"`{error.param}`: ")
    assert len(error.message) < 600


@pytest.mark.parametrize(
    ("grammar", "yes", "no"),
    [
        (schema({"$defs": {"a/b": {"const": 3}}, "$ref": "#/$defs/a~1b"}), "3", "4"),
        (schema({"$defs": {"a": {"$anchor": "x", "const": 3}}, "$ref": "#x"}), "3", "4"),
        (schema({"pattern": "^a+$", "maxLength": 2}), '"aa"', '"aaa"'),
        (schema({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 7}]}), "5", "8"),
        (schema({"type": "string", "pattern": "a\0b"}), '"a\\u0000b"', '"ab"'),
        (schema({"type": "object", "required": ["b"]}), '{"b":1}', "{}"),
        (schema({"properties": {"a": {"const": 1}}, "patternProperties": {"^b": {"const": 2}}}),
         '{"a":1,"b":2}', '{"a":1,"b":3}'),
        (schema({"type": "string", "pattern": "^[a-z]{1,300}$"}), f'"{"a" * 300}"',
         f'"{"a" * 301}"'),
        (schema({"type": "string", "pattern": "^[a-z]{0,20000}$"}), '"a"', '"A"'),
        (schema({"const": 2**63 - 1}), str(2**63 - 1), str(2**63)),
        (Grammar("regex", "(yes|no)!", "x"), "yes!", "yes"),
        (Grammar("grammar", 'start: "a"+ B\nB: /[0-9]/', "x"), "aa7", "a"),
        (Grammar("grammar", 'root ::= "yes" | "no"', "x"), "no", "nono"),
    ],
)  # fmt: skip
def test_what_is_served_is_enforced(grammar: Grammar, yes: str, no: str) -> None:
    """The checker lets it pass, and it admits the one text and not the other."""
    assert refusal(grammar) is None
    assert admits(grammar, yes)
    assert not admits(grammar, no)


@pytest.mark.parametrize(
    "text",
    [
        "start: " + "(" * 5000 + '"x"' + ")" * 5000,
        'start: "a" start',  # never ends, and so has no text
        "",
    ],
)
def test_ebnf_is_bounded_too(text: str) -> None:
    """A grammar that is too deep, or has no text, is refused; none takes the checker along."""
    error = refusal(Grammar("grammar", text, "structured_outputs.grammar"))
    assert error is not None
    assert error.param == "structured_outputs.grammar"


def test_the_smallest_priority_goes_first_and_who_left_is_passed_over() -> None:
    """While one is checked, the others wait in order; what is not wanted any more is given up."""

    async def ask() -> list[str]:
        order: list[str] = []
        async with checker() as here:
            await here.check(Grammar("regex", "a", "x"), 0)

            async def one(name: str, priority: int) -> None:
                await here.check(Grammar("regex", f"{name}[a-z]", "x"), priority)
                order.append(name)

            left = asyncio.create_task(here.check(slow(), 0))
            await asyncio.sleep(0)
            tasks = [asyncio.create_task(one(*it)) for it in (("b", 5), ("c", 9), ("d", 1))]
            gone = asyncio.create_task(here.check(slow(1), 2))
            await asyncio.sleep(0)
            left.cancel()
            gone.cancel()
            await asyncio.gather(*tasks)
        return order

    assert asyncio.run(ask()) == ["d", "b", "c"]


def slow(number: int = 0) -> Grammar:
    """A grammar that takes all the time there is."""
    return Grammar("regex", f"({'.*' * 2000}){{{number},}}", "x")


def test_a_lost_checker_is_replaced() -> None:
    """Whatever kills the child, the next request finds another; the one it was at is refused."""

    async def ask() -> None:
        async with checker() as here:
            await here.check(Grammar("regex", "a", "x"), 0)
            asked = asyncio.create_task(here.check(Grammar("regex", "c", "x"), 0))
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for pid, command in children(os.getpid()):
                    if "grammar_checker" in command:
                        os.kill(pid, number)
                await asyncio.sleep(0)  # it is asked while it stands still
            with pytest.raises(InvalidRequest):
                await asked
            await here.check(Grammar("regex", "b", "x"), 0)

    asyncio.run(ask())
