"""Does each turn of a conversation find all of the turns before it in the prefix cache?

Conversations of six turns and of several kinds, one after the other and all at once, in both
prompt formats. What the server says it took from the cache (`cached_tokens`) is compared with the
ideal: of the tokens the engine has worked through when a turn is over, that is the prompt and the
answer without its last token (made, but never fed back), every whole block, but never all of the
new prompt, whose last token has to run to say what comes next:

    ideal(t) = min(prompt(t-1) + answer(t-1) - 1, prompt(t) - 1), rounded down to whole blocks

It falls short where one turn later the same conversation is written in other tokens: by the format;
after an answer whose tokens are not those the tokenizer makes of its text (a small model's guesses
can be so); after one with a role marker in it, which the server escapes when it comes back. The
exit code is 1 if the documented format gets less than 95 % of the ideal.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lib.client import Target, environment, serve
from lib.report import say, spread, table
from tokenizers import Tokenizer

from synthia_vllm.demo.checkpoint import ensure_demo
from synthia_vllm.demo.training import dialogues
from synthia_vllm.template.formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable

EXAMPLES = """\
examples:
  python benchmarks/multiturn.py
  python benchmarks/multiturn.py --conversations 4 --seed 7 --json multiturn.json
  python benchmarks/multiturn.py --engine block_size=32    finer blocks: finer numbers
"""
TURNS: Final = 6
ENOUGH: Final = 0.95
# Six times such a question and answer are just within the demo model's 2,048 tokens.
QUESTION_TOKENS: Final = 230
ANSWER_TOKENS: Final = 110
_BLOCK: Final = re.compile(r'block_size="(\d+)"')


# --- What is talked about ------------------------------------------------------------------------

_LESSONS: Final = [turn for dialogue in dialogues() for turn in dialogue]
_CODE: Final = Path(__file__).read_text(encoding="utf-8").splitlines()
_WORLD: Final = (
    "今日はとても良い天気ですね。", "東京から京都まで、", "Grüße aus Köln, ", "où étiez-vous ? ",
    "Москва и Волга, ", "مرحبا بالعالم ", "नमस्ते ", "😊🌊", "안녕하세요 ", "ångström ",
)  # fmt: skip


def _question(draw: random.Random) -> str:
    return draw.choice(_LESSONS).user


def _prose(draw: random.Random) -> str:
    return " ".join(turn.assistant for turn in draw.sample(_LESSONS, 30))


def _code(draw: random.Random) -> str:
    start = draw.randrange(len(_CODE) - 60)
    return "What does this do?\n```python\n" + "\n".join(_CODE[start : start + 60])


def _numbers(draw: random.Random) -> str:
    rows = (f"{draw.random():.4f},{draw.randrange(10**5)},-{draw.randrange(99)}" for _ in range(30))
    return "x,y,z\n" + "\n".join(rows)


def _world(draw: random.Random) -> str:
    return "".join(draw.choices(_WORLD, k=60))


def _marked_up(draw: random.Random) -> str:
    items = (f' * "{_question(draw)}"\t(**{draw.random():.2f}**)' for _ in range(30))
    return "# A  list\n\n" + "\n\n".join(items)


LONG_ANSWERS: Final = "prose, long answers"
KINDS: Final[dict[str, Callable[[random.Random], str]]] = {
    "known questions": _question,
    "prose": _prose,
    LONG_ANSWERS: _prose,
    "code": _code,
    "numbers": _numbers,
    "other scripts": _world,
    "marked up": _marked_up,
}


class Words:
    """The demo model's tokenizer, to make texts of the wished length."""

    def __init__(self) -> None:
        self._tokenizer = Tokenizer.from_file(str(ensure_demo(say) / "tokenizer.json"))

    def cut(self, text: str) -> str:
        """The beginning of `text`, of at most `QUESTION_TOKENS`."""
        places = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return text[: places[QUESTION_TOKENS][0]] if len(places) > QUESTION_TOKENS else text

    def bias(self) -> dict[str, int]:
        """A `logit_bias` that leaves the model only whole words, so that it never comes to an end.

        By itself it says a sentence or two, and what follows a long answer shows more.
        """
        words = {word for turn in _LESSONS for word in turn.assistant.split() if word.isalpha()}
        ids = (self._tokenizer.token_to_id(f"\u2581{word}") for word in sorted(words))
        return {str(number): 100 for number in ids if number is not None}


