"""Synthia-7B's real dimensions on this machine's processor, with weights that are made up.

Half of what a 7B model can break does not show with a small one: memory, the sliding window of
4,096 tokens in a context of 32,768, a conversation that outgrows it, the arithmetic of
`capacity.py`. So the server is started with `load_format=dummy` and the whole geometry, or with as
many layers as fit the memory, and is asked

- short things: it answers, and its books hold every token;
- one conversation that grows past the window, to `--tokens`: each turn is found in the prefix
  cache, as far as a window lets it be;
- one that outgrows the context, with `overflow: drop-oldest`.

Answers mean nothing, and are a few tokens long: a core reads all the weights for each of them.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
from capacity import GIB, SYNTHIA, Geometry
from lib.contestants import flags as engine_flags
from lib.made_up import write_without_weights
from lib.report import machine, say, table, write_json
from lib.servers import MODEL, heed_sigterm, start
from lib.workloads import WORDS

EXAMPLES = """\
examples:
  python benchmarks/geometry.py                          as many layers as fit, half an hour
  python benchmarks/geometry.py --layers 4 --tokens 6000  some minutes
  python benchmarks/geometry.py --json geometry.json
"""
BESIDE_GIB: Final = 3.5
"""What the processes take beside weights and KV cache."""
CACHE_GIB: Final = 4


def layers_that_fit(available: float) -> int:
    """How many of the 32, in so many GiB."""
    for layers in range(SYNTHIA["num_hidden_layers"], 0, -1):
        parameters = Geometry.of(SYNTHIA | {"num_hidden_layers": layers}).parameters
        if 2 * parameters / GIB + CACHE_GIB + BESIDE_GIB < available:
            return layers
    raise SystemExit(f"{available:.1f} GiB of memory are too few for one layer.")


def text(tokens: int, number: int) -> str:
    """Words of one token each; two numbers have no beginning in common."""
    return " ".join(WORDS[(number * 31 + i * i) % len(WORDS)] for i in range(tokens))


class Asker:
    """Asks the server, and keeps the books that it must have."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=3600)
        self.prompt = self.answered = 0

    def ask(self, messages: list[dict[str, str]], tokens: int) -> dict[str, Any]:
        """A greedy answer of so many tokens: usage, seconds, and the text as `content`."""
        body = {
            "model": MODEL,
            "messages": messages,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        begun = time.perf_counter()
        response = self._client.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            raise SystemExit(f"{response.status_code}: {response.text[:500]}")
        found: dict[str, Any] = response.json()
        usage = found["usage"]
        self.prompt += usage["prompt_tokens"]
        self.answered += usage["completion_tokens"]
        return {
            "seconds": time.perf_counter() - begun,
            "prompt": usage["prompt_tokens"],
            "cached": usage["prompt_tokens_details"]["cached_tokens"],
            "answer": usage["completion_tokens"],
            "dropped": int(response.headers.get("x-synthia-dropped-messages", 0)),
            "content": found["choices"][0]["message"]["content"],
        }

    def series(self) -> dict[str, float]:
        """The sum of each of the server's series."""
        found: dict[str, float] = {}
        for line in self._client.get("/metrics").text.splitlines():
            if match := re.match(r"([a-z_:]+)(?:\{.*\})? (\S+)$", line):
                found[match[1]] = found.get(match[1], 0.0) + float(match[2])
        return found

    def cache_config(self) -> dict[str, str]:
        """What the engine reports of its KV cache."""
        return dict(re.findall(r'(\w+)="([^"]*)"', self._client.get("/metrics").text.split(
            "vllm:cache_config_info{")[1].split("}")[0]))  # fmt: skip


def grow(asker: Asker, upto: int, step: int) -> list[dict[str, Any]]:
    """One conversation, turn after turn of `step` tokens, until its prompt is of `upto`."""
    messages: list[dict[str, str]] = []
    turns: list[dict[str, Any]] = []
    while not turns or (turns[-1]["prompt"] < upto and not turns[-1]["dropped"]):
        messages.append({"role": "user", "content": text(step, len(turns))})
        turn = asker.ask(messages, 4)
        messages.append({"role": "assistant", "content": turn.pop("content") or "so"})
        turns.append(turn)
        say(f"a conversation of {turn['prompt']:,} tokens: {turn['seconds']:.1f} s")
    say("")
    return turns


async def main(args: argparse.Namespace) -> int:
    heed_sigterm()
    memory = psutil.virtual_memory().available / GIB
    layers = args.layers or layers_that_fit(memory)
    config = SYNTHIA | {"num_hidden_layers": layers}
    geometry = Geometry.of(config)
    with tempfile.TemporaryDirectory(prefix="geometry-") as place:
        model = write_without_weights(Path(place), config)
        options = {
            "load_format": "dummy", "dtype": "bfloat16", "max_model_len": args.context,
            "kv_cache_memory_bytes": CACHE_GIB * GIB, "max_num_batched_tokens": 2048,
        }  # fmt: skip
        flags = engine_flags("synthia", options)
        flags += ["--set", "overflow=drop-oldest", "--set", "limits.request_seconds=3600"]
        begun = time.perf_counter()
        async with start("synthia", *flags, model=str(model)) as running:
            started = time.perf_counter() - begun
            family = [running.process, *running.process.children(recursive=True)]
            asker = Asker(running.url)
            found = await asyncio.to_thread(measure, asker, geometry, args)
            peak = sum(process.memory_full_info().pss for process in family) / GIB
    found |= {"layers": layers, "parameters": geometry.parameters, "started_in": started,
              "memory_gib": peak}  # fmt: skip
    report(found)
    if args.json:
        write_json(args.json, machine() | found)
    return 0


def measure(asker: Asker, geometry: Geometry, args: argparse.Namespace) -> dict[str, Any]:
    """All that is asked; each claim of the module's text is held. Raises `SystemExit`."""
    cache = asker.cache_config()
    block = int(cache["block_size"])
    expected = geometry.blocks(CACHE_GIB * GIB, block)
    require(int(cache["num_gpu_blocks"]) == expected, f"{cache} and not {expected} blocks")
    short = [asker.ask([{"role": "user", "content": text(20, -n)}], 16) for n in range(1, 4)]
    turns = grow(asker, args.tokens, args.step)
    for before, turn in pairwise(turns):
        whole = before["prompt"] // block * block
        require(turn["cached"] >= whole - block, f"{turn}: {whole} tokens came before")
    outgrown: list[dict[str, Any]] = []
    if args.outgrow:
        outgrown = grow(asker, args.context, 2 * args.step)
        require(outgrown[-1]["dropped"] > 0, f"nothing was dropped: {outgrown[-1]}")
        require(outgrown[-1]["prompt"] <= args.context, f"{outgrown[-1]}")
    series = asker.series()
    told = series["synthia_prompt_tokens_total"], series["synthia_answer_tokens_total"]
    require(told == (asker.prompt, asker.answered), f"{told}, not {asker.prompt}, {asker.answered}")
    return {
        "blocks": expected, "block_size": block, "short": short, "turns": turns,
        "outgrown": outgrown, "prompt_tokens": asker.prompt, "answer_tokens": asker.answered,
    }  # fmt: skip


def require(holds: bool, otherwise: str) -> None:
    """Raise `SystemExit` with what was found instead."""
    if not holds:
        raise SystemExit(otherwise)


def report(found: dict[str, Any]) -> None:
    """Tables of what was measured."""
    print(
        f"{found['layers']} of 32 layers, {found['parameters']:,} parameters, ready after "
        f"{found['started_in']:.0f} s, {found['memory_gib']:.1f} GiB; {found['blocks']:,} blocks "
        f"of {found['block_size']} tokens, as capacity.py has it; {found['prompt_tokens']:,} "
        f"prompt and {found['answer_tokens']:,} answer tokens, as the server counted them.\n"
    )
    heads = ["prompt", "cached", "computed", "seconds", "dropped"]
    for name in ("turns", "outgrown"):
        rows: list[list[object]] = [[*heads]]
        for turn in found[name]:
            numbers = turn["prompt"], turn["cached"], turn["prompt"] - turn["cached"]
            row = [*map("{:,}".format, numbers), f"{turn['seconds']:.1f}", turn["dropped"]]
            rows.append(row)
        if len(rows) > 1:
            print(table(rows) + "\n")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, help="of 32 (default: as many as fit)")
    parser.add_argument("--context", type=int, default=32768, help="max_model_len")
    parser.add_argument("--tokens", type=int, default=20000, help="to which a conversation grows")
    parser.add_argument("--step", type=int, default=2000, help="tokens of each of its turns")
    parser.add_argument("--outgrow", action=argparse.BooleanOptionalAction, default=True,
                        help="go on past the context")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(asyncio.run(main(parse())))
