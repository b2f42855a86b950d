"""The ledger: every row is added once, whatever becomes of database, disk or process."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from serving import wait_until

from synthia_vllm.errors import StartupError
from synthia_vllm.ledger import journal as journal_module
from synthia_vllm.ledger import writer
from synthia_vllm.ledger.database import Away, Database
from synthia_vllm.ledger.journal import Batch, Journal
from synthia_vllm.ledger.place import parse
from synthia_vllm.ledger.rows import Key, Rows, Used, parse_groups, parse_time
from synthia_vllm.ledger.writer import Ledger, open_database, open_ledger

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COUNTING = """
import sys, time
from synthia_vllm.ledger.rows import Used
from synthia_vllm.ledger.writer import open_ledger
ledger = open_ledger(sys.argv[1], on_waiting=lambda rows: None, on_lost=lambda rows: None)
for number in range(int(sys.argv[2])):
    ledger.add(Used(f"user{number % 3}", "m", "/v1/x", False, 3, 1, 2, 0.5))
    time.sleep(0.01)
if sys.argv[3] == "close":
    ledger.close()
print("counted", flush=True)
time.sleep(60 if sys.argv[3] == "stay" else 0)
"""


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Written without a second's wait, and with a state directory of its own."""
    monkeypatch.setattr(writer, "_EVERY_S", 0.01)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


class Faulty(Database):
    """A database that is away as it is told to be."""

    before = after = False

    def add(self, writer: str, sequence: int, rows: Rows) -> None:
        if self.before:
            raise Away("not there")
        super().add(writer, sequence, rows)
        if self.after:
            raise Away("the answer to the commit was lost")


class Told:
    """What a ledger says of itself."""

    waiting = lost = 0

    def wait(self, rows: int) -> None:
        self.waiting = rows

    def lose(self, rows: int) -> None:
        self.lost += rows


