"""Which grammars are served: JSON schemas, regular expressions, choices, and grammars in EBNF.

The backend is llguidance, for every request. It refuses what it cannot enforce, with few
exceptions, which are refused here. Whoever calls this must expect it to crash, or to take all the
time and memory there is: what it is given was written by a stranger, see `grammar_checker.py`.
"""

from __future__ import annotations

import json
import random
import time
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llguidance import LLMatcher, LLTokenizer

    from synthia_vllm.engine.base import Grammar

Path = tuple[str | int, ...]
"""Keys and positions from the root of a schema to a place in it."""

# What one step of one answer may cost, in llguidance's units: a mask for the next token then takes
# 4 ms at worst (by default 80), a lexer's states at most 40 MB (by default 500). Of 1,269 schemas
# of JSONSchemaBench six need more.
LIMITS: Final[dict[str, Any]] = {
    "step_lexer_fuel": 20_000,
    "step_max_items": 2_000,
    "max_lexer_states": 20_000,
    "verbose_errors": False,  # they would have the answer's text in them
}
# Of CPU time. The engine compiles it once more, and makes others wait that long; of 1,500 schemas
# of JSONSchemaBench the slowest took 0.045 (on a core that makes a mask in 0.01 ms).
_COMPILE_SECONDS: Final = 0.15
_TRIAL_TOKENS: Final = 64
# Without its zeros at the end: the states of what recognises multiples are as many.
_MULTIPLE_OF: Final = 20_000

# What llguidance does not enforce: it refuses most of these without saying where they stand, and
# passes over the last six (options of its own, and keywords of other drafts).
_UNSUPPORTED: Final = frozenset(
    {
        "not", "if", "then", "else", "dependentSchemas", "dependentRequired", "propertyNames",
        "contains", "minContains", "maxContains", "uniqueItems", "unevaluatedItems",
        "unevaluatedProperties", "$dynamicRef", "$dynamicAnchor", "$recursiveRef",
        "x-guidance", "$recursiveAnchor", "$vocabulary", "dependencies", "divisibleBy", "disallow",
        "extends",
    }
)  # fmt: skip
_EXACT: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_ONE: Final = ("items", "additionalItems", "additionalProperties", "not", "if", "then", "else")
_SEVERAL: Final = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED: Final = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


class Refused(Exception):
    """A grammar that is not served: why, and the place in the schema that is at fault."""

    def __init__(self, message: str, path: Path = ()) -> None:
        super().__init__(message)
        self.message = message
        self.path = path


def check(grammar: Grammar, tokenizer: LLTokenizer) -> None:
    """Raise `Refused` if `grammar` is not one that can be enforced at a bounded cost."""
    if grammar.kind == "json":
        try:
            _check_keywords(json.loads(grammar.text))
        except ValueError as error:
            raise Refused(f"it is not JSON: {error}") from None
    began = time.process_time()
    matcher = compile_grammar(grammar, tokenizer)
    took = time.process_time() - began
    if matcher.is_error():
        raise Refused(_shown(matcher.get_error()))
    if took > _COMPILE_SECONDS:
        raise Refused("it takes too long to compile; make it simpler")
    _try_out(matcher, tokenizer)


