"""Which JSON schemas the grammar compiler may be given: those that it is sure to digest.

xgrammar compiles a schema inside the engine's process, without a limit of time or memory, and
recurses as deep as the schema leads it: one schema can hang or crash the engine for everybody.
The limits are from measurements of xgrammar 0.2.8 with a vocabulary of 32,000 on two cores. No
schema found that passes took over 3 s of both cores or 300 MB.

Not checked here, since vLLM refuses it before it compiles: JSON nested deeper than 64 levels,
`multipleOf`, `uniqueItems`, `allOf` of several schemas, unknown formats, lengths with a pattern.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final

from synthia_vllm.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

# Objects and booleans. 5,000 definitions (15,000 objects), each used in the one before, overflow
# the compiler's stack: SIGSEGV. At 4,000, such a chain through `anyOf` takes 0.6 s and 210 MB.
MAX_SCHEMAS: Final = 4_000
# Members and items: a constant list of 20,000 numbers takes 1.1 s, one of 100,000 over 20 s.
MAX_VALUES: Final = 20_000
# Bytes of names and strings: a constant of 120 kB takes 1.3 s, and twice as much four times that.
MAX_TEXT: Final = 120_000
# Characters of a pattern: 100,000 parentheses are a SIGSEGV, too; `.` 10,000 times takes 12 s.
MAX_PATTERN: Final = 1_000

# What is cheap alone and dear in number has a price, of about a millisecond of two cores.
MAX_WORK: Final = 2_000
_LENGTH: Final = (
    2  # of `minLength` and `maxLength`, a character: ten of `maxLength` 300 take 1.7 s,
)
_LENGTHS: Final = 128  # and as much with 1,000,000; up to here, length counts
_ITEMS: Final = 4  # `maxItems`: 500 arrays take 1.7 s, 1,000 take 5 s
_FORMAT: Final = 8  # 300 times `ipv6` takes 1.1 s, 1,000 times over 10 s
_TEMPLATE: Final = 24  # 300 times `uri-template` takes 3.7 s
_ATOM: Final = 2  # what a pattern matches one character by: `.` 1,000 times takes 1.1 s
_OVERLAP: Final = 2  # such a one of a variable part, for each other such part; see `_pattern_work`
_COPY: Final = 0.1  # of a pattern's price, once more: 100 times `[a-z]{1,100}` takes 40 MB

_TOKENS: Final = re.compile(  # a repeat, or else one character or class
    r"(?P<repeat>[*+?]|\{\s*(?P<low>[0-9]*)\s*(?:(?P<comma>,)\s*(?P<high>[0-9]*)\s*)?\})"
    r"|\\.|\[\^?(?:\\.|[^\]\\])*\]?|.",
    re.DOTALL,
)
_Place = tuple[Any, str, Any]  # a value, its name in the value around it, and that one's place
_Part = tuple[int, int, int]  # of a pattern: characters, those in variable parts, such parts


def check_schema(schema: Mapping[str, Any]) -> None:
    """Raise `InvalidRequest` if compiling `schema` could harm other requests."""
    schemas = values = text = 0
    work = 0.0
    seen: set[Any] = {(0, 0)}
    stack: list[_Place] = [(schema, "$", None)]
    while stack:
        here = stack.pop()
        node = here[0]
        schemas += isinstance(node, dict | bool)
        values += len(node) if isinstance(node, dict | list) else 0
        text += _size(node) if isinstance(node, str) else 0
        if values > MAX_VALUES:  # before they are looked at, one by one
            raise _refusal(here, f"{MAX_VALUES} values")
        if isinstance(node, dict):
            text += sum(map(_size, node))
            work += _work(node, seen, here)
            stack.extend((value, f".{name[:100]}", here) for name, value in node.items())
        elif isinstance(node, list):
            stack.extend((value, f"[{index}]", here) for index, value in enumerate(node))
        if schemas > MAX_SCHEMAS:
            raise _refusal(here, f"{MAX_SCHEMAS} schemas")
        if text > MAX_TEXT:
            raise _refusal(here, f"{MAX_TEXT} bytes of names and strings")
        if work > MAX_WORK:
            costs = "patterns, lengths, formats, number ranges, optional properties and `anyOf`"
            raise _refusal(here, f"{MAX_WORK} units of work, which is what {costs} cost")


def _work(node: dict[str, Any], seen: set[Any], here: _Place) -> float:
    """The price of one object's keywords; `seen` are the patterns and lengths already paid for."""
    work = 0.0
    members = node.get("patternProperties")
    for pattern in (node.get("pattern"), *(members if isinstance(members, dict) else ())):
        if isinstance(pattern, str):
            if len(pattern) > MAX_PATTERN:
                raise _refusal(here, f"{MAX_PATTERN} characters in a pattern")
            work += _pattern_work(pattern) * (_COPY if pattern in seen else 1)
            seen.add(pattern)
    lengths = (_count(node, "minLength"), _count(node, "maxLength"))
    if lengths not in seen:
        work += _LENGTH * sum(min(length, _LENGTHS) for length in lengths)
        seen.add(lengths)
    work += _ITEMS * bool(_count(node, "minItems") or _count(node, "maxItems"))
    if isinstance(node.get("format"), str):
        work += _TEMPLATE if node["format"] == "uri-template" else _FORMAT
    for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        bound = node.get(name)  # 1,000 ranges of 64 bits take 2.4 s, 100 ranges to 1e300 take 2.1 s
        if isinstance(bound, int | float):
            bits = bound.bit_length() if isinstance(bound, int) else abs(math.frexp(bound)[1])
            work += 1 + bits / 100
    properties, required = node.get("properties"), node.get("required")
    if isinstance(properties, dict):
        # 1,000 optional ones: 0.9 s, 170 MB, and up to 55 ms for a token of the answer; 5,000 over
        # 20 s. With `maxProperties`: 125 take 1 s, 197 take 10 s, 500 over 20 s, required or not.
        count = max(_count(node, "minProperties"), _count(node, "maxProperties"))
        known = required if isinstance(required, list) and not count else ()
        optional = len(properties.keys() - {name for name in known if isinstance(name, str)})
        work += optional**2 * (8 + 2 * min(count, optional)) / 2000
    for name in ("anyOf", "oneOf"):  # 1,000 similar objects: 13 ms for a token; 5,000: 230 ms, 1 GB
        work += len(node[name]) ** 2 / 500 if isinstance(node.get(name), list) else 0
    return work