# --- Conversations -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """What the server told of one turn."""

    prompt: int
    """Tokens, as are the next two."""
    answer: int
    cached: int
    to_first: float
    """Seconds from sending to the first text."""


async def ask(
    target: Target, messages: list[dict[str, str]], more: dict[str, Any]
) -> tuple[Turn, str]:
    """Send a conversation; return what it took and the answer. Raises `SystemExit` if refused."""
    body: dict[str, Any] = {
        "model": "synthia-demo",
        "messages": messages,
        "max_tokens": ANSWER_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
        **more,
    }
    begun, to_first, pieces, usage = time.perf_counter(), 0.0, [], None
    async with target.session.post(f"{target.url}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise SystemExit(f"refused: {response.status} {await response.text()}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise SystemExit(f"broken off: {event}")
            for choice in event["choices"]:
                to_first = to_first or time.perf_counter() - begun
                pieces.append(choice["delta"].get("content") or "")
            usage = event.get("usage") or usage
    if usage is None:
        raise SystemExit("The stream ended without `usage`.")
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    found = Turn(usage["prompt_tokens"], usage["completion_tokens"], cached, to_first)
    return found, "".join(pieces)


@dataclass(frozen=True)
class Conversation:
    """One conversation, turn by turn, and its last turn as one that nobody has seen before."""

    kind: str
    turns: list[Turn]
    fresh: Turn | None


async def converse(
    target: Target, words: Words, kind: str, seed: int, *, fresh: bool
) -> Conversation:
    """Hold a conversation about `kind`; with `fresh`, then ask its last turn as a new one."""
    draw = random.Random(f"{kind} {seed}")
    more = {"logit_bias": words.bias()} if kind == LONG_ANSWERS else {}
    messages: list[dict[str, str]] = []
    turns: list[Turn] = []
    # A number in front, so that no two conversations begin alike. Each digit is one token.
    opening = f"{draw.randrange(10**9, 10**10)}: "
    for number in range(TURNS):
        content = words.cut((opening if number == 0 else "") + KINDS[kind](draw))
        messages.append({"role": "user", "content": content})
        turn, answer = await ask(target, messages, more)
        turns.append(turn)
        messages.append({"role": "assistant", "content": answer})
    unseen = None
    if fresh:
        messages[0]["content"] = f"{draw.randrange(10**9, 10**10)}" + messages[0]["content"][10:]
        unseen, _ = await ask(target, messages[:-1], more)
    return Conversation(kind, turns, unseen)


def ideals(turns: list[Turn], block: int) -> list[int]:
    """The most each turn can have from the cache, see above; nothing for the first."""
    found = [0]
    for before, now in pairwise(turns):
        found.append(min(before.prompt + before.answer - 1, now.prompt - 1) // block * block)
    return found


# --- One format ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Everything measured in one prompt format."""

    block: int
    """Tokens of a block of the engine's KV cache."""
    alone: list[Conversation]
    at_once: list[Conversation]
    environment: dict[str, Any]


async def run(fmt: str, words: Words, args: argparse.Namespace) -> Run:
    """Hold all conversations with a server of the format `fmt`."""
    options = [part for option in args.engine for part in ("--engine", option)]
    async with serve("--format", fmt, *options) as target:
        samples = await target.metrics()
        found = [_BLOCK.search(name) for name in samples if "cache_config_info{" in name]
        if len(found) != 1 or found[0] is None:
            raise SystemExit("/metrics does not tell the block size (vllm:cache_config_info).")
        await converse(target, words, "prose", args.seed - 1, fresh=True)  # to warm up
        alone: list[Conversation] = []
        seeds = range(args.seed, args.seed + args.conversations)
        for seed in seeds:
            for kind in KINDS:
                say(f"{fmt}: {kind}, {len(alone)} conversations done")
                alone.append(await converse(target, words, kind, seed, fresh=True))
        say(f"{fmt}: {len(alone)} conversations at once")
        later = (seed + args.conversations for seed in seeds)
        at_once = await asyncio.gather(
            *(converse(target, words, kind, seed, fresh=False) for seed in later for kind in KINDS)
        )
        say("")
        return Run(int(found[0][1]), alone, list(at_once), await environment(target))


@dataclass
class Sum:
    """Tokens of several turns, as sums."""

    prompt: int = 0
    cached: int = 0
    ideal: int = 0

    @property
    def share(self) -> float:
        return self.cached / self.ideal if self.ideal else 1.0


def summed(conversations: list[Conversation], block: int, only: int | None = None) -> Sum:
    """All turns of `conversations`, or only those with index `only`.

    The engine may run a token past a stop, and so have a block more: that makes up for nothing.
    """
    total = Sum()
    for conversation in conversations:
        found = zip(conversation.turns, ideals(conversation.turns, block), strict=True)
        for number, (turn, ideal) in enumerate(found):
            if only is None or number == only:
                total.prompt += turn.prompt
                total.cached += min(turn.cached, ideal)
                total.ideal += ideal
    return total


def show(runs: dict[str, Run]) -> None:
    """Print the tables."""
    heads = [f"{fmt} {what}" for fmt in runs for what in ("cached", "ideal", "share")]

    def cells(pick: Callable[[Run], Sum]) -> list[str]:
        row = []
        for got in runs.values():
            found = pick(got)
            row += [str(found.cached), str(found.ideal), f"{100 * found.share:.1f} %"]
        return row

    rows = [["tokens", *heads]]
    for kind in KINDS:
        rows.append([kind, *cells(lambda r, k=kind: summed(_of(r.alone, k), r.block))])  # type: ignore[misc]
    rows.append(["all of these", *cells(lambda r: summed(r.alone, r.block))])
    rows.append(["others, at once", *cells(lambda r: summed(r.at_once, r.block))])
    print(table(rows), "\n")
    rows = [["turn", *(f"{fmt} {what}" for fmt in runs for what in ("prompt", "cached", "share"))]]
    for number in range(TURNS):
        row = [str(number + 1)]
        for got in runs.values():
            found, count = summed(got.alone, got.block, number), len(got.alone)
            share = f"{100 * found.share:.1f} %" if found.ideal else "-"
            row += [f"{found.prompt / count:.0f}", f"{found.cached / count:.0f}", share]
        rows.append(row)
    print("Means per conversation, one after the other:\n")
    print(table(rows), "\n")
    rows = [[f"turn {TURNS}", "tokens", "first token ms, cached", "fresh", "ratio of each pair"]]
    for fmt, got in runs.items():
        with_cache, without = first_tokens(got)
        ratios = [a / b for a, b in zip(with_cache, without, strict=True)]
        tokens = statistics.median(c.turns[-1].prompt for c in got.alone)
        rows.append([fmt, f"{tokens:.0f}", spread(with_cache), spread(without), spread(ratios)])
    print(table(rows))


def first_tokens(run: Run) -> tuple[list[float], list[float]]:
    """Milliseconds to the first token of the last turn: of conversations, and of fresh ones."""
    fresh = [c.fresh for c in run.alone if c.fresh is not None]
    if any(turn.cached for turn in fresh):
        raise SystemExit("A fresh conversation was found in the cache: the comparison is void.")
    return [1e3 * c.turns[-1].to_first for c in run.alone], [1e3 * t.to_first for t in fresh]


def _of(conversations: list[Conversation], kind: str) -> list[Conversation]:
    return [c for c in conversations if c.kind == kind]


async def main(args: argparse.Namespace) -> int:
    words = Words()
    runs = {fmt: await run(fmt, words, args) for fmt in FORMATS}
    documented = runs["documented"]
    print(f"Blocks of {documented.block} tokens; sums over all turns.\n")
    show(runs)
    found = [summed(part, documented.block) for part in (documented.alone, documented.at_once)]
    ok = min(each.share for each in found) >= ENOUGH
    print(f"\ndocumented format at least {ENOUGH:.0%} of the ideal: {'PASS' if ok else 'FAIL'}")
    if args.json:
        args.json.write_text(
            json.dumps(
                {
                    fmt: asdict(got)
                    | {
                        "share": summed(got.alone, got.block).share,
                        "share_at_once": summed(got.at_once, got.block).share,
                        "ideal": [ideals(c.turns, got.block) for c in got.alone],
                        "ideal_at_once": [ideals(c.turns, got.block) for c in got.at_once],
                    }
                    for fmt, got in runs.items()
                },
                indent=1,
            )
            + "\n"
        )
    return 0 if ok else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--conversations", type=int, default=2, help="of each kind, one after the other and at once"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the questions")
    parser.add_argument(
        "--engine", action="append", default=[], metavar="NAME=VALUE", help="an option for vLLM"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    sys.exit(asyncio.run(main(parser.parse_args())))
