"""What do the worst grammars do to everybody else?

Eight clients send nothing but grammars made to hurt, new ones and the same again, while one user
streams a plain answer after the other and another asks for answers of one small schema. Told: the
longest gap in the streams and the longest wait for a structured answer, beside what both are while
nobody else is there. The exit code is 1 if a gap was over 250 ms or a wait over 2 s, or if anything
went wrong.

The eight hold up to half of the engine's places: who waits because all are taken waits for places.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.client import Outcome, Target, environment, serve
from lib.report import percentile, say, table, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = """\
examples:
  python benchmarks/grammars.py
  python benchmarks/grammars.py --seconds 60 --json grammars.json
"""
CLIENTS = 8
GAP_SECONDS = 0.25
WAIT_SECONDS = 2.0
ASKED = {"model": "synthia-demo", "messages": [{"role": "user", "content": "What is a token?"}]}
SMALL = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}, "of": {"enum": ["a", "b", "c"]}},
    "required": ["sure", "of"],
    "additionalProperties": False,
}


def schema(value: Any, **more: Any) -> dict[str, Any]:
    """A request whose answer shall be of the JSON schema `value`."""
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}
    return ASKED | {"max_tokens": 300, "response_format": wanted} | more


def hostile() -> Iterator[dict[str, Any]]:
    """Requests made to hurt: each kind in turn, half of them with a grammar that is new."""
    properties = {f"p{number}": {"type": "string"} for number in range(500)}
    for number in itertools.count():
        new = number if number % 2 else 0
        yield from (
            schema({"type": "string", "pattern": "(" * 30_000 + f"a{new}" + ")" * 30_000}),
            schema({"type": "string", "pattern": f"^[a-z]{{0,{20_000 + new}}}$"}),
            schema({"type": "object", "minProperties": 250 + new % 9, "properties": properties}),
            schema({"properties": {f"p{new}_{i}": {"type": "string"} for i in range(900)}}, n=8),
            schema({"$ref": "#", "title": f"{new}"}),
            schema({"type": "integer", "multipleOf": 9973 + 2 * (new % 5000)}, n=8),
            schema({"enum": [f"{new}-{i}" for i in range(20_000)]}, n=8),
            schema({"type": "string", "pattern": f"^([a-z]*[aeiou][a-z]{{9}})*{new}$"}, n=8),
            schema({"type": "string", "maxLength": 9999 + new, "pattern": "^(.*a.{15}|.*b.{12})$"}),
            ASKED
            | {"structured_outputs": {"regex": rf"(\w+ ){{1,{2000 + new}}}"}, "n": 8}
            | {"max_tokens": 300},
            ASKED | {"structured_outputs": {"regex": ".*" * 2000 + str(new)}},
            ASKED
            | {"structured_outputs": {"grammar": f'start: s\ns: s s | /[a-z]/ | "{new}"'}, "n": 8}
            | {"max_tokens": 300},
        )


async def others(target: Target, seconds: float) -> tuple[list[Outcome], list[Outcome]]:
    """Plain streams and structured answers, one after the other, for so long."""
    over = time.monotonic() + seconds

    async def again(body: dict[str, Any], user: str) -> list[Outcome]:
        outcomes = []
        while time.monotonic() < over:
            outcomes.append(await target.chat(body, user))
        return outcomes

    stream = ASKED | {"stream": True, "max_tokens": 200, "ignore_eos": True, "min_tokens": 200}
    return await asyncio.gather(again(stream, "streams"), again(schema(SMALL), "structured"))


async def attack(target: Target, user: str, start: int, seen: Counter[str]) -> None:
    """Send them one after the other, until cancelled."""
    for body in itertools.islice(hostile(), start, None):
        outcome = await target.chat(body, user)
        seen[f"{outcome.status} {outcome.code or ''}".strip()] += 1


async def measure(args: argparse.Namespace) -> int:
    """Both, beside each other; returns the exit code."""
    names = ["streams", "structured", *(f"hostile{number}" for number in range(CLIENTS))]
    async with serve(users={name: {} for name in names}) as target:
        await others(target, 2)  # what happens only once
        say("nobody else is there")
        alone = await others(target, args.seconds / 3)
        say(f"{CLIENTS} clients send grammars made to hurt")
        seen: Counter[str] = Counter()
        attacks = [
            asyncio.create_task(attack(target, name, 3 * number, seen))
            for number, name in enumerate(names[2:])
        ]
        beside = await others(target, args.seconds)
        broken = [task for task in attacks if task.done()]
        for task in attacks:
            task.cancel()
        await asyncio.gather(*attacks, return_exceptions=True)
        report = await environment(target)
    heads = [f"{what} {of} ms" for what in ("gap", "answer") for of in ("p50", "p99", "longest")]
    rows: list[list[Any]] = [["", *heads]]
    for name, (streams, structured) in (("alone", alone), ("beside", beside)):
        gaps = [1e3 * gap for outcome in streams for gap in outcome.gaps]
        waits = [1e3 * outcome.took for outcome in structured]
        figures = [
            round(value, 1)
            for values in (gaps, waits)
            for value in (percentile(values, 0.5), percentile(values, 0.99), max(values))
        ]
        rows.append([name, *figures])
        report[name] = dict(zip(heads, figures, strict=True))
    print(table(rows))
    print("told to the eight:", ", ".join(f"{count} x {what}" for what, count in seen.items()))
    wrong = [o for o in beside[0] if not o.whole] + [o for o in beside[1] if o.status != 200]
    _, _, _, longest_gap, _, _, longest_wait = rows[-1]
    failed = (
        bool(wrong or broken)
        or any(not what.startswith(("200", "400", "429")) for what in seen)
        or float(longest_gap) > 1e3 * GAP_SECONDS
        or float(longest_wait) > 1e3 * WAIT_SECONDS
    )
    if args.json:
        write_json(args.json, report | {"told": dict(seen)})
    print("a bound was not kept" if failed else "all bounds were kept")
    return int(failed)


def main() -> int:
    """Run it as the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30, help="of attack (default 30)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