def _pattern_work(pattern: str) -> float:
    """The price of a regular expression, with its repeats written out.

    Parts of variable length are dear together, for where one ends and the next begins is open:
    ``.{1,100}`` takes 0.1 s, ``(.{1,10}){1,10}`` 2 s, ``(.{1,30}){1,30}`` over 10 s.
    """
    groups: list[_Part] = [(0, 0, 0)]
    last: _Part = (0, 0, 0)  # what a repeat repeats
    for match in _TOKENS.finditer(pattern):
        if match["repeat"]:
            added = _repeated(last, match)
            groups[-1] = _sum(
                groups[-1], (added[0] - last[0], added[1] - last[1], added[2] - last[2])
            )
            last = added
        elif match[0] == "(":
            groups.append((0, 0, 0))
            last = (0, 0, 0)
        else:
            closes = match[0] == ")" and len(groups) > 1
            last = groups.pop() if closes else (1, 0, int(match[0] == "|"))
            groups[-1] = _sum(groups[-1], last)
    atoms, loose, parts = (sum(column) for column in zip(*groups, strict=True))
    return _ATOM * atoms + _OVERLAP * loose * max(0, parts - 1)


def _repeated(part: _Part, match: re.Match[str]) -> _Part:
    atoms, loose, parts = part
    low, high = int(match["low"] or 0), int(match["high"] or 0)
    # A group without end runs into itself: `(.{1,100})*` takes 0.8 s.
    endless = match["repeat"] in "*+" or (match["comma"] and not match["high"])
    times = min(max(low, high, 2 if endless and atoms > 1 else 1), 10**6)
    if match["repeat"] not in "*+?" and (not match["comma"] or low == high):
        return atoms * times, loose * times, parts * times
    return atoms * times, atoms * times, max(1, parts * times)


def _sum(left: _Part, right: _Part) -> _Part:
    return left[0] + right[0], left[1] + right[1], left[2] + right[2]


def _count(node: dict[str, Any], name: str) -> int:
    value = node.get(name)
    return int(max(0, min(value, 10**6))) if isinstance(value, int | float) else 0


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def _refusal(here: _Place, limit: str) -> InvalidRequest:
    path, place = "", here
    while place is not None:
        path, place = place[1] + path[:100], place[2]
    path = path if len(path) <= 100 else f"{path[:97]}..."
    return InvalidRequest(
        f"The schema is too complex: with `{path}` it has more than {limit}.",
        param="response_format.json_schema.schema",
        code="invalid_value",
    )