def compile_grammar(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
    """`grammar` as vLLM's backend compiles it; what is wrong with it is in ``get_error()``."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(**LIMITS)
    return LLMatcher(tokenizer, _serialized(grammar), log_level=0, limits=limits)


def _serialized(grammar: Grammar) -> str:
    from llguidance import LLMatcher, grammar_from

    try:
        if grammar.kind == "json":
            return LLMatcher.grammar_from_json_schema(
                grammar.text, defaults={"whitespace_flexible": False}
            )
        return grammar_from(grammar.kind, grammar.text)
    except ValueError as error:  # no object, or GBNF that it cannot convert
        raise Refused(_shown(str(error))) from None


def explain(grammar: Grammar, tokenizer: LLTokenizer, refused: Refused) -> Refused:
    """`refused`, which names no place in a JSON schema, with the place that is at fault.

    That is the innermost schema that is refused for the same reason by itself, and in it the
    keyword without which it is not. Takes a while: a compilation for each schema in the schema.
    """
    root = json.loads(grammar.text)
    shared = {name: root[name] for name in ("$defs", "definitions") if name in root}

    def reason(schema: Any) -> str | None:
        probe = type(grammar)("json", json.dumps(schema), grammar.param)
        matcher = compile_grammar(probe, tokenizer)
        return _shown(matcher.get_error()) if matcher.is_error() else None

    for path, schema in sorted(_schemas(root), key=lambda found: -len(found[0])):
        whole = {**shared, **schema} if path else schema
        why = reason(whole)
        if why is None or not refused.message.startswith(why):
            continue
        for keyword in schema:
            if keyword not in shared and reason(_without(whole, keyword)) != why:
                if keyword == "oneOf":
                    why = "alternatives of which more than one may hold; use `anyOf`"
                return Refused(why, (*path, keyword))
        return Refused(why, path)
    return refused


def _without(schema: dict[str, Any], keyword: str) -> dict[str, Any]:
    return {name: value for name, value in schema.items() if name != keyword}


def _check_keywords(root: Any) -> None:
    """Refuse what llguidance would not enforce, where it would not say so or not say where."""
    if not isinstance(root, dict):
        return
    for path, schema in _schemas(root):
        for keyword, value in schema.items():
            if keyword in _UNSUPPORTED:
                raise Refused(f"the keyword `{keyword}` is not supported", (*path, keyword))
            if keyword in _EXACT and not _exact(value):
                raise Refused("the number has more digits than can be kept", (*path, keyword))
            if keyword == "multipleOf" and _digits(value) > _MULTIPLE_OF:
                raise Refused(f"more than {_MULTIPLE_OF} is too complex", (*path, keyword))
            if keyword in ("const", "enum") and not all(map(_representable, _numbers(value))):
                raise Refused("a number is too large to be kept exactly", (*path, keyword))


def _schemas(root: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """All schemas in `root`, each with its place."""
    rest: list[tuple[Path, Any]] = [((), root)]
    while rest:
        path, schema = rest.pop()
        if not isinstance(schema, dict):
            continue
        yield path, schema
        for keyword, value in schema.items():
            if keyword in _NAMED and isinstance(value, dict):
                rest += [((*path, keyword, name), inner) for name, inner in value.items()]
            elif keyword in _SEVERAL and isinstance(value, list):
                rest += [((*path, keyword, number), inner) for number, inner in enumerate(value)]
            elif keyword in _ONE:
                rest.append(((*path, keyword), value))


def _numbers(value: Any) -> Iterator[int | float]:
    """All numbers in `value`."""
    rest = [value]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            rest += value.values()
        elif isinstance(value, list):
            rest += value
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield value


def _exact(value: Any) -> bool:
    """Whether a bound is the same as the 64-bit floating-point number that is made of it."""
    try:
        return not isinstance(value, int) or float(value) == value
    except OverflowError:
        return False


def _digits(value: Any) -> int:
    """The digits of a number as a whole one, without zeros at either end: 37 of 0.370."""
    if not isinstance(value, int | float):
        return 0
    return int("".join(map(str, Decimal(str(value)).normalize().as_tuple().digits)))


def _representable(number: int | float) -> bool:
    """Whether a constant is written as it was read: as a 64-bit integer, or a float."""
    return isinstance(number, float) or -(2**63) <= number < 2**63


def _try_out(matcher: LLMatcher, tokenizer: LLTokenizer) -> None:
    """Write a beginning of some text that `matcher` admits; refuse if it cannot go on.

    So what cannot be satisfied at all, or runs into the limits at once, is refused before
    anything is answered.
    """
    choice = random.Random(0)  # noqa: S311  # nothing to be kept secret
    for _ in range(_TRIAL_TOKENS):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error() or matcher.is_stopped():
            break
        # The first token that is allowed, from some place on.
        place = choice.randrange(tokenizer.vocab_size)
        rest = mask >> place or mask
        token = (place if mask >> place else 0) + (rest & -rest).bit_length() - 1
        if token in tokenizer.eos_tokens or not matcher.consume_token(token):
            break
    if matcher.is_error():
        why = _shown(matcher.get_error())
        raise Refused(
            "no text satisfies it" if why.startswith("NoExtension") else f"it is too complex: {why}"
        )


def _shown(message: str) -> str:
    """llguidance's message on one line, not too long: what is wrong stands at one of its ends."""
    line = " ".join(message.split())
    return line if len(line) <= 300 else f"{line[:120]} ... {line[-170:]}"
