"""What does it cost to tokenise a conversation: as a whole, and where its earlier turns are known?

CPU time of the tokenizer alone, on prompts as the server makes them, the fastest of some tries; no
server is started.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lib.meter import PROSE
from lib.report import machine, say, table, write_json

from synthia_vllm.demo.checkpoint import ensure_demo
from synthia_vllm.engine.vllm.tokenizer import Tokenizer
from synthia_vllm.template.prompt import Message, normalize_messages, render

if TYPE_CHECKING:
    from collections.abc import Sequence

EXAMPLES = """\
examples:
  python benchmarks/tokens.py
  python benchmarks/tokens.py --turns 5 50 --words 200 --json tokens.json
"""


def conversation(turns: int, words: int) -> list[Message]:
    """One that has had so many turns, with `words` words to a message, and waits for an answer."""
    chosen = random.Random(turns)
    made = [Message("system", " ".join(chosen.choices(PROSE, k=words)))]
    for number in range(2 * turns + 1):
        content = " ".join(chosen.choices(PROSE, k=words))
        made.append(Message("assistant" if number % 2 else "user", content))
    return made


async def fastest(tokenizer: Tokenizer, text: str, salts: Sequence[str | None]) -> float:
    """Microseconds of CPU that `text` takes, under each of `salts` once: the fewest."""
    found = []
    for salt in salts:
        begun = time.process_time()
        await tokenizer.encode(text, special_tokens=False, cache_salt=salt)
        found.append(time.process_time() - begun)
    return 1e6 * min(found)


async def main(args: argparse.Namespace) -> int:
    from transformers import AutoTokenizer

    tokenizer = Tokenizer(AutoTokenizer.from_pretrained(ensure_demo(say)))
    rows = []
    for turns in args.turns:
        say(f"{turns} turns")
        messages = conversation(turns, args.words)
        before, now = (render(normalize_messages(some)[0]) for some in (messages[:-2], messages))
        tokens = await tokenizer.encode(now, special_tokens=True)  # as a whole, and kept nowhere
        new = [f"new {turns} {number}" for number in range(args.tries)]
        known = [f"known {turns} {number}" for number in range(args.tries)]
        for salt in known:
            await tokenizer.encode(before, special_tokens=False, cache_salt=salt)
        new_us = await fastest(tokenizer, now, new)
        known_us = await fastest(tokenizer, now, known)
        rows.append({"turns": turns, "tokens": len(tokens), "new_us": new_us, "known_us": known_us})
    tokenizer.close()
    say("")
    heads = ["turns", "tokens", "new, µs", "all but the last turn known, µs"]
    print(table([heads, *([f"{value:.0f}" for value in row.values()] for row in rows)]))
    if args.json:
        write_json(args.json, {"environment": machine(), "rows": rows})
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", nargs="+", type=int, default=[1, 10, 50, 100])
    parser.add_argument("--words", type=int, default=60, help="to a message (default 60)")
    parser.add_argument("--tries", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    sys.exit(asyncio.run(main(parser.parse_args())))
