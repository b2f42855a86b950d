"""Who used what, from the socket to the ledger: the sums are what clients were told."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from chat_api import BODY, PIECES, events, key_file, post
from serving import Running, free_port, running, wait_until

from synthia_vllm.cli.main import main
from synthia_vllm.engine.fake import FakeEngine
from synthia_vllm.errors import EngineFault
from synthia_vllm.ledger import writer
from synthia_vllm.settings import Batches

if TYPE_CHECKING:
    from collections.abc import Iterator

FAKE_SERVER = Path(__file__).parent.parent / "fake_server.py"
RAW = {"model": "synthia-demo", "prompt": "Once"}
MESSAGES = BODY | {"max_tokens": 50}
RESPONSES = {"model": "synthia-demo", "input": "Hi"}
NUMBERS = ("requests", "refused", "prompt_tokens", "cached_tokens", "answer_tokens")


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A ledger of this test alone."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("SYNTHIA_LEDGER", raising=False)


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, dict[str, str]]:
    return key_file(tmp_path / "keys.yaml", alice={}, bob={"requests_per_minute": 2})


@pytest.fixture
def server(tmp_path: Path, keys: dict[str, dict[str, str]]) -> Iterator[Running]:
    with running(
        FakeEngine(PIECES),
        keys_file=tmp_path / "keys.yaml",
        batches=Batches(directory=tmp_path / "batches"),
    ) as here:
        yield here


def used(*arguments: str) -> list[dict[str, Any]]:
    """What the command prints as CSV, with numbers."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert main(["usage", "--csv", *arguments]) == 0
    out.seek(0)
    return [
        {name: int(value) if name in NUMBERS else value for name, value in row.items()}
        for row in csv.DictReader(out)
    ]


def of(user: str, *by: str) -> list[dict[str, Any]]:
    return [row for row in used("--by", ",".join(("user", *by))) if row["user"] == user]


def test_the_sums_are_what_clients_were_told(
    server: Running, keys: dict[str, dict[str, str]]
) -> None:
    """On every route, plain and streamed; refusals by their user; what is not known as such."""
    told: Counter[str] = Counter()
    for path, body in (
        ("/v1/chat/completions", BODY),
        ("/v1/completions", RAW | {"n": 2}),
        ("/v1/messages", MESSAGES),
        ("/v1/responses", RESPONSES),
    ):
        for _ in range(2):
            answer = httpx.post(f"{server.url}{path}", json=body, headers=keys["alice"])
            usage = answer.json()["usage"]
            told["prompt_tokens"] += usage.get("prompt_tokens", usage.get("input_tokens"))
            told["answer_tokens"] += usage.get("completion_tokens", usage.get("output_tokens"))
    stream = BODY | {"stream": True, "stream_options": {"include_usage": True}}
    usage = events(post(server, stream, headers=keys["alice"]))[-1]["usage"]
    told["prompt_tokens"] += usage["prompt_tokens"]
    told["answer_tokens"] += usage["completion_tokens"]
    for body in (BODY | {"temperature": 9}, BODY | {"model": "x"}):
        assert post(server, body, headers=keys["alice"]).is_client_error
    statuses = [post(server, headers=keys["bob"]).status_code for _ in range(4)]
    assert statuses == [200, 200, 429, 429]
    assert post(server).status_code == 401
    wait_until(lambda: len(used("--by", "user")) == 3 and of("bob")[0]["requests"] == 4)
    [alice] = of("alice")
    assert (alice["requests"], alice["refused"]) == (11, 2)
    assert {name: alice[name] for name in told} == told
    [bob] = of("bob")
    assert (bob["requests"], bob["refused"]) == (4, 2)
    [nobody] = of("-", "model", "route")
    assert (nobody["model"], nobody["route"], nobody["refused"]) == ("-", "/v1/chat/completions", 1)
    routes = {row["route"]: row["requests"] for row in of("alice", "route")}
    assert routes == {
        "/v1/chat/completions": 5,
        "/v1/completions": 2,
        "/v1/messages": 2,
        "/v1/responses": 2,
    }
    models = {row["model"]: row["refused"] for row in of("alice", "model")}
    assert models == {"synthia-demo": 0, "-": 2}


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_broken_off_counts_as_far_as_it_ran(stream: bool) -> None:
    """By the deadline, by a fault, by the server's end: as the error tells it, and the log."""
    with running(FakeEngine((" a",) * 1000, delay=0.02)) as server:
        body = BODY | {"stream": stream}
        answer = post(server, body, headers={"X-Request-Timeout": "0.3"})
        wait_until(lambda: of("anonymous"))
        [row] = of("anonymous")
        assert row["answer_tokens"] > 0
        assert (row["requests"], row["refused"]) == (1, 0 if stream else 1)
        if stream:
            usage = events(answer)[-1]["error"]["usage"]
            assert usage["completion_tokens"] == row["answer_tokens"]
            assert usage["prompt_tokens"] == row["prompt_tokens"]
    with running(FakeEngine(fault=EngineFault(), fault_at=2)) as server:
        post(server, body)
    [row] = of("anonymous")
    assert (row["requests"], row["refused"]) == (2, 0 if stream else 2)


