"""The ledger in a real PostgreSQL: many writers, answers that are lost, a server that is gone."""

from __future__ import annotations

import json
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import pytest
from postgres import Postgres, postgres
from serving import free_port, wait_until

from synthia_vllm.cli.main import main
from synthia_vllm.errors import StartupError
from synthia_vllm.ledger import database as module
from synthia_vllm.ledger import writer
from synthia_vllm.ledger.database import Away, Database
from synthia_vllm.ledger.place import parse
from synthia_vllm.ledger.rows import Key, Rows, Used, parse_time
from synthia_vllm.ledger.writer import Ledger, open_database, open_ledger

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as here:
        yield here


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(writer, "_EVERY_S", 0.01)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def empty(server: Postgres) -> Postgres:
    """The server without the tables, which the first who writes makes."""
    server.ask("DROP TABLE IF EXISTS synthia_usage, synthia_usage_writers")
    return server


class Told:
    """What a ledger says of itself."""

    waiting = 0

    def wait(self, rows: int) -> None:
        self.waiting = rows


def ledger_at(address: str) -> tuple[Ledger, Told]:
    told = Told()
    ledger = open_ledger(address, on_waiting=told.wait, on_lost=lambda rows: None)
    assert ledger is not None
    return ledger, told


def use(ledger: Ledger, user: str = "alice") -> None:
    ledger.add(Used(user, "m", "/v1/x", False, 3, 1, 2, 0.5))


def requests(server: Postgres) -> int:
    [(total,)] = server.ask("SELECT coalesce(sum(requests), 0) FROM synthia_usage")
    return int(total)


def test_many_writers(empty: Postgres) -> None:
    """They make the tables once, do not wait for each other's rows, and lose nothing."""
    hour = parse_time("2026-01-31T23:00Z")
    rows: Rows = {Key(f"u{n}", "m", "r", hour): [1, 0, 5, 3, 7, 0.5] for n in range(50)}

    def write(number: int) -> None:
        database = Database(parse(empty.address))
        mixed = list(rows.items())
        mixed = mixed[number:] + mixed[:number]
        for sequence in (1, 2, 2, 1, 3):
            database.add(f"w{number}", sequence, dict(mixed))
        database.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    database = Database(parse(empty.address))
    assert [row["requests"] for row in database.totals(["user"])] == [24] * 50
    assert database.totals(["day"]) == [
        {"day": "2026-01-31", "requests": 1200, "refused": 0, "prompt_tokens": 6000,
         "cached_tokens": 3600, "answer_tokens": 8400, "seconds": 600.0}
    ]  # fmt: skip
    assert [row["hour"] for row in database.totals(["hour"])] == ["2026-01-31T23:00Z"]
    assert database.totals(["user"], since=hour + 3600) == []
    database.close()


def test_the_command(
    empty: Postgres, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads the same ledger, whatever zone the server is in; the password is not shown."""
    assert main(["usage", "--ledger", empty.address]) == 2
    assert 'relation "synthia_usage" does not exist' in capsys.readouterr().err
    empty.ask("ALTER DATABASE postgres SET timezone = 'Asia/Tokyo'")
    ledger, _ = ledger_at(empty.address)
    use(ledger)
    ledger.close()
    monkeypatch.setenv("SYNTHIA_LEDGER", empty.address)
    assert main(["usage", "--by", "user,day", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    [(day,)] = empty.ask("SELECT (hour AT TIME ZONE 'UTC')::date::text FROM synthia_usage")
    assert (row["user"], row["day"], row["prompt_tokens"]) == ("alice", day, 3)
    assert main(["usage", "--ledger", empty.address.replace("secret", "other")]) == 2
    said = capsys.readouterr().err
    assert "password authentication failed" in said
    assert "other" not in said.replace("name another", "")


class Line:
    """Passes on what is said to PostgreSQL; can swallow the answer to a commit, and hang up."""

    def __init__(self, port: int) -> None:
        self.port = free_port()
        self.swallow = 0
        self._to = port
        self._listening = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._to)) as server:
            back = threading.Thread(target=self._pass, args=(server, client), daemon=True)
            back.start()
            self._pass(client, server)
            back.join()

    def _pass(self, here: socket.socket, there: socket.socket) -> None:
        with suppress(OSError):
            while data := here.recv(65536):
                if self.swallow and data.startswith(b"Q") and b"COMMIT" in data:
                    self.swallow -= 1
                    here.shutdown(socket.SHUT_RDWR)  # before the answer can be
                there.sendall(data)
        with suppress(OSError):
            there.shutdown(socket.SHUT_WR)


def test_the_answer_to_a_commit_is_lost(empty: Postgres, caplog: pytest.LogCaptureFixture) -> None:
    """What is in the database, and not known to be, is sent again and counts once."""
    line = Line(empty.port)
    ledger, told = ledger_at(empty.address.replace(str(empty.port), str(line.port)))
    for times in (1, 2, 3):
        line.swallow = 1
        use(ledger)
        wait_until(partial(_said, caplog, "is written again", times))
    ledger.close()
    line.close()
    assert not told.waiting
    assert caplog.text.count("cannot be written") == 3
    assert requests(empty) == 3


def _said(caplog: pytest.LogCaptureFixture, text: str, times: int) -> bool:
    return caplog.text.count(text) == times


def test_a_server_that_is_restarted(empty: Postgres) -> None:
    """Killed in the middle and started again: all that was counted meanwhile arrives, once."""
    ledger, told = ledger_at(empty.address)
    for round_ in range(30):
        use(ledger, f"user{round_ % 3}")
        if round_ == 10:
            empty.stop(signal.SIGQUIT)
            wait_until(lambda: not ledger._rows)
        if round_ == 20:
            wait_until(lambda: told.waiting)
            empty.start()
    wait_until(lambda: not told.waiting and not ledger._rows)
    ledger.close()
    assert requests(empty) == 30


def test_a_server_that_hangs(empty: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the connection and says nothing: it is given up, rows go to the disk."""
    monkeypatch.setattr(module, "_SECONDS", 1)
    ledger, told = ledger_at(empty.address)
    use(ledger)
    wait_until(lambda: requests(empty))
    empty.tell(signal.SIGSTOP)
    use(ledger)
    wait_until(lambda: told.waiting)
    with pytest.raises(Away):
        ledger.totals(["model"], since=None, until=None, user="alice", most=1)
    ledger.close()
    empty.tell(signal.SIGCONT)
    ledger, told = ledger_at(empty.address)  # the next process, which finds them
    wait_until(lambda: requests(empty) == 2)
    ledger.close()


def test_a_user_who_may_not(empty: Postgres) -> None:
    """Whom the database lets in and nothing do, the server says so at its start."""
    empty.ask("DROP ROLE IF EXISTS guest")
    empty.ask("CREATE ROLE guest LOGIN PASSWORD 'guest'")
    address = empty.address.replace("ledger:secret", "guest:guest")
    with pytest.raises(StartupError, match="permission denied") as caught:
        open_database(address)
    assert "guest:guest" not in str(caught.value)
    owner = open_database(empty.address)
    assert owner is not None
    owner.close()
    empty.ask("GRANT ALL ON synthia_usage, synthia_usage_writers TO guest")
    ledger, told = ledger_at(address)  # somebody has made the tables
    use(ledger)
    ledger.close()
    assert not told.waiting
    assert requests(empty) == 1
    empty.ask("DROP OWNED BY guest; DROP ROLE guest")
