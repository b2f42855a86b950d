"""Several API processes on one engine: one server to its users, also when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml
from openai import OpenAI
from processes import COMMAND, LONG, alive, children, command, read_json_log, status
from serving import wait_until

from synthia_vllm.admission.users import new_key

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

SHORT: dict[str, Any] = LONG | {"max_tokens": 5, "stream": False}


def api_processes(pid: int) -> list[int]:
    """The server's API processes: each leads a group of its own."""
    return [child for child, _ in children(pid) if os.getpgid(child) == child]


def owner(connection: httpx.Response, workers: list[int]) -> int:
    """Which of `workers` has the other end of the connection that brought the response."""
    here: socket.socket = connection.extensions["network_stream"].get_extra_info("socket")
    mine, theirs = (f"{port:04X}" for port in (here.getsockname()[1], here.getpeername()[1]))
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    [inode] = [
        fields[9] for fields in lines
        if fields[1].endswith(f":{theirs}") and fields[2].endswith(f":{mine}")
    ]  # fmt: skip
    for worker in workers:
        for file in Path(f"/proc/{worker}/fd").iterdir():
            if file.is_symlink() and os.readlink(file) == f"socket:[{inode}]":
                return worker
    raise AssertionError("nobody has it")


def series(url: str) -> dict[str, float]:
    """All samples of `/metrics`."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def events(lines: Iterator[str]) -> list[str]:
    """The rest of a stream; what came, where it broke."""
    found = []
    try:
        for line in lines:
            if line:
                found.append(line)
    except httpx.TransportError as error:
        found.append(type(error).__name__)
    return found


@dataclass
class Pair:
    """A server of two API processes, and its users' keys."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    file: Path
    keys: dict[str, tuple[str, str]]

    def let_in(self, **users: dict[str, object]) -> None:
        """Make these the users, with these limits."""
        document = {
            name: {"keys": [self.keys[name][1]], **limits} for name, limits in users.items()
        }
        self.file.write_text(yaml.safe_dump({"users": document}))

    def key(self, name: str) -> dict[str, str]:
        """The headers of a user's requests."""
        return {"Authorization": f"Bearer {self.keys[name][0]}"}

    def ask(self, name: str, times: int) -> list[httpx.Response]:
        """The answers to as many short requests at once, over connections of their own."""
        with ThreadPoolExecutor(times) as pool:
            asked = [
                pool.submit(httpx.post, self.chat, json=SHORT, headers=self.key(name), timeout=60)
                for _ in range(times)
            ]
            return [answer.result() for answer in asked]

    @property
    def chat(self) -> str:
        return f"{self.url}/v1/chat/completions"

    def said(self, text: str) -> bool:
        """Whether `text` is in the log."""
        return text in self.log.read_text()