def address(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/usage.sqlite"


def use(ledger: Ledger, user: str = "alice", tokens: int = 1) -> None:
    ledger.add(Used(user, "m", "/v1/x", False, tokens, 0, tokens, 0.5))


def totals(tmp_path: Path, *by: str) -> list[dict[str, Any]]:
    database = Database(parse(address(tmp_path)))
    try:
        return database.totals(by)
    finally:
        database.close()


def requests(tmp_path: Path) -> int:
    return int(totals(tmp_path)[0]["requests"])


@contextmanager
def faulty(tmp_path: Path, *, journal: bool = True) -> Iterator[tuple[Ledger, Faulty, Told]]:
    database, told = Faulty(parse(address(tmp_path))), Told()
    database.make()
    place = tmp_path / "state" if journal else None
    ledger = Ledger(database, journal=place, on_waiting=told.wait, on_lost=told.lose)
    try:
        yield ledger, database, told
    finally:
        ledger.close()


def left(tmp_path: Path) -> list[Path]:
    """What is in the state directory."""
    return sorted((tmp_path / "state").glob("*"))


def test_sums_and_files(tmp_path: Path) -> None:
    """Rows are added up by all that is asked for; the file is its owner's."""
    told = Told()
    for _ in range(2):  # two lives of a server
        ledger = open_ledger(address(tmp_path), on_waiting=told.wait, on_lost=told.lose)
        assert ledger is not None
        for user, model, route, refused in (
            ("alice", "m", "/v1/x", False),
            ("alice", "m-tot", "/v1/x", True),
            ("bob", "m", "/v1/y", False),
        ):
            ledger.add(Used(user, model, route, refused, 5, 3, 7, 0.25))
        ledger.close()
    found = totals(tmp_path, "user", "model")
    assert [(row["user"], row["model"], row["requests"], row["refused"]) for row in found] == [
        ("alice", "m", 2, 0),
        ("alice", "m-tot", 2, 2),
        ("bob", "m", 2, 0),
    ]
    [alice, _] = totals(tmp_path, "user")
    sums = [alice[name] for name in ("prompt_tokens", "cached_tokens", "answer_tokens", "seconds")]
    assert sums == [20, 12, 28, 1.0]
    assert [row["route"] for row in totals(tmp_path, "route")] == ["/v1/x", "/v1/y"]
    [hour] = {row["hour"] for row in totals(tmp_path, "hour", "user")}  # or the clock struck
    assert parse_time(hour) == parse_time(hour, end=True)
    assert {row["day"] for row in totals(tmp_path, "day")} == {hour[:10]}
    assert stat.S_IMODE((tmp_path / "usage.sqlite").stat().st_mode) == 0o600
    with sqlite3.connect(tmp_path / "usage.sqlite") as raw:
        assert raw.execute("SELECT count(*) FROM synthia_usage_writers").fetchone() == (0,)
    raw.close()
    assert left(tmp_path) == []


def test_hours(tmp_path: Path) -> None:
    """A time of whole hours is what is asked for: from its first to before its last."""
    database = Database(parse(address(tmp_path)))
    begin = parse_time("2026-01-31T22:00Z")
    rows: Rows = {Key("a", "m", "r", begin + 3600 * n): [1, 0, 0, 0, 0, 0.0] for n in range(4)}
    database.add("w", 1, rows)
    database.add("w", 1, rows)
    assert [row["requests"] for row in database.totals(["day"])] == [2, 2]
    assert [row["hour"] for row in database.totals(["hour"])][1:3] == [
        "2026-01-31T23:00Z",
        "2026-02-01T00:00Z",
    ]

    def counted(since: str, until: str) -> int:
        [row] = database.totals([], since=parse_time(since), until=parse_time(until, end=True))
        return int(row["requests"])

    assert counted("2026-01-31", "2026-02-01") == 2
    assert counted("2026-01-31T23:30", "2026-02-01T00:30") == 2
    assert counted("2026-02-01T01:00+01:00", "2026-02-01T01:00Z") == 1
    assert counted("2027-01-01", "2028-01-01") == 0
    database.close()


@pytest.mark.parametrize(
    "text", ["", "tomorrow", "2026-13-01", "2026-01-01T25:00", "20260101", "1"]
)
def test_what_is_no_time(text: str) -> None:
    """It is said what one looks like, or that there is none such."""
    with pytest.raises(ValueError, match=r"2026-01-31|there is no time"):
        parse_time(text)


@pytest.mark.parametrize("text", ["9999-12-31T23:30", "0001-01-01T00:00+14:00"])
def test_the_ends_of_time(text: str) -> None:
    """What no calendar has is refused, and no fault."""
    with pytest.raises(ValueError, match="there is no time"):
        parse_time(text, end=True)


def test_what_cannot_be_added_up_by() -> None:
    assert parse_groups("day, user,day", ("user", "day")) == ("day", "user")
    for text in ("", "user,", "users"):
        with pytest.raises(ValueError, match="user, day"):
            parse_groups(text, ("user", "day"))


def test_an_answer_to_a_commit_is_lost(tmp_path: Path) -> None:
    """What was added is sent again, and added once; what came since is not lost with it."""
    with faulty(tmp_path) as (ledger, database, told):
        database.after = True
        use(ledger)
        wait_until(lambda: told.waiting)
        assert requests(tmp_path) == 1
        for user in ("alice", "bob"):
            use(ledger, user)
        wait_until(lambda: told.waiting == 3)
        database.after = False
        wait_until(lambda: not told.waiting)
    assert [(row["user"], row["requests"]) for row in totals(tmp_path, "user")] == [
        ("alice", 2),
        ("bob", 1),
    ]
    assert left(tmp_path) == []


@pytest.mark.parametrize("journal", [True, False])
def test_a_database_that_is_away_and_comes_back(
    tmp_path: Path, journal: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows wait, merged, and are added when it is back, without a restart; the log says so once."""
    with faulty(tmp_path, journal=journal) as (ledger, database, told):
        database.before = True
        for _ in range(3):
            use(ledger)
            wait_until(lambda: told.waiting and not ledger._rows)
        wait_until(lambda: told.waiting == 2)  # the batch that was sent, and one for all others
        stands = ledger.written_until
        assert any(path.suffix == ".json" for path in left(tmp_path)) == journal
        database.before = False
        wait_until(lambda: not told.waiting)
        assert ledger.written_until >= stands
        assert requests(tmp_path) == 3
        assert left(tmp_path) == []
    said = [record.getMessage() for record in caplog.records]
    assert [" cannot be written" in text for text in said] == [True, False]
    assert "is written again" in said[1]


def test_the_journal_outlives_the_process(tmp_path: Path) -> None:
    """What waits at the end of a process is added by the next; what had arrived is not."""
    with faulty(tmp_path) as (ledger, database, told):
        database.after = True
        use(ledger)
        wait_until(lambda: told.waiting)
        use(ledger, "bob", 5)
    assert [row["user"] for row in totals(tmp_path, "user")] == ["alice"]
    assert [path.suffix for path in left(tmp_path)] == [".json", ".lock"]
    with faulty(tmp_path, journal=True) as (_, _, _):
        wait_until(lambda: not left(tmp_path))
    with faulty(tmp_path) as (ledger, _, _):
        use(ledger)
    assert [(row["user"], row["requests"]) for row in totals(tmp_path, "user")] == [
        ("alice", 2),
        ("bob", 1),
    ]


def test_a_journal_is_left_to_who_lives(tmp_path: Path) -> None:
    """Nobody adds what another process still has, nor what is another ledger's."""
    rows: Rows = {Key("a", "m", "r", 0): [1, 0, 0, 0, 0, 0.0]}
    mine, other = (Journal(tmp_path, "here", name) for name in ("a", "b"))
    mine.save([Batch("a", 1, rows)])
    assert other.adopt() == []
    assert mine.adopt() == []
    mine.leave()
    assert Journal(tmp_path, "elsewhere", "c").adopt() == []
    [adopted] = other.adopt()
    assert adopted.batches == [Batch("a", 1, rows, tried=True)]
    assert Journal(tmp_path, "here", "d").adopt() == []
    adopted.leave()
    [adopted] = other.adopt()
    adopted.done()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", ["", "{", '{"format": 2, "batches": []}', "[]", '{"format": 1}']
)
def test_a_journal_that_cannot_be_read(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is put aside, said, and in nobody's way."""
    journal = Journal(tmp_path / "state", "here", "a")
    journal.save([Batch("a", 1, {})])
    journal.leave()
    [file] = (tmp_path / "state").glob("*.json")
    file.write_text(content)
    assert Journal(tmp_path / "state", "here", "b").adopt() == []
    assert file.with_suffix(".unreadable").read_text() == content
    assert "cannot be read" in caplog.text


def test_there_is_room_for_so_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond it new rows are lost, and counted as such; known ones go on."""
    monkeypatch.setattr(writer, "MAX_ROWS", 3)
    with faulty(tmp_path) as (ledger, database, told):
        database.before = True
        use(ledger)
        wait_until(lambda: told.waiting == 1)
        for number in range(5):
            use(ledger, f"user{number}")
            wait_until(lambda: not ledger._rows)
        wait_until(lambda: told.lost == 3)
        use(ledger, "user0")
        database.before = False
    assert [(row["user"], row["requests"]) for row in totals(tmp_path, "user")] == [
        ("alice", 1),
        ("user0", 2),
        ("user1", 1),
    ]


def test_a_disk_that_takes_no_journal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rows wait in memory alone, which is said once."""
    (tmp_path / "state").write_text("whatever is in the way")
    with faulty(tmp_path) as (ledger, database, told):
        database.before = True
        for _ in range(3):
            use(ledger)
            wait_until(lambda: told.waiting and not ledger._rows)
        database.before = False
        wait_until(lambda: not told.waiting)
    assert requests(tmp_path) == 3
    assert caplog.text.count("waits in memory alone") == 1


def test_a_journal_that_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it still has was added, and is not added again by who finds it."""
    with faulty(tmp_path) as (ledger, database, told):
        database.before = True
        use(ledger)
        wait_until(lambda: told.waiting and left(tmp_path))

        def fails(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(journal_module, "_remove", fails)
        database.before = False
        wait_until(lambda: not told.waiting)
    monkeypatch.undo()
    monkeypatch.setattr(writer, "_EVERY_S", 0.01)
    assert left(tmp_path)
    with faulty(tmp_path) as (_, _, _):
        wait_until(lambda: not left(tmp_path))
    assert requests(tmp_path) == 1


def test_a_full_disk(tmp_path: Path) -> None:
    """SQLite's own account of a database that may not grow: rows wait, and are added later."""
    with faulty(tmp_path) as (ledger, _, told):
        use(ledger)
        wait_until(lambda: totals(tmp_path, "user"))
        from sqlalchemy import event

        engine = ledger._database._engine
        full = [True]

        @event.listens_for(engine, "connect")
        def bound(connection: Any, _record: Any) -> None:
            if full[0]:
                pages = connection.execute("PRAGMA page_count").fetchone()[0]
                connection.execute(f"PRAGMA max_page_count={pages}")

        for number in range(2000):
            use(ledger, f"user{number}")
        wait_until(lambda: told.waiting >= 1000)
        full[0] = False
        wait_until(lambda: not told.waiting)
    assert requests(tmp_path) == 2001


def test_a_database_that_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program's transaction is waited for, and what comes meanwhile is added after it."""
    from synthia_vllm.ledger import database as module

    monkeypatch.setattr(module, "_SECONDS", 0.1)
    with faulty(tmp_path) as (ledger, _, told):
        other = sqlite3.connect(tmp_path / "usage.sqlite", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        use(ledger)
        wait_until(lambda: told.waiting)
        other.execute("COMMIT")
        other.close()
        wait_until(lambda: not told.waiting)
    assert requests(tmp_path) == 1


def test_a_file_that_is_taken_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A new one is begun: nothing is written into what nobody can find."""
    with faulty(tmp_path) as (ledger, _, told):
        use(ledger)
        wait_until(lambda: totals(tmp_path, "user"))
        for path in tmp_path.glob("usage.sqlite*"):
            path.unlink()
        use(ledger, "bob")
        wait_until(lambda: "is written again" in caplog.text and not told.waiting)
    assert [row["user"] for row in totals(tmp_path, "user")] == ["bob"]


def counting(tmp_path: Path, requests: int, then: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COUNTING, address(tmp_path), str(requests), then],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_several_processes_on_one_file(tmp_path: Path) -> None:
    """All of what each has counted is there."""
    processes = [counting(tmp_path, 150, "close") for _ in range(3)]
    for process in processes:
        assert process.communicate()[0] == "counted\n"
        assert process.returncode == 0
    assert [row["requests"] for row in totals(tmp_path, "user")] == [150, 150, 150]


def test_a_process_is_killed_while_the_database_is_away(tmp_path: Path) -> None:
    """What it had put on the disk is added by the next process of that ledger."""
    open_once = open_database(address(tmp_path))
    assert open_once is not None
    open_once.close()
    other = sqlite3.connect(tmp_path / "usage.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with counting(tmp_path, 10, "stay") as process:
        assert process.stdout is not None
        process.stdout.readline()
        wait_until(lambda: list((tmp_path / "state/synthia-vllm").glob("*.json")))
        process.send_signal(signal.SIGKILL)
    other.execute("COMMIT")
    other.close()
    told = Told()
    ledger = open_ledger(address(tmp_path), on_waiting=told.wait, on_lost=told.lose)
    assert ledger is not None
    wait_until(lambda: requests(tmp_path) == 10)
    ledger.close()
    assert list((tmp_path / "state/synthia-vllm").iterdir()) == []


def test_a_file_that_is_no_ledger(tmp_path: Path) -> None:
    """It is not written over: the server does not start, and says what to do."""
    file = tmp_path / "usage.sqlite"
    file.write_text("x" * 5000)
    with pytest.raises(StartupError, match=r"usage\.sqlite cannot be used: .*move it away"):
        open_database(address(tmp_path))
    assert file.read_text() == "x" * 5000
    default = tmp_path / "state/synthia-vllm/usage.sqlite"
    default.parent.mkdir(parents=True)
    default.write_text("x" * 5000)
    with pytest.raises(StartupError, match="not a database"):
        open_database("sqlite")


def test_a_place_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who names it is told; who did not is served without a ledger, and warned."""
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match=r"cannot be written: .*`ledger`"):
        open_database(f"sqlite:///{tmp_path}/file/usage.sqlite")
    with pytest.raises(StartupError, match="cannot be written"):
        open_database(f"sqlite:///{tmp_path}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert open_database("sqlite") is None
    assert "not kept" in caplog.text
    assert "XDG_STATE_HOME" in caplog.text
    caplog.clear()
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # which the specification has ignored
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    at_home = open_database("sqlite")
    assert at_home is not None
    at_home.close()
    assert os.listdir(tmp_path / "home/.local/state/synthia-vllm") == ["usage.sqlite"]
    assert open_database("none") is None
    assert not caplog.text


def test_a_database_that_is_away_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may come: that is no reason not to serve. Its password is nowhere."""
    secret = "postgresql://u:hunter2@127.0.0.1:1/x"
    told = Told()
    ledger = open_ledger(secret, on_waiting=told.wait, on_lost=told.lose)
    assert ledger is not None
    use(ledger)
    wait_until(lambda: told.waiting)
    with pytest.raises(Away, match="refused"):
        ledger.totals(["model"], since=None, until=None, user="alice", most=1)
    ledger.close()
    assert "cannot be reached yet" in caplog.text
    assert "hunter2" not in caplog.text
    [file] = (tmp_path / "state/synthia-vllm").glob("*.json")
    assert "hunter2" not in file.name + file.read_text()
