"""Which of vLLM's grammar backends keeps to a schema, and what does a hostile one cost in each?

Each schema of the official JSON Schema Test Suite (draft 2020-12) is compiled by each backend as
vLLM calls it, and its instances are tried: what is refused, what admits an instance that is not
valid, what admits no spelling of one that is. Then some schemas made to hurt are compiled, each in
a process of its own that is stopped after 20 seconds. No engine runs; the tokenizer is the demo's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from lib.report import table

from synthia_vllm.demo.checkpoint import ensure_demo

EXAMPLES = """\
examples:
  python benchmarks/backends.py
  python benchmarks/backends.py --backends guidance xgrammar
"""
SUITE = Path(sys.prefix) / "json-schema-suite" / "tests" / "draft2020-12"
SECONDS = 20
HOSTILE: dict[str, Any] = {
    "30,000 nested groups": {"type": "string", "pattern": "(" * 30_000 + "a" + ")" * 30_000},
    "^[a-z]{0,20000}$": {"type": "string", "pattern": "^[a-z]{0,20000}$"},
    "an e-mail pattern": {
        "type": "string",
        "pattern": r"^[a-z0-9._%+-]{1,64}@[a-z0-9.-]{1,255}\.[a-z]{2,10}$",
    },
    "500 properties, all required": {
        "type": "object",
        "properties": {f"p{i}": {"type": "string"} for i in range(500)},
        "required": [f"p{i}" for i in range(500)],
        "additionalProperties": False,
    },
    "10,000 enum values": {"enum": [f"v{i}" for i in range(10_000)]},
    "$ref to itself": {"$ref": "#"},
}


@cache
def tokenizer() -> Any:
    """The demo model's, as transformers loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ensure_demo(print))


def guidance(schema: Any) -> Any:
    """llguidance, without white space, as this project has it."""
    import llguidance.hf
    from llguidance import LLMatcher

    tokens = _once(lambda: llguidance.hf.from_tokenizer(tokenizer(), 32_000), "guidance")
    grammar = LLMatcher.grammar_from_json_schema(
        json.dumps(schema), defaults={"whitespace_flexible": False}
    )
    error = LLMatcher.validate_grammar(grammar, tokens)
    if error:
        raise ValueError(error)
    matcher = LLMatcher(tokens, grammar, log_level=0)
    matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(matcher.get_error())

    def admits(text: str) -> bool:
        copy = matcher.deep_copy()
        ids = tokens.tokenize_bytes(text.encode())
        return copy.try_consume_tokens(ids) == len(ids) and copy.is_accepting()

    return admits


def xgrammar(schema: Any) -> Any:
    """xgrammar, without white space; what vLLM knows that it ignores is refused, as vLLM does."""
    import xgrammar as xgr
    from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features

    if isinstance(schema, dict) and has_xgrammar_unsupported_json_features(schema):
        raise ValueError("vLLM refuses it")
    compiler = _once(
        lambda: xgr.GrammarCompiler(
            xgr.TokenizerInfo.from_huggingface(tokenizer(), vocab_size=32_000), max_threads=1
        ),
        "xgrammar",
    )
    compiled = compiler.compile_json_schema(json.dumps(schema), any_whitespace=False)

    def admits(text: str) -> bool:
        matcher = xgr.GrammarMatcher(compiled, terminate_without_stop_token=True)
        return bool(matcher.accept_string(text) and matcher.is_terminated())

    return admits


def outlines(schema: Any) -> Any:
    """outlines-core: a regular expression, and an index of it over the vocabulary."""
    import outlines_core
    from outlines_core.json_schema import build_regex_from_schema

    pattern = build_regex_from_schema(json.dumps(schema))
    vocabulary = _once(
        lambda: outlines_core.Vocabulary(
            2, {text: [i] for text, i in tokenizer().get_vocab().items() if i != 2}
        ),
        "outlines",
    )
    outlines_core.Index(pattern, vocabulary)
    compiled = re.compile(pattern)
    return lambda text: compiled.fullmatch(text) is not None


BACKENDS: dict[str, Any] = {"guidance": guidance, "xgrammar": xgrammar, "outlines": outlines}
_made: dict[str, Any] = {}


def _once(make: Any, name: str) -> Any:
    if name not in _made:
        _made[name] = make()
    return _made[name]


def keeps(backend: Any, group: dict[str, Any]) -> str:
    """What becomes of one schema of the suite."""
    try:
        admits = backend(group["schema"])
    except Exception:
        return "refused"
    verdicts = set()
    for test in group["tests"]:
        texts = {
            json.dumps(value, separators=(",", ":"), ensure_ascii=ascii_only)
            for value in (test["data"], _whole(test["data"]))
            for ascii_only in (False, True)
        }
        found = any(map(admits, texts))
        if found and not test["valid"]:
            return "admits what is not valid"
        verdicts.add(found == test["valid"])
    return "exact" if verdicts == {True} else "admits less"


def _whole(value: Any) -> Any:
    """`value` with 1 for 1.0."""
    return int(value) if isinstance(value, float) and value == int(value) else value


def apart(backend: str, work: Any) -> str:
    """Run `work` in a process that may die or take too long."""
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()

    def run() -> None:
        began = time.perf_counter()
        try:
            BACKENDS[backend](work)
            said = "served"
        except Exception:
            said = "refused"
        answer.put(f"{said}, {time.perf_counter() - began:.2f} s")

    process = context.Process(target=run)
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return f"over {SECONDS} s"
    return answer.get() if process.exitcode == 0 else f"died, signal {-(process.exitcode or 0)}"


def suite(backend: str) -> Counter[str]:
    """The official suite, file by file in processes that may die."""
    context = multiprocessing.get_context("fork")
    counts: Counter[str] = Counter()
    for file in sorted(SUITE.glob("*.json")):
        groups = json.loads(file.read_text())
        if file.name == "format.json":  # has it as an annotation only
            continue
        for group in groups:
            answer = context.SimpleQueue()
            process = context.Process(
                target=lambda group=group, answer=answer: answer.put(
                    keeps(BACKENDS[backend], group)
                )
            )
            process.start()
            process.join(SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
            counts[answer.get() if process.exitcode == 0 else "lost the process"] += 1
    return counts


def main() -> int:
    """Run it as the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    args = parser.parse_args()
    for name in args.backends:
        print(f"[{name}] loading", file=sys.stderr)
        BACKENDS[name]({"type": "boolean"})
    columns = {}
    for name in args.backends:
        print(f"[{name}] the official suite", file=sys.stderr)
        columns[name] = suite(name)
    kinds = ["exact", "admits less", "admits what is not valid", "refused", "lost the process"]
    rows: list[list[object]] = [["", *args.backends]]
    rows += [[f"suite: {kind}", *(columns[n][kind] for n in args.backends)] for kind in kinds]
    for label, schema in HOSTILE.items():
        print(f"hostile: {label[:30]}", file=sys.stderr)
        rows.append([label, *(apart(name, schema) for name in args.backends)])
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
