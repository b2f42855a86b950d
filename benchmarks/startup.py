"""Where the time goes between starting the server and its first 200 on `/ready`.

The server is started several times, cold and warm in turn, with vLLM's log at its most talkative.
A stage lasts from one line of the log to the next one that is looked for; a line that does not
come (there is no worker process where the engine needs none) leaves its stage out, and the time
is the next one's.

- cold: no bytecode, no caches of vLLM, torch or Triton, and no files in the page cache if the
  system lets this script drop it (it says so if not); the model itself stays where it is;
- warm: what is left behind by a start before.

Beside them: what this package's own imports take, by `python -X importtime`.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from lib.report import machine, say, spread, table, write_json
from lib.servers import free_port, heed_sigterm, own_group, serve_command

from synthia_vllm.demo.checkpoint import ensure_demo

EXAMPLES = """\
examples:
  python benchmarks/startup.py                                    the demo model, three times each
  python benchmarks/startup.py --states warm --repeats 5 --json startup.json
  python benchmarks/startup.py --model /models/Synthia-7B-v3.0
  python benchmarks/startup.py -- --engine enforce_eager=false    anything `serve` takes
"""
# The end of each stage is the first line that has this in it.
STAGES: Final = {
    "interpreter, own imports": "] loading vLLM",
    "import vLLM and torch": "] starting the engine process",
    "configuration, engine process to its first line": "(EngineCore pid=",
    "worker process to its first line": "(VllmWorker-0 pid=",
    "engine and worker set up": "Starting to load model",
    "weights": "Loading weights took",
    "size of the KV cache": "KV cache size",
    "KV cache, warm-up, compilation": "init engine (",
    "rest of the engine's start": "READY from local core engine",
    "rest of the server's start": "] ready: ",
}
READY: Final = "first 200 on /ready"
ALL: Final = "all"
OWN: Final = (
    "cli.main", "serve.app", "serve.server", "telemetry.metrics", "settings", "engine.vllm.launch",
    "engine.vllm.client",
)  # fmt: skip
"""The modules that `serve` imports before it imports vLLM."""
IMPORT: Final = re.compile(r"import time:\s*(\d+) \|\s*\d+ \| +(\w+)")
LIMIT_SECONDS: Final = 900


def drop_page_cache() -> str | None:
    """Make the system forget the files it has in memory; what stood in the way, if anything."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError as error:
        return error.strerror
    return None


def cold_environment(place: str) -> dict[str, str]:
    """What makes Python, vLLM, torch and Triton look for their caches where there is nothing."""
    names = (
        "PYTHONPYCACHEPREFIX",
        "VLLM_CACHE_ROOT",
        "TORCHINDUCTOR_CACHE_DIR",
        "TRITON_CACHE_DIR",
    )
    return {name: f"{place}/{name.lower()}" for name in names}


async def start_once(model: str, options: list[str], environ: dict[str, str]) -> dict[str, float]:
    """Start the server, wait until it is ready, stop it. Returns seconds of each stage, and `ALL`.

    Raises `SystemExit` with the end of its log if it does not become ready.
    """
    port = free_port()
    command = [*serve_command(port, model), "--log-level", "debug"]
    begun = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *command,
        *options,
        env=environ | {"VLLM_LOGGING_LEVEL": "DEBUG"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=own_group,
        limit=2**20,
    )
    assert process.stdout is not None
    marks: dict[str, float] = {}
    log: list[str] = []

    async def read(stream: asyncio.StreamReader) -> None:
        async for raw in stream:
            now, line = time.perf_counter() - begun, raw.decode(errors="replace")
            log.append(line)
            for stage, sign in STAGES.items():
                if sign in line:
                    marks.setdefault(stage, now)

    reader = asyncio.create_task(read(process.stdout))
    try:
        while not await asyncio.to_thread(ready, port):
            waited = time.perf_counter() - begun
            if process.returncode is not None or waited > LIMIT_SECONDS:
                raise SystemExit("The server did not start:\n" + "".join(log[-40:]))
            say(f"{waited:5.1f} s, {len(marks)} of {len(STAGES)} stages over")
            await asyncio.sleep(0.05)
        marks[READY] = time.perf_counter() - begun
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()
        await reader
    return durations(marks)


def ready(port: int) -> bool:
    """Whether the server on `port` takes requests."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def durations(marks: dict[str, float]) -> dict[str, float]:
    """Seconds between `marks`, each named by the one at its end, and of `ALL`."""
    found, before = {}, 0.0
    for stage, at in sorted(marks.items(), key=lambda mark: mark[1]):
        found[stage] = at - before
        before = at
    return found | {ALL: before}


def own_imports() -> dict[str, float]:
    """Seconds that importing each package takes before vLLM is imported, and `ALL`."""
    modules = ", ".join(f"synthia_vllm.{name}" for name in OWN)
    command = [sys.executable, "-X", "importtime", "-c", f"import {modules}"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = {}
    for micro, package in IMPORT.findall(run.stderr):
        found[package] = found.get(package, 0.0) + int(micro) / 1e6
    return found | {ALL: sum(found.values())}


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of each thing that was measured, over `runs` that may lack it."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: statistics.median([run[name] for run in runs if name in run]) for name in names}


def report(imports: list[dict[str, float]], runs: dict[str, list[dict[str, float]]]) -> str:
    """Both tables as Markdown: median seconds and range."""
    middle = medians(imports)
    largest = sorted(middle, key=lambda name: -middle[name])[:8]
    rows = [["own imports", "s"]]
    rows += [[name, spread([run.get(name, 0.0) for run in imports])] for name in largest]
    stages = [["stage", *(f"{state}, s" for state in runs)]]
    for stage in [*STAGES, READY, ALL]:
        found = [[run[stage] for run in those if stage in run] for those in runs.values()]
        if any(found):
            stages.append([stage, *(spread(values) if values else "" for values in found)])
    return table(stages) + "\n\n" + table(rows)


async def main(args: argparse.Namespace) -> int:
    heed_sigterm()
    if args.model == "demo":
        ensure_demo(say)  # made once; that is no part of a start
    imports: list[dict[str, float]] = []
    runs: dict[str, list[dict[str, float]]] = {state: [] for state in args.states}
    kept = None
    for number in range(args.repeats):
        imports.append(own_imports())
        for state in args.states:
            say(f"start {number + 1} of {args.repeats}, {state}")
            with tempfile.TemporaryDirectory(prefix="bench-") as place:
                environ = dict(os.environ)
                if state == "cold":
                    environ |= cold_environment(place)
                    kept = drop_page_cache()
                runs[state].append(await start_once(args.model, args.options, environ))
    say("")
    print(report(imports, runs))
    if kept is not None:
        print(f"\nThe page cache could not be dropped ({kept}): cold starts had files in memory.")
    if args.json:
        document = {
            "environment": machine(),
            "model": args.model,
            "options": args.options,
            "page_cache_dropped": "cold" in runs and kept is None,
            "medians": {state: medians(those) for state, those in runs.items()},
            "runs": runs,
            "own_imports": imports,
        }
        write_json(args.json, document)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    states = ("cold", "warm")
    parser.add_argument("--model", default="demo", help="as for `synthia-vllm serve`")
    parser.add_argument("--states", nargs="+", choices=states, default=states)
    parser.add_argument("--repeats", type=int, default=3, help="starts of each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    parser.add_argument("options", nargs="*", metavar="-- OPTIONS", help="more for `serve`")
    sys.exit(asyncio.run(main(parser.parse_args())))