def test_lines_of_batches(
    server: Running, keys: dict[str, dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    """Each counts once under its user, as its answer says, and has a line in the log."""
    caplog.set_level("INFO")
    lines = [
        {"custom_id": f"{n}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for n, body in enumerate([BODY, BODY, BODY | {"temperature": 9}])
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    client = server.client.with_options(api_key=keys["alice"]["Authorization"].split()[1])
    file = client.files.create(file=("asked.jsonl", content), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    wait_until(lambda: client.batches.retrieve(batch.id).status == "completed")
    output = client.batches.retrieve(batch.id).output_file_id
    assert output is not None
    answers = [json.loads(line) for line in client.files.content(output).text.splitlines()]
    told = sum(line["response"]["body"]["usage"]["completion_tokens"] for line in answers)
    wait_until(lambda: of("alice", "route"))
    [row] = of("alice", "route")
    assert row["route"] == "/v1/batches"
    assert (row["requests"], row["refused"], row["answer_tokens"]) == (3, 1, told)
    logged = [vars(r)["fields"] for r in caplog.records if r.getMessage() == "batch line"]
    assert sorted(line["status"] for line in logged) == [200, 200, 400]
    assert sum(line["answer_tokens"] for line in logged) == told
    assert {line["user"] for line in logged} == {"alice"}


def test_a_user_sees_its_own(server: Running, keys: dict[str, dict[str, str]]) -> None:
    """And nobody else's; what cannot be asked for is refused by name."""

    def ask(asks: str, **query: str) -> httpx.Response:
        return httpx.get(f"{server.url}/v1/usage", params=query, headers=keys[asks])

    usage = post(server, headers=keys["alice"]).json()["usage"]
    wait_until(lambda: ask("alice").json()["data"])
    seen = ask("alice", by="day,model,route").json()
    assert seen["object"] == "list"
    [row] = seen["data"]
    assert row.pop("seconds") > 0
    day = row.pop("day")
    assert row == {
        "object": "usage",
        "model": "synthia-demo",
        "route": "/v1/chat/completions",
        "requests": 1,
        "refused": 0,
        "prompt_tokens": usage["prompt_tokens"],
        "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "answer_tokens": usage["completion_tokens"],
    }
    assert ask("bob").json()["data"] == []
    assert ask("alice", since=day, until=f"{day}T23:30").json()["data"] != []
    assert ask("alice", until=day).json()["data"] == []
    assert httpx.get(f"{server.url}/v1/usage").status_code == 401
    for name, value in (
        ("by", "user"), ("by", ""), ("since", "yesterday"), ("until", "2026-13-01"),
        ("user", "bob"),
    ):  # fmt: skip
        refused = ask("alice", **{name: value})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == name
    assert (
        "/v1/usage" in httpx.get(f"{server.url}/openapi.json", headers=keys["bob"]).json()["paths"]
    )


def test_a_ledger_that_cannot_be_read(server: Running, keys: dict[str, dict[str, str]]) -> None:
    """Answers go on; usage is told later."""
    ledger = server.app.server_state.ledger
    assert ledger is not None
    Path(str(ledger._database)).write_text("x" * 5000)
    assert post(server, headers=keys["alice"]).status_code == 200
    wait_until(lambda: server.value("synthia_ledger_waiting_rows") == 1)
    told = httpx.get(f"{server.url}/v1/usage", headers=keys["alice"])
    assert (told.status_code, told.json()["error"]["code"]) == (503, "ledger_away")
    Path(str(ledger._database)).unlink()
    wait_until(lambda: server.value("synthia_ledger_waiting_rows") == 0)
    assert of("alice")[0]["requests"] == 1


def test_without_a_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written, and whoever asks is told why there is nothing."""
    with running(FakeEngine(PIECES), ledger="none") as server:
        post(server)
        told = httpx.get(f"{server.url}/v1/usage")
    assert told.status_code == 404
    assert told.json()["error"]["code"] == "ledger_off"
    assert "`ledger`" in told.json()["error"]["message"]
    assert not (tmp_path / "synthia-vllm").exists()
    assert main(["usage"]) == 2
    assert "There is no ledger" in capsys.readouterr().err
    assert main(["usage", "--ledger", "none"]) == 2
    assert "keeps no ledger" in capsys.readouterr().err


def test_the_end_of_a_server_writes_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is stopped has written all it counted."""
    monkeypatch.setattr(writer, "_EVERY_S", 1000)
    with running(FakeEngine(PIECES)) as server:
        for _ in range(3):
            post(server)
        assert used() == []
    assert of("anonymous")[0]["requests"] == 3


def test_kill_9_loses_the_last_second(tmp_path: Path) -> None:
    """The ledger is a beginning of the log, and what it lacks is of the last moment.

    The log in turn has what clients were told, but for what was told in the instant of the end.
    """
    port, log = free_port(), tmp_path / "log"
    told: list[dict[str, Any]] = []
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, FAKE_SERVER, str(port), str(tmp_path / "batches"), "0.001"],
            stderr=stderr, env=os.environ,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    clients = 4

    def ask() -> None:
        with httpx.Client(timeout=30) as client:
            while True:
                try:
                    answer = client.post(f"{url}/v1/chat/completions", json=BODY)
                except httpx.TransportError:
                    return
                if answer.status_code == 200:
                    told.append(answer.json())

    try:
        wait_until(lambda: _ready(url) or process.poll() is not None)
        threads = [threading.Thread(target=ask) for _ in range(clients)]
        for thread in threads:
            thread.start()
        wait_until(lambda: used_now() > 50)  # several writes
        process.send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join()
    finally:
        process.kill()
        process.wait()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines = [line for line in lines if line["message"] == "chat"]
    [row] = of("anonymous")
    written, missing = lines[: row["requests"]], lines[row["requests"] :]
    for name in ("prompt_tokens", "cached_tokens", "answer_tokens"):
        assert row[name] == sum(line[name] for line in written)
    if missing:
        # A second, and what this machine makes of one when it is busy.
        assert _seconds(lines[-1]) - _seconds(missing[0]) < 5
    logged = {line["id"]: line["answer_tokens"] for line in lines}
    known = [answer for answer in told if answer["id"].removeprefix("chatcmpl-") in logged]
    assert len(told) - len(known) <= clients
    for answer in known:
        number = logged[answer["id"].removeprefix("chatcmpl-")]
        assert number == answer["usage"]["completion_tokens"]


def used_now() -> int:
    """Requests in the ledger of a server that may not have begun one."""
    place = Path(os.environ["XDG_STATE_HOME"]) / "synthia-vllm/usage.sqlite"
    return sum(row["requests"] for row in used()) if place.stat().st_size else 0


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False


def _seconds(line: dict[str, Any]) -> float:
    from datetime import datetime

    return datetime.fromisoformat(line["time"]).timestamp()


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A table for people, CSV and JSON for programs; faults are named."""
    with running(FakeEngine(PIECES)) as server:
        for _ in range(3):
            post(server)
    assert main(["usage", "--by", "user,hour"]) == 0
    shown = capsys.readouterr()
    heading, row, total = shown.out.splitlines()
    assert heading.split() == [
        "user", "hour", "requests", "refused", "prompt", "cached", "answer", "seconds",
    ]  # fmt: skip
    assert row.split()[0] == "anonymous"
    assert row.split()[2:] == total.split()[1:]
    assert "UTC" in shown.err
    assert main(["usage", "--json", "--since", "2026-01-01T00:00Z"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert (found["user"], found["model"], found["requests"]) == ("anonymous", "synthia-demo", 3)
    assert main(["usage", "--until", "2026-01-01"]) == 0
    assert "Nothing was used" in capsys.readouterr().err
    config = tmp_path / "c.yaml"
    config.write_text(f"ledger: sqlite:///{tmp_path}/synthia-vllm/usage.sqlite\nport: 1\n")
    assert main(["usage", "--config", str(config)]) == 0
    assert "anonymous" in capsys.readouterr().out
    (tmp_path / "text").write_text("x" * 5000)
    for arguments, said in (
        (["--by", "month"], "--by: it can be user, model, route, day, hour"),
        (["--since", "monday"], "--since: a date such as 2026-01-31"),
        (["--ledger", f"sqlite:///{tmp_path}/none.sqlite"], "There is no ledger"),
        (["--ledger", f"sqlite:///{tmp_path}/text"], "cannot be read: file is not a database"),
        (["--ledger", "mysql://u:hunter2@h/d"], "--ledger: ledger: The ledger should be"),
        (["--ledger", "postgresql://u:hunter2@127.0.0.1:1/d"], "refused"),
    ):
        assert main(["usage", *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert "hunter2" not in error


@pytest.mark.parametrize(
    "address",
    [
        "mysql://u:hunter2@h/d",
        "postgresql://u:hunter2",
        "postgresql://u:hunter2@h:port/d",
        "postgresql://u@h/d?password=hunter2",
        "sqlite://",
        "usage.sqlite",
    ],
)
def test_what_is_no_address(
    address: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It is said what one looks like, from where it came, and nothing of a password."""
    assert main(["serve", "--print-config", "--set", f"ledger={address}"]) == 2
    error = capsys.readouterr().err
    assert "--set ledger=" in error
    assert "The ledger should " in error
    assert "hunter2" not in error
    config = tmp_path / "c.yaml"
    for content in (f"ledger: {address}\n", f"ledger: [{address}\nport: 1: 2\n"):
        config.write_text(content)
        assert main(["serve", "--print-config", "--config", str(config)]) == 2
        assert "hunter2" not in capsys.readouterr().err


def test_a_password_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    address = "postgres://u:hun%40ter2@h/d"
    assert main(["serve", "--print-config", "--set", f"ledger={address}"]) == 0
    assert "ledger: postgresql+psycopg://u:***@h/d" in capsys.readouterr().out
