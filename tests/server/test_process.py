"""The command itself: start, serve, drain, die, as a process among processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from processes import COMMAND, LONG, alive, children, command, read_json_log, sockets, status
from serving import free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator


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


@pytest.mark.parametrize("victim", ["EngineCore", "Worker"])
def test_death_of_the_engine(demo: Path, tmp_path: Path, victim: str) -> None:
    """SIGKILL of an engine process: every open request is told, the process exits with 1."""
    log = tmp_path / "log"
    as_json = ("--set", "log_format=json")
    with command(demo, log, *as_json) as (process, url), ThreadPoolExecutor(1) as pool:
        [core] = [pid for pid, line in children(process.pid) if victim in line]
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            plain = pool.submit(
                httpx.post, f"{url}/v1/chat/completions", json=LONG | {"stream": False}, timeout=60
            )
            wait_until(lambda: "synthia_requests_in_flight 2" in httpx.get(f"{url}/metrics").text)
            os.kill(core, signal.SIGKILL)
            *_, last = [line for line in lines if line]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_dead"
            assert plain.result().json()["error"]["code"] == "engine_dead"
        assert process.wait(60) == 1
    said = read_json_log(log)
    assert [line["message"].split()[0] for line in said if "seconds" in line] == [
        "loading", "starting", "ready:",
    ]  # fmt: skip
    assert said[-1]["level"] == "critical"


def shared_memory(pid: int) -> set[Path]:
    """Segments that the process has mapped: those of vLLM's message queues."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return {Path(name) for name in re.findall(r"(/dev/shm/psm_\S+)", maps)}


def run_directories(place: Path) -> list[Path]:
    """Of servers that run, or have left them; the locks by which they share processors stay."""
    return [path for path in place.glob("synthia-vllm-*") if "-cores-" not in path.name]


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory with a name short enough for the sockets in it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        yield Path(directory)


def test_death_of_the_server(
    demo: Path, tmp_path: Path, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of the server: its engine ends too, and no memory or socket is left behind."""
    monkeypatch.setenv("TMPDIR", str(short_path))
    with command(demo, tmp_path / "log") as (process, url):
        below = children(process.pid)
        segments = set().union(*(shared_memory(pid) for pid, _ in below))
        assert segments
        assert run_directories(short_path)
        # Nobody but the server holds the port: its processes are not forked from it.
        assert any("forkserver" in line for _, line in below)
        mine, theirs = sockets(process.pid), [sockets(pid) for pid, _ in below]
        assert mine
        assert not any(mine & others for others in theirs)
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG, timeout=60) as response:
            lines = response.iter_lines()  # who forgets it hangs up
            next(lines)
            process.kill()
    # `command` has seen the end of all processes.
    wait_until(lambda: not any(segment.exists() for segment in segments))
    assert not run_directories(short_path)


@pytest.mark.costly
@pytest.mark.parametrize("workers", ["1", "2"])
def test_as_on_a_gpu(demo: Path, tmp_path: Path, workers: str) -> None:
    """Processes are spawned, nothing is forked; it serves, and ends with its children, the same."""
    program = (sys.executable, str(Path(__file__).parents[1] / "as_gpu.py"))
    flags = ("--api-workers", workers)
    with command(demo, tmp_path / "log", *flags, program=program) as (process, url):
        lines = [line for _, line in children(process.pid)]
        assert any("EngineCore" in line or "spawn_main" in line for line in lines)
        assert not any("forkserver" in line and "coordinator" not in line for line in lines), lines
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG, timeout=60) as response:
            last = [line for line in response.iter_lines() if line][-1]
        assert last == "data: [DONE]"
        process.terminate()
        assert process.wait(60) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_second_sigterm_is_immediate(demo: Path, tmp_path: Path) -> None:
    """SIGHUP reads the keys again; a second SIGTERM does not wait for answers."""
    log, file = tmp_path / "log", tmp_path / "keys.yaml"
    made = subprocess.run(
        [COMMAND, "keys", "new", "alice", "--file", str(file)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    headers = {"Authorization": f"Bearer {made.stdout.strip()}"}
    with command(demo, log, "--set", f"keys_file={file}") as (process, url):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: "The key file was read: 1 users" in log.read_text())
        with httpx.stream(
            "POST",
            f"{url}/v1/chat/completions",
            json=LONG | {"max_tokens": 1500},
            headers=headers,
            timeout=60,
        ) as response:
            lines = response.iter_lines()  # who forgets it hangs up
            next(lines)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: status(f"{url}/ready") == 503)
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 1
        assert made.stdout.strip() not in log.read_text()


def test_sigterm_while_starting(demo: Path, tmp_path: Path) -> None:
    """A server that is stopped before it is ready ends with 0 and leaves no process."""
    port = free_port()
    with (tmp_path / "log").open("w") as stderr:
        process = subprocess.Popen(
            [COMMAND, "serve", "--model", "demo", "--port", str(port)],
            stderr=stderr,
            env=os.environ | {"XDG_CACHE_HOME": str(demo.parent.parent)},
        )
    try:
        wait_until(lambda: any("EngineCore" in line for _, line in children(process.pid)), 120)
        below = [pid for pid, _ in children(process.pid)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        wait_until(lambda: not any(alive(pid) for pid in below))
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


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


@pytest.mark.costly
def test_a_batch_that_was_killed_goes_on(demo: Path, tmp_path: Path) -> None:
    """`synthia-vllm batch` with its own server, which ends with it; the next run does the rest."""
    asked, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = LONG | {"max_tokens": 200}
    del body["stream"]
    lines = [
        {"custom_id": f"{n}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for n in range(200)
    ]
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--model", "demo", "--engine", "max_num_seqs=16")
    run = [COMMAND, "batch", str(asked), "-o", str(answers), *options]
    environ = os.environ | {"XDG_CACHE_HOME": str(demo.parent.parent)}
    with subprocess.Popen(run, env=environ) as first:
        store = tmp_path / "out.jsonl.batch" / "anonymous" / "batches"
        wait_until(lambda: [*store.glob("*/output")], 240)
        below = [pid for pid, _ in children(first.pid)]
        first.kill()
    wait_until(lambda: not any(alive(pid) for pid in below))
    [some] = store.glob("*/output")
    before = some.read_text().splitlines()
    assert 0 < len(before) < 200
    assert not answers.exists()
    subprocess.run(run, env=environ, check=True, timeout=300)
    told = answers.read_text().splitlines()
    assert told[: len(before)] == before
    assert sorted(int(json.loads(line)["custom_id"]) for line in told) == [*range(200)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
