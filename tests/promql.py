"""Which series a PromQL expression asks for.

The Prometheus that distributions have (2.42) tells only whether an expression is valid, not what
is in it, so this takes it apart itself. Whether it is valid, Prometheus decides in the tests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""(?P<text>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
      | (?P<range>\[[^\]]*\])
      | (?P<word>[a-zA-Z_:][\w:]*)
      | (?P<number>\d[\w.]*)
      | (?P<other>\S)""",
    re.VERBOSE,
)
_LABELS_FOLLOW = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_WORDS = {"and", "or", "unless", "offset", "bool", "inf", "nan", "start", "end"}


@dataclass(frozen=True)
class Selector:
    """A series' name with its label matchers, as written."""

    name: str
    matchers: str

    def __str__(self) -> str:
        return self.name + self.matchers


def selectors(expression: str) -> list[Selector]:
    """All in `expression`, without ranges and offsets."""
    expression = re.sub(r"#.*", "", expression)
    tokens = [(match.lastgroup, match.group()) for match in _TOKEN.finditer(expression)]
    found = []
    at = 0
    while at < len(tokens):
        kind, text = tokens[at]
        following = tokens[at + 1][1] if at + 1 < len(tokens) else ""
        if kind == "word" and text.lower() in _LABELS_FOLLOW and following == "(":
            at = _after(tokens, at + 1, ")")
        elif (
            kind == "word" and text.lower() not in _WORDS | _LABELS_FOLLOW and _is_series(following)
        ):
            end = _after(tokens, at + 1, "}") if following == "{" else at + 1
            found.append(Selector(text, "".join(token for _, token in tokens[at + 1 : end])))
            at = end
        else:
            at += 1
    return found


def _is_series(following: str) -> bool:
    """A function's parenthesis follows it, or an aggregation's `by`."""
    return following != "(" and following.lower() not in ("by", "without")


def _after(tokens: list[tuple[str | None, str]], at: int, closing: str) -> int:
    while tokens[at] != ("other", closing):
        at += 1
    return at + 1
