"""The command itself: start, serve, drain, die, as a process among processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from serving import free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMAND = str(Path(sys.executable).with_name("synthia-vllm"))
LONG: dict[str, Any] = {
    "model": "synthia-demo",
    "messages": [{"role": "user", "content": "Hello!"}],
    "stream": True,
    "temperature": 2,
    "top_k": -1,
    "max_tokens": 400,
}


def status(url: str) -> int:
    """Of a GET, or 0 if nobody listens."""
    try:
        return httpx.get(url).status_code
    except httpx.TransportError:
        return 0


def children(pid: int) -> list[tuple[int, str]]:
    """All processes below `pid`: (pid, command line)."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found.append((child, Path(f"/proc/{child}/cmdline").read_text()))
            found += children(child)
    return found


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def command(demo: Path, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`synthia-vllm serve --model demo` as a process; nothing of it is left behind."""
    port = free_port()
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [COMMAND, "serve", "--model", "demo", "--port", str(port)],
            stderr=stderr,
            env=os.environ | {"XDG_CACHE_HOME": str(demo.parent.parent)},
        )
    url = f"http://127.0.0.1:{port}"
    try:
        # While the engine starts, the server is there and says so.
        wait_until(lambda: status(f"{url}/ready") or process.poll() is not None, 60)
        assert status(f"{url}/ready") == 503
        assert status(f"{url}/health") == 503
        assert httpx.post(f"{url}/v1/chat/completions", json=LONG).status_code == 503
        wait_until(lambda: status(f"{url}/ready") == 200 or process.poll() is not None, 240)
        assert process.poll() is None, log.read_text()
        below = [pid for pid, _ in children(process.pid)]
        yield process, url
        wait_until(lambda: not any(alive(pid) for pid in below), 30)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def test_sigterm_drains(demo: Path, tmp_path: Path) -> None:
    """SIGTERM: a running stream ends whole, new requests get 503, the exit code is 0."""
    with command(demo, tmp_path / "log") as (process, url):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: status(f"{url}/ready") == 503)
            refused = httpx.post(f"{url}/v1/chat/completions", json=LONG)
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            *_, last, done, _ = [line for line in lines if line] + [""]
            assert done == "data: [DONE]"
            assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"]
        assert process.wait(60) == 0
    said = (tmp_path / "log").read_text()
    steps = [line for line in said.splitlines() if line.startswith("[")]
    assert [step.split("] ")[1].split()[0] for step in steps] == ["loading", "starting", "ready:"]
    assert "Traceback" not in said


def test_death_of_the_engine(demo: Path, tmp_path: Path) -> None:
    """SIGKILL of the engine core: open streams get an error event, the process exits with 1."""
    with command(demo, tmp_path / "log") as (process, url):
        [core] = [pid for pid, line in children(process.pid) if "EngineCore" in line]
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(core, signal.SIGKILL)
            *_, last = [line for line in lines if line]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_dead"
        assert process.wait(60) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--print-config", "--engine", "max_modle_len=5"], "max_modle_len"),
        (["--model", "demo", "--engine", "max_model_len=long"], "max-model-len"),
        (["--model", "/no/such/dir"], "--model demo"),
        (["--port", "notanumber"], "port"),
    ],
)
def test_wrong_starts_are_plain_errors(flags: list[str], said: str) -> None:
    """A wrong flag ends the command with code 2 and a message, without a traceback."""
    done = subprocess.run(
        [COMMAND, "serve", *flags],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
