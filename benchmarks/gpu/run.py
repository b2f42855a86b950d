"""Everything that is to be known of this server on a GPU, in the minutes there are, by one command.

Contestants, one after the other on the one GPU, all with the same engine options:
- synthia: this server; vllm-python, vllm-rust: `vllm serve` with either frontend;
- offline: `vllm.LLM.generate`, all prompts at once; transformers: the loop of the model's card.
Then the same loads on variants of the preset, to find the one for this card.

What matters most comes first, and each contestant has its part of the time; what is left goes to
what is missing. Every result is written when it is there (results.jsonl, page.md, plots), and a
second call with the same --out goes on where the first ended. The weights are made up
(``--model dummy``), or those of a directory. On a CPU it rehearses, with the demo model.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import uvloop
import yaml
from capacity import SYNTHIA
from lib.campaign import Book, Item, Visit, measure
from lib.contestants import DIRECT, contestant
from lib.made_up import write_without_weights
from lib.page import write_page
from lib.report import machine
from lib.servers import available, heed_sigterm

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

EXAMPLES = """\
examples:
  python benchmarks/gpu/run.py --preset config/gpu/h100.yaml --minutes 25 --out results
  python benchmarks/gpu/run.py --rehearse --minutes 15 --out rehearsal      no GPU: the demo model
  python benchmarks/gpu/run.py --model /models/Synthia-7B-v3.0 --targets synthia vllm-rust
  PYTHONPATH=/tmp/site python benchmarks/gpu/run.py --out results     packages only unpacked
"""


def lengths(prompt: int, answer: int, connections: int, rounds: int) -> Item:
    """Prompt and answer tokens, connections, answers over each of them."""
    return Item("lengths", prompt, answer, connections, rounds)


LOADS: Final = (  # the most important first
    lengths(512, 256, 256, 2), lengths(1000, 1000, 1024, 1), lengths(128, 128, 1024, 2),
    lengths(512, 256, 64, 2), lengths(512, 256, 1, 2), lengths(2048, 2048, 512, 1),
    lengths(512, 256, 1024, 2), lengths(512, 256, 8, 2),
    Item("sharegpt", connections=256, rounds=4), Item("multiturn", connections=64, rounds=2),
    *(Item("sharegpt", rate=rate) for rate in (8.0, 16.0, 32.0, 64.0)),
)  # fmt: skip
REHEARSED: Final = (
    lengths(128, 64, 16, 2), lengths(64, 64, 64, 1), lengths(128, 64, 1, 2),
    Item("sharegpt", connections=16, rounds=2), Item("multiturn", connections=8),
    Item("sharegpt", rate=2.0), Item("sharegpt", rate=8.0),
)  # fmt: skip
SEARCHED: Final = (lengths(1000, 1000, 1024, 1), lengths(512, 256, 256, 2))

ENOUGH_S: Final = 60
"""Seconds with which it is worth starting one more."""

VARIANTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "preset": {},
    "vLLM's defaults": {"*": None},
    "16-bit weights": {"quantization": None, "kv_cache_dtype": None},
    "16-bit cache": {"kv_cache_dtype": None},
    "twice the tokens a step": {"max_num_batched_tokens": 2.0},
    "half the tokens a step": {"max_num_batched_tokens": 0.5},
    "half the places": {"max_num_seqs": 0.5},
    "graphs of whole steps": {"compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}},
    "no async scheduling": {"async_scheduling": False},
    "n-gram speculation": {
        "speculative_config": {
            "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4,
        },
    },
}  # fmt: skip
"""Of the preset: a number times the preset's, None for vLLM's default, anything else as it is."""


def variant(preset: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The engine options of one of `VARIANTS`."""
    found = dict(preset)
    for name, change in changes.items():
        if name == "*":  # but how weights are come by is no tuning
            found = {kept: preset[kept] for kept in ("load_format",) if kept in preset}
        elif change is None:
            found.pop(name, None)
        elif isinstance(change, float):
            if name in found:
                found[name] = int(found[name] * change)
        elif isinstance(change, dict) and isinstance(found.get(name), dict):
            found[name] = found[name] | change
        else:
            found[name] = change
    return found


class Clock:
    """The time there is, and parts of it."""

    def __init__(self, minutes: float) -> None:
        self._ends = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds."""
        return self._ends - time.monotonic()

    def part(self, of: int) -> float:
        """When one of so many equal parts of what is left is over."""
        return time.monotonic() + self.left() / max(1, of)


@dataclass(frozen=True)
class Setting:
    """What is common to all contestants."""

    model: str
    """``demo`` or a directory."""
    engine: Mapping[str, Any]
    """The preset's options."""
    api_workers: int
    loads: Sequence[Item]
    searched: Sequence[Item]
    variants: Mapping[str, Mapping[str, Any]]
    word: bool
    """Answers are held to one word. With made-up weights nothing ever says `USER:`."""

    def visit(self, target: str, label: str, engine: Mapping[str, Any], items: Any) -> Visit:
        """One contestant to start."""
        many = target == "synthia" and self.api_workers > 1
        options = ("--api-workers", str(self.api_workers)) if many else ()
        return Visit(target, label, engine, tuple(items), self.model, self.word, options)

    def contestants(self, names: Sequence[str]) -> list[Visit]:
        """Those of `names`, with the loads that they can take."""
        plain = [item for item in self.loads if item.kind == "lengths"]
        kinds = {"transformers": [replace(plain[0], connections=1)], "offline": plain}
        return [self.visit(n, n, self.engine, kinds.get(n, self.loads)) for n in names]

    def search(self) -> list[Visit]:
        """This server on each variant of the preset."""
        return [
            self.visit("synthia", f"variant: {name}", variant(self.engine, changes), self.searched)
            for name, changes in self.variants.items()
        ]


