"""The command itself as a process among processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from serving import free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMAND = str(Path(sys.executable).with_name("synthia-vllm"))
LONG: dict[str, Any] = {
    "model": "synthia-demo",
    "messages": [{"role": "user", "content": "Hello!"}],
    "stream": True,
    "temperature": 0,
    "logit_bias": {"264": 100},  # "a a a a": nothing but `max_tokens` ends it
    "max_tokens": 400,
}


def status(url: str) -> int:
    """Of a GET, or 0 if nobody listens."""
    try:
        return httpx.get(url, timeout=60).status_code  # loading vLLM can hold up a busy machine
    except httpx.TransportError:
        return 0


def children(pid: int) -> list[tuple[int, str]]:
    """All processes below `pid`: (pid, command line)."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):  # a thread or a process that ended meanwhile
            for child in map(int, (task / "children").read_text().split()):
                found.append((child, Path(f"/proc/{child}/cmdline").read_text()))
                found += children(child)
    return found


def sockets(pid: int) -> set[str]:
    """What the kernel calls the sockets that the process has open."""
    links = []
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            links.append(os.readlink(file))
    return {link for link in links if link.startswith("socket:")}


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def read_json_log(log: Path) -> list[dict[str, Any]]:
    """The lines of a log that is JSON, the words of Python's resource tracker left out."""
    lines = log.read_text().splitlines()
    return [
        json.loads(line) for line in lines
        if "resource_tracker" not in line and not line.startswith("  warnings.warn(")
    ]  # fmt: skip


@contextmanager
def command(
    demo: Path, log: Path, *flags: str, program: tuple[str, ...] = (COMMAND,)
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`synthia-vllm serve --model demo` as a process; nothing of it is left behind."""
    port = free_port()
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*program, "serve", "--model", "demo", "--port", str(port), *flags],
            stderr=stderr,
            env=os.environ | {"XDG_CACHE_HOME": str(demo.parent.parent)},
        )
    url = f"http://127.0.0.1:{port}"
    try:
        # While the engine starts, the server is there and says so.
        wait_until(lambda: status(f"{url}/ready") or process.poll() is not None, 60)
        assert process.poll() is None, log.read_text()
        assert status(f"{url}/ready") == 503
        assert status(f"{url}/health") == 503
        refused = httpx.post(f"{url}/v1/chat/completions", json=LONG, timeout=60)
        assert refused.status_code in (401, 503)
        wait_until(lambda: status(f"{url}/ready") == 200 or process.poll() is not None, 240)
        assert process.poll() is None, log.read_text()
        # Whichever API process a connection meets, it serves.
        assert {status(f"{url}/ready") for _ in range(16)} == {200}
        below = [pid for pid, _ in children(process.pid)]
        yield process, url
        wait_until(lambda: not any(alive(pid) for pid in below))
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
