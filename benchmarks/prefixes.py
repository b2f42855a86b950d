"""What does a prefix cache for each user cost where all have one beginning of a prompt in common?

Users whose conversations begin with the same long system message ask one question after the other,
each a new one. Told, for a cache that all share and for one each: the time to the first token, the
share of the prompts' tokens that the cache served, and the prompts' tokens that had to be computed.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from pathlib import Path
from typing import Any

from lib.client import environment, serve
from lib.report import say, table, write_json

EXAMPLES = """\
examples:
  python benchmarks/prefixes.py
  python benchmarks/prefixes.py --users 50 --questions 2 --json prefixes.json
"""
SYSTEM = "You are a patient guide to the animals of the sea, and you answer in one sentence. " * 40


async def measure(how: str, users: int, questions: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures with ``prefix_cache: how``, and what they were measured on."""
    names = [f"user{number}" for number in range(users)]
    first, cached, prompt = [], 0.0, 0.0
    async with serve("--set", f"prefix_cache={how}", users={name: {} for name in names}) as target:
        before = await target.metrics()
        for question in range(questions):
            say(f"{how}: question {question + 1} of {questions}")
            for name in names:
                body = {
                    "model": "synthia-demo",
                    "messages": [
                        {"role": "system", "content": SYSTEM},
                        {"role": "user", "content": f"{name}, {question}: what is an orca?"},
                    ],
                    "stream": True,
                    "max_tokens": 4,
                }
                outcome = await target.chat(body, name)
                first.append(1e3 * (outcome.to_first or 0))
        after = await target.metrics()
        for key, value in after.items():
            gone = value - before.get(key, 0)
            if key.startswith("synthia_cached_prompt_tokens_total"):
                cached += gone
            elif key.startswith("synthia_prompt_tokens_total"):
                prompt += gone
        where = await environment(target)
    return {
        "first token p50 ms": round(statistics.median(first), 1),
        "first token mean ms": round(statistics.fmean(first), 1),
        "served by the cache": round(cached / prompt, 3),
        "prompt tokens computed": round(prompt - cached),
    }, where


async def run(args: argparse.Namespace) -> int:
    """Both, one after the other; returns the exit code."""
    found = {}
    for how in ("shared", "per-user"):
        found[how], where = await measure(how, args.users, args.questions)
    say("")
    names = list(found["shared"])
    print(table([["", *names], *([how, *found[how].values()] for how in found)]))
    if args.json:
        write_json(args.json, {**found, "environment": where})
    return 0


def main() -> int:
    """Run it as the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=int, default=20, help="(default 20)")
    parser.add_argument("--questions", type=int, default=5, help="of each user (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