@pytest.fixture(scope="module")
def pair(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A server of two API processes for the tests that leave it alive."""
    place = tmp_path_factory.mktemp("workers")
    log, file = place / "log", place / "keys.yaml"
    keys = {name: new_key() for name in ("alice", "bob", "carol")}
    file.write_text("users: {}")
    flags = ("--set", f"keys_file={file}", "--set", f"batches.directory={place / 'batches'}")
    ledger = ("--set", f"ledger=sqlite:///{place / 'usage.sqlite'}")
    with command(demo, log, "--api-workers", "2", *flags, *ledger) as (process, url):
        here = Pair(process, url, log, file, keys)
        wait_until(lambda: here.said("2 API processes"))
        here.let_in(alice={"requests_per_minute": 5}, bob={"concurrent_requests": 8}, carol={})
        wait_until(lambda: here.said("The key file was read: 3 users"))
        yield here
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert not here.said("Traceback")
    assert not any(here.said(key) for key, _ in keys.values())


def test_limits_and_metrics_are_one(pair: Pair) -> None:
    """A limit holds over all processes, and any of them tells what all have counted."""
    answers = pair.ask("alice", 20)
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [429] * 15
    [text] = {a.json()["choices"][0]["message"]["content"] for a in answers if a.is_success}
    assert text == "a a a a a"
    values = series(pair.url)
    assert values['synthia_user_tokens_total{kind="answer",user="alice"}'] == 25
    refusals = 'synthia_user_refusals_total{code="requests_per_minute",user="alice"}'
    assert values[refusals] == 15


def test_the_ledger_is_one(pair: Pair) -> None:
    """What each process has answered is in it, and a user sees it by whichever it meets."""

    def usage() -> dict[str, int]:
        told = httpx.get(f"{pair.url}/v1/usage", params={"by": "route"}, headers=pair.key("bob"))
        [row] = told.json()["data"] or [{"requests": 0}]
        return dict(row)

    before = usage()["requests"]
    answers = pair.ask("bob", 8)
    assert {answer.status_code for answer in answers} == {200}
    wait_until(lambda: usage()["requests"] == before + 8)
    told = usage()
    assert told["answer_tokens"] - 5 * told["requests"] == 0
    assert series(pair.url)["synthia_ledger_waiting_rows"] == 0


def test_batches_outlive_the_process_that_runs_them(pair: Pair) -> None:
    """One of them runs all; where it is killed, another goes on, and each line is answered once."""
    lines = [
        {"custom_id": f"{n}", "method": "POST", "url": "/v1/chat/completions",
         "body": SHORT | {"max_tokens": 50}}
        for n in range(300)
    ]  # fmt: skip
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with OpenAI(base_url=f"{pair.url}/v1", api_key=pair.keys["carol"][0]) as client:
        batches = []
        for _ in range(2):
            file = client.files.create(file=content, purpose="batch")
            batches.append(
                client.batches.create(
                    input_file_id=file.id,
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                )
            )
        running = "synthia_batch_running"
        done = 'synthia_batch_lines_total{result="completed"}'
        wait_until(lambda: series(pair.url).get(done, 0) > 20)
        assert 0 < series(pair.url)[running] < 256
        [runner] = [pid for pid in api_processes(pair.process.pid) if _has_open(pid, ".lock")]
        os.kill(runner, signal.SIGKILL)
        for batch in batches:
            wait_until(partial(_completed, client, batch.id))
            output = client.batches.retrieve(batch.id).output_file_id
            assert output is not None
            told = [json.loads(line) for line in client.files.content(output).text.splitlines()]
            assert sorted(int(line["custom_id"]) for line in told) == [*range(300)]
            texts = {line["response"]["body"]["choices"][0]["message"]["content"] for line in told}
            assert texts == {" ".join("a" * 50)}
    wait_until(lambda: len(api_processes(pair.process.pid)) == 2)


def _completed(client: OpenAI, batch_id: str) -> bool:
    return client.batches.retrieve(batch_id).status == "completed"


def _has_open(pid: int, ending: str) -> bool:
    """Whether a process has a file open whose name ends so."""
    links = []
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            links.append(os.readlink(file))
    return any(link.endswith(ending) for link in links)


def test_a_process_dies(pair: Pair) -> None:
    """It costs its own streams; its places are free, and another takes its place."""
    before = series(pair.url)
    workers = api_processes(pair.process.pid)
    assert len(workers) == 2
    body = LONG | {"max_tokens": 1000}
    with ExitStack() as streams:
        responses = [
            streams.enter_context(
                httpx.stream("POST", pair.chat, json=body, headers=pair.key("bob"), timeout=60)
            )
            for _ in range(8)
        ]
        [refused] = pair.ask("bob", 1)
        assert refused.json()["error"]["code"] == "concurrent_requests"
        owners = [owner(response, workers) for response in responses]
        victim = owners[0]
        os.kill(victim, signal.SIGKILL)
        ends = [events(response.iter_lines())[-1] for response in responses]
        for whose, end in zip(owners, ends, strict=True):
            assert end == ("RemoteProtocolError" if whose == victim else "data: [DONE]")
    wait_until(lambda: pair.said("Another takes its place"))
    wait_until(lambda: len(api_processes(pair.process.pid)) == 2)
    assert victim not in api_processes(pair.process.pid)
    wait_until(lambda: series(pair.url)["synthia_requests_in_flight"] == 0)
    assert {answer.status_code for answer in pair.ask("bob", 8)} == {200}
    after = series(pair.url)
    [running] = [value for name, value in after.items() if "num_requests_running" in name]
    assert running <= 1  # the last statistics there are may be of the last step
    counted = {name for name, value in before.items() if "synthia_user" in name and value}
    assert counted
    assert all(after[name] >= before[name] for name in counted)


def test_keys_are_news_to_all(pair: Pair) -> None:
    """A change of the key file reaches all processes; a bad one, none."""
    pair.let_in(bob={}, carol={}, alice={})
    wait_until(lambda: pair.said("The key file was read: 3 users"))
    pair.let_in(carol={})
    wait_until(lambda: pair.said("The key file was read: 1 users"))
    assert {answer.status_code for answer in pair.ask("carol", 8)} == {200}
    assert {answer.status_code for answer in pair.ask("alice", 8)} == {401}
    pair.file.write_text("users: [")
    pair.process.send_signal(signal.SIGHUP)
    wait_until(lambda: pair.said("The users stay as they were"))
    # Once for the signal and, where the look of each second came before it, once for that.
    wait_until(lambda: series(pair.url)["synthia_key_reload_failures_total"] in (1, 2))
    assert {answer.status_code for answer in pair.ask("carol", 8)} == {200}


def test_stopping_all(demo: Path, tmp_path: Path) -> None:
    """The first SIGTERM lets all finish; the second waits for nothing."""
    body = LONG | {"max_tokens": 1500}
    with command(demo, tmp_path / "log", "--api-workers", "2") as (process, url), ExitStack() as s:
        wait_until(lambda: "2 API processes" in (tmp_path / "log").read_text())
        chat = f"{url}/v1/chat/completions"
        lines = [
            s.enter_context(
                httpx.stream("POST", chat, json=body | {"max_tokens": length}, timeout=60)
            ).iter_lines()
            for length in (300, 300, 300, 300, 1900)
        ]
        for stream in lines:
            next(stream)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: status(f"{url}/ready") in (0, 503))
        for stream in lines[:4]:
            assert events(stream)[-1] == "data: [DONE]"
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 1


def test_death_of_the_shared_engine(demo: Path, tmp_path: Path) -> None:
    """SIGKILL of the engine: the streams of all API processes are told, the exit code is 1."""
    flags = ("--api-workers", "2", "--set", "log_format=json")
    with command(demo, tmp_path / "log", *flags) as (process, url), ExitStack() as s:
        wait_until(lambda: "2 API processes" in (tmp_path / "log").read_text())
        chat = f"{url}/v1/chat/completions"
        responses = [
            s.enter_context(httpx.stream("POST", chat, json=LONG, timeout=60)) for _ in range(8)
        ]
        [core] = [pid for pid, line in children(process.pid) if "EngineCore" in line]
        os.kill(core, signal.SIGKILL)
        for response in responses:
            last = events(response.iter_lines())[-1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_dead"
        assert process.wait(30) == 1
    said = read_json_log(tmp_path / "log")
    assert {line["message"] for line in said if line["logger"].endswith("handler")} == {"chat"}
    assert "critical" in {line["level"] for line in said}


def test_death_of_the_supervisor(demo: Path, tmp_path: Path) -> None:
    """SIGKILL of it ends all, of several engines too; a port that is taken is said at once."""
    flags = ("--api-workers", "2", "--engine", "data_parallel_size=2")
    with command(demo, tmp_path / "log", *flags) as (process, url):
        wait_until(lambda: "2 API processes" in (tmp_path / "log").read_text())
        with ThreadPoolExecutor(16) as pool:
            asked = [pool.submit(httpx.post, f"{url}/v1/chat/completions", json=SHORT, timeout=60)
                     for _ in range(16)]  # fmt: skip
        assert {answer.result().status_code for answer in asked} == {200}
        ended = [
            value for name, value in series(url).items()
            if name.startswith("vllm:request_success_total") and 'reason="length"' in name
        ]  # fmt: skip
        assert sum(ended) == 16
        assert len(ended) == 2
        assert min(ended) > 0  # both engines had work
        for workers in ("1", "3"):
            other = subprocess.run(
                [COMMAND, "serve", "--model", "demo", "--port", url.rsplit(":", 1)[1],
                 "--api-workers", workers],
                env=os.environ | {"XDG_CACHE_HOME": str(demo.parent.parent)},
                capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            assert other.returncode == 2, other.stderr
            assert "Cannot listen on" in other.stderr
        below = [pid for pid, _ in children(process.pid)]
        process.kill()
        wait_until(lambda: not any(alive(pid) for pid in below))
        assert status(f"{url}/ready") == 0
