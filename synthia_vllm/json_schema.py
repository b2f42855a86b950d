"""Which JSON schemas the grammar compiler may be given: those that it is sure to digest.

xgrammar compiles a schema inside the engine's process, without a limit of time or memory, and
its recursion is as deep as the schema asks: one schema of a megabyte can hang or crash the
engine for everybody. The limits below come from measurements of xgrammar 0.2.8 with a
vocabulary of 32,000 on two cores; what they let pass compiles in about three seconds at worst.

Not checked here, for vLLM refuses it before it compiles: JSON nested deeper than 64 levels,
`multipleOf`, `uniqueItems`, `allOf` of several schemas, unknown formats, lengths with a pattern.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final

from synthia_vllm.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

# Objects and booleans. A chain of 5,000 definitions, each in the one before, overflows the
# compiler's stack (15,000 objects: SIGSEGV, the process is gone; 9,000: 0.4 s); at 4,000 all
# properties of one object cost about 1 s, and a chain through `anyOf` 0.6 s and 220 MB.
MAX_SCHEMAS: Final = 4_000
# Members and items: a constant list of 20,000 numbers takes 1.1 s, of 100,000 over 20 s.
MAX_VALUES: Final = 20_000
# Names and strings, in UTF-8: one constant of 120 kB takes 1.3 s and 70 MB, and time is quadratic.
MAX_TEXT: Final = 120_000
# Beyond 1,000 choices in one place (optional properties, branches of `anyOf`) a single token of
# the answer takes 5 ms and more, and memory is quadratic: 170 MB at 1,000, 1.5 GB at 5,000.
MAX_PATTERN: Final = 1_000  # characters; 100,000 parentheses are a stack overflow, too
# What is left is cheap one by one and dear in sum. A unit is about a millisecond.
MAX_WORK: Final = 2_000
_FORMAT: Final = 8  # 300 of `uri-template`: 3.7 s; of `ipv6`: 1.1 s; of `email`: 0.1 s
_LENGTH: Final = 1.5  # a character of a string's bounds, of which 128 count: 10 pairs take 1.7 s
_LENGTHS: Final = 128  # longer bounds cost no more: `maxLength` 200 and 1,000,000,000 are alike
_ATOM: Final = 2  # a character that a pattern matches: 1,000 dots take 1.1 s
_OVERLAP: Final = 0.4  # two that may be absent and match the same: `.?` 30 times takes 0.4 s

# An atom or a parenthesis, or else a repeat, perhaps with bounds.
_TOKENS: Final = re.compile(
    r"(\\.|\[\^?(?:\\.|[^\]\\])*\]?|[^*+?{]|\{(?!\s*[0-9]*\s*(?:,\s*[0-9]*\s*)?\}))"
    r"|[*+?]|\{\s*([0-9]*)\s*(?:(,)\s*([0-9]*)\s*)?\}",
    re.DOTALL,
)
_BOUNDS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_Part = tuple[int, int, int]
_Place = tuple[Any, str, Any]  # a value, its name in the value around it, and that one's place


def check_schema(schema: Mapping[str, Any]) -> None:
    """Raise `InvalidRequest` if compiling `schema` could harm other requests."""
    schemas = values = text = 0
    work = 0.0
    seen: set[Any] = set()
    stack: list[_Place] = [(schema, "", None)]
    while stack:
        here = stack.pop()
        node = here[0]
        if isinstance(node, str):
            text += _size(node)
        elif isinstance(node, dict):
            values += len(node)
            schemas += 1
            if values <= MAX_VALUES:
                text += sum(map(_size, node))
                stack.extend((value, f".{name[:100]}", here) for name, value in node.items())
                work += _work(node, seen, here)
        elif isinstance(node, list):
            values += len(node)
            if values <= MAX_VALUES:
                stack.extend((value, f"[{index}]", here) for index, value in enumerate(node))
        elif isinstance(node, bool):
            schemas += 1
        if schemas > MAX_SCHEMAS:
            raise _refusal(here, f"more than {MAX_SCHEMAS} schemas")
        if values > MAX_VALUES:
            raise _refusal(here, f"more than {MAX_VALUES} values")
        if text > MAX_TEXT:
            raise _refusal(here, f"more than {MAX_TEXT} bytes of names and strings")
        if work > MAX_WORK:
            raise _refusal(
                here,
                f"more work for the compiler than this server's budget of {MAX_WORK}, by its "
                "patterns, lengths, formats, number ranges, optional properties and `anyOf`",
            )


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def _work(node: dict[str, Any], seen: set[Any], here: _Place) -> float:
    """What the keywords of one schema cost the compiler, beyond their number."""
    work = 0.0
    by_pattern = node.get("patternProperties")
    for pattern in (node.get("pattern"), *(by_pattern if isinstance(by_pattern, dict) else ())):
        if isinstance(pattern, str):
            if len(pattern) > MAX_PATTERN:
                raise _refusal(here, f"a pattern of more than {MAX_PATTERN} characters")
            # Compiled once; 100 copies of `[a-z]{1,100}` still take 40 MB.
            work += _pattern_work(pattern) * (0.1 if pattern in seen else 1)
            seen.add(pattern)
    lengths = (_count(node, "minLength"), _count(node, "maxLength"))
    if lengths not in seen:
        work += _LENGTH * sum(min(length, _LENGTHS) for length in lengths)
        seen.add(lengths)
    if isinstance(node.get("format"), str):
        work += _FORMAT
    for name in _BOUNDS:
        # 1,000 ranges of 64 bits take 2.4 s, 100 ranges to 1e300 2.1 s.
        bound = node.get(name)
        if isinstance(bound, int):
            work += 1 + bound.bit_length() / 100
        elif isinstance(bound, float):
            work += 1 + abs(math.frexp(bound)[1]) / 100
    properties, required = node.get("properties"), node.get("required")
    if isinstance(properties, dict):
        # 200 optional ones with `maxProperties` 105 take 2.6 s, 500 with 255 over 20 s.
        count = max(_count(node, "minProperties"), _count(node, "maxProperties"))
        fixed = {name for name in required or [] if isinstance(name, str)} if not count else set()
        optional = len(properties.keys() - fixed)
        work += optional**2 * (4 + min(count, optional)) / 2000
    for name in ("anyOf", "oneOf"):
        if isinstance(node.get(name), list):
            work += len(node[name]) ** 2 / 500
    return work


def _count(node: dict[str, Any], name: str) -> int:
    """The number that a keyword asks for; floats are numbers, too."""
    value = node.get(name)
    return int(max(0, min(value, 10**6))) if isinstance(value, int | float) else 0


def _pattern_work(pattern: str) -> float:
    """The cost of a regular expression, its repeats written out.

    Each group is three numbers: the atoms in it, those of them that may be absent, and the sum
    of squares of runs of one and the same atom, which do not get in each other's way: `.{1,100}`
    takes 0.1 s, `(.{1,10}){1,10}` 2 s, `(.{1,30}){1,30}` over 10 s.
    """
    groups = [(0, 0, 0)]
    last = (0, 0, 0)  # what a repeat would repeat
    for match in _TOKENS.finditer(pattern):
        token, low, comma, high = match.groups()
        if token == "(":
            groups.append((0, 0, 0))
            last = (0, 0, 0)
            continue
        if token == ")" and len(groups) > 1:
            last = groups.pop()
        elif token is not None:
            last = (1, 0, 0)
        else:
            groups[-1] = _sum(groups[-1], last, -1)
            last = _repeated(last, match[0], low, high if comma else low)
        groups[-1] = _sum(groups[-1], last, 1)
    atoms, loose, runs = (sum(column) for column in zip(*groups, strict=True))
    return _ATOM * atoms + _OVERLAP * (loose**2 - runs)


def _repeated(part: _Part, sign: str, low: str | None, high: str | None) -> _Part:
    """`part` repeated: the atoms of a group become atoms of their own each time."""
    atoms, loose, runs = part
    # A group without end runs into itself: `(.{1,100})*` takes 0.8 s.
    endless = 2 if atoms > 1 and (sign in "*+" or not high) and sign != "?" else 1
    times = min(max(int(low or 0), int(high or 0), endless), 10**6)
    if sign[0] == "{" and low == high:
        return atoms * times, loose * times, runs * times
    if part == (1, 0, 0):
        return times, times, times**2
    return atoms * times, atoms * times, (runs + atoms - loose) * times


def _sum(left: _Part, right: _Part, sign: int) -> _Part:
    return left[0] + sign * right[0], left[1] + sign * right[1], left[2] + sign * right[2]


def _refusal(here: _Place, what: str) -> InvalidRequest:
    """The answer to a schema that breaks a limit at `here`."""
    path, at = "", here
    while at is not None:
        path, at = at[1] + path[:100], at[2]
    path = f"${path}"
    path = path if len(path) <= 100 else f"{path[:97]}..."
    return InvalidRequest(
        f"The schema is too complex: at `{path}` it has {what}.",
        param="response_format.json_schema.schema",
        code="invalid_value",
    )