def settle(args: argparse.Namespace) -> Setting:
    """What the command line asks for."""
    engine: dict[str, Any] = {}
    api_workers = 1
    if args.preset:
        chosen = yaml.safe_load(args.preset.read_text())
        engine, api_workers = dict(chosen["engine"]), chosen.get("api_workers", 1)
    if args.rehearse:
        engine = {"max_num_seqs": 64, "max_num_batched_tokens": 2048}
        few = ("preset", "twice the tokens a step", "half the places")
        variants = {name: VARIANTS[name] for name in few}
        memory = {"kv_cache_memory_bytes": 1 << 30}
        return Setting("demo", engine | memory, 1, REHEARSED, REHEARSED[:1], variants, True)
    if args.model != "dummy":
        return Setting(args.model, engine, api_workers, LOADS, SEARCHED, VARIANTS, True)
    model = str(write_without_weights(args.out, SYNTHIA))
    engine["load_format"] = "dummy"
    return Setting(model, engine, api_workers, LOADS, SEARCHED, VARIANTS, False)


async def visit(book: Book, visited: Visit, until: float) -> None:
    """Start one contestant, put on it what is missing until it is time, stop it."""
    missing = book.missing(visited)
    if not missing:
        return
    begun = time.monotonic()
    print(f"{visited.label}: {len(missing)} loads to go, {until - begun:.0f} s", flush=True)
    log = book.directory / f"{visited.label}.log"
    starting = contestant(
        visited.target, visited.engine, *visited.options, model=visited.model, log=log
    )
    try:
        async with starting as one:
            book.note_start(visited, time.monotonic() - begun)
            for item in missing:
                if time.monotonic() + book.estimate(visited, item) > until:
                    continue
                found = await measure(one, item, visited)
                book.note(visited, item, found)
                print(f"  {item.name}: {found['tokens_per_second']:,.0f} tokens/s", flush=True)
                write_page(book)
    except (SystemExit, Exception) as error:  # the next one may do better
        book.note_failure(visited, str(error) or type(error).__name__)
        print(f"  {visited.label} failed: {str(error)[-300:]}", flush=True)


async def main(args: argparse.Namespace) -> int:
    heed_sigterm()
    import vllm.benchmarks.serve  # noqa: F401 - now, and not while the first is measured

    clock = Clock(args.minutes)
    args.out.mkdir(parents=True, exist_ok=True)
    setting = settle(args)
    told = {"gpu": gpu(), "preset": setting.engine, "model": setting.model}
    told["rehearsal"] = args.rehearse
    book = Book(args.out, machine() | told)
    watching = watch_gpu(args.out / "gpu.csv")
    contestants, search = setting.contestants(args.targets), setting.search()
    parts = round(len(contestants) / (1 - args.search_share))
    try:
        for number, visited in enumerate(contestants):
            await visit(book, visited, clock.part(parts - number))
        for number, visited in enumerate(search):
            if clock.left() > ENOUGH_S:
                await visit(book, visited, clock.part(len(search) - number))
        for visited in contestants:  # what is missing, while there is time
            if clock.left() > ENOUGH_S:
                await visit(book, visited, clock.part(1))
    finally:
        if watching is not None:
            watching.terminate()
        write_page(book)
    print(f"{args.out / 'page.md'}: {len(book.results)} results")
    return 0


def gpu() -> str:
    """What `nvidia-smi` calls the GPU, its memory and its driver; empty without one."""
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(asked, stdout=subprocess.PIPE, check=True, text=True).stdout.strip()
    return ""


def watch_gpu(file: Path) -> subprocess.Popen[bytes] | None:
    """Have `nvidia-smi` write utilisation, memory and power to `file` each second."""
    if shutil.which("nvidia-smi") is None:
        return None
    fields = "timestamp,utilization.gpu,memory.used,power.draw,clocks.sm"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-l", "1"]
    with file.open("a") as out:
        return subprocess.Popen(command, stdout=out)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where results are, and come to be")
    add("--minutes", type=float, default=25, help="to be over in (default 25)")
    add("--model", default="dummy", help="dummy (the default), or a directory")
    add("--preset", type=Path, metavar="FILE", help="of config/gpu/")
    everything = [*available(), *DIRECT]
    order = ["synthia", "vllm-python", "vllm-rust", "offline", "transformers"]
    add("--targets", nargs="+", choices=everything,
        default=[name for name in order if name in everything])  # fmt: skip
    add("--search-share", type=float, default=0.3, help="of the time, for variants (default 0.3)")
    add("--rehearse", action="store_true", help="on this CPU, with the demo model")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(uvloop.run(main(parse())))
