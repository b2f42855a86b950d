"""Transcripts: whole lines, whatever the disk does."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from synthia_vllm.errors import StartupError
from synthia_vllm.telemetry import transcript
from synthia_vllm.telemetry.transcript import Transcripts

if TYPE_CHECKING:
    from collections.abc import Iterator


class Counts:
    """Transcripts in `directory`, and how many lines were written and lost."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.written = self.failed = 0
        limits: dict[str, Any] = {"max_bytes": 10_000, "keep": 2, "fsync": "never"} | options
        self.transcripts = Transcripts(
            directory, on_written=self._wrote, on_failed=self._lost, **limits
        )

    def _wrote(self, lines: int) -> None:
        self.written += lines

    def _lost(self, lines: int) -> None:
        self.failed += lines

    def wait(self, decided: int) -> None:
        """Until so many lines are written or lost."""
        end = time.monotonic() + 10
        while self.written + self.failed < decided:
            assert time.monotonic() < end
            time.sleep(0.001)


def lines(file: Path) -> list[dict[str, str]]:
    content = file.read_text()
    assert content.endswith("\n")
    return [json.loads(line) for line in content.split("\n")[:-1]]


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """As if another process were writing `file` and the disk did not answer."""
    with file.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


@pytest.mark.parametrize("fsync", ["never", "always"])
def test_the_cards_lines(tmp_path: Path, fsync: str) -> None:
    """One JSON object a line, readable as it is, for its user alone and in order."""
    kept = Counts(tmp_path, fsync=fsync)
    text = 'Où?\n\r\u2028"鯨" \\ \ud800'
    kept.transcripts.add("alice", text, "yes")
    kept.transcripts.add("bob", "1", "2")
    kept.transcripts.add("alice", "3", "4")
    kept.transcripts.close()
    alice = tmp_path / "alice.jsonl"
    assert lines(alice) == [{"prompt": text, "answer": "yes"}, {"prompt": "3", "answer": "4"}]
    assert "鯨" in alice.read_text()
    assert lines(tmp_path / "bob.jsonl") == [{"prompt": "1", "answer": "2"}]
    assert (kept.written, kept.failed) == (3, 0)


def test_files_are_their_owners(tmp_path: Path) -> None:
    """Whatever the umask and whatever was there, only the owner reads; no link is followed."""
    place = tmp_path / "a" / "b"
    for umask, user in ((0o000, "alice"), (0o777, "bob")):
        Counts(place).transcripts.close()
        before = os.umask(umask)
        try:
            kept = Counts(place)
            kept.transcripts.add(user, "1", "2")
            kept.transcripts.close()
        finally:
            os.umask(before)
        assert stat.S_IMODE((place / f"{user}.jsonl").stat().st_mode) == 0o600
    assert stat.S_IMODE(place.stat().st_mode) == 0o700

    (place / "alice.jsonl").chmod(0o644)
    (place / "carol.jsonl").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(place / "dave.jsonl")
    kept = Counts(place)
    for user in ("alice", "carol", "dave"):
        kept.transcripts.add(user, "1", "2")
    kept.transcripts.close()
    assert stat.S_IMODE((place / "alice.jsonl").stat().st_mode) == 0o600
    assert not (tmp_path / "elsewhere").exists()
    assert (kept.written, kept.failed) == (1, 2)


@pytest.mark.parametrize("user", ["", ".", "../alice", "a/b", "/tmp/alice", "a\0", "a\n", "a" * 65])
def test_a_name_is_no_path(tmp_path: Path, user: str) -> None:
    """A name that could lead out of the directory costs its line, and others are kept."""
    kept = Counts(tmp_path / "place")
    kept.transcripts.add(user, "1", "2")
    kept.transcripts.add("alice", "1", "2")
    kept.transcripts.close()
    assert (kept.written, kept.failed) == (1, 1)
    assert [path.name for path in tmp_path.rglob("*")] == ["place", "alice.jsonl"]


def test_rotation(tmp_path: Path) -> None:
    """No file grows beyond the limit, the newest lines are in the newest file, old ones go."""
    files = len(os.listdir("/proc/self/fd"))
    kept = Counts(tmp_path, max_bytes=1000, keep=2)
    for number in range(100):
        kept.transcripts.add("alice", str(number), "x" * 50)
    kept.transcripts.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["alice.jsonl", "alice.jsonl.1", "alice.jsonl.2"]
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())
    found = [int(line["prompt"]) for name in reversed(names) for line in lines(tmp_path / name)]
    assert found == list(range(found[0], 100))
    assert (kept.written, kept.failed) == (100, 0)
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_line_larger_than_a_file(tmp_path: Path) -> None:
    """It is kept, in a file of its own."""
    kept = Counts(tmp_path, max_bytes=1000, keep=5)
    for size in (10, 5000, 5001, 20):
        kept.transcripts.add("alice", str(size), "x" * size)
    kept.transcripts.close()
    files = [tmp_path / f"alice.jsonl{end}" for end in (".3", ".2", ".1", "")]
    assert [[line["prompt"] for line in lines(file)] for file in files] == [
        ["10"], ["5000"], ["5001"], ["20"]
    ]  # fmt: skip


def test_a_rotation_cut_short_drops_nothing(tmp_path: Path) -> None:
    """If a crash left a gap between the old files, that is filled first."""
    (tmp_path / "alice.jsonl").write_text("x" * 999 + "\n")
    (tmp_path / "alice.jsonl.2").write_text("oldest\n")
    kept = Counts(tmp_path, max_bytes=1000, keep=2)
    kept.transcripts.add("alice", "1", "2")
    kept.transcripts.close()
    assert lines(tmp_path / "alice.jsonl") == [{"prompt": "1", "answer": "2"}]
    assert (tmp_path / "alice.jsonl.1").stat().st_size == 1000
    assert (tmp_path / "alice.jsonl.2").read_text() == "oldest\n"


def test_a_file_taken_away_is_begun_again(tmp_path: Path) -> None:
    """The operator may move or delete a file at any time; lines go where the name is."""
    kept = Counts(tmp_path)
    for number in range(3):
        kept.transcripts.add("alice", str(number), "")
        kept.wait(number + 1)
        (tmp_path / "alice.jsonl").rename(tmp_path / f"moved{number}")
    kept.transcripts.close()
    for number in range(3):
        assert lines(tmp_path / f"moved{number}") == [{"prompt": str(number), "answer": ""}]


def test_half_a_line_is_cut_off(tmp_path: Path) -> None:
    """What a crash left at the end of a file does not spoil the next line, nor the ones before."""
    file = tmp_path / "alice.jsonl"
    whole = '{"prompt":"1","answer":"2"}\n'
    halves = ["", "{", "x" * 4068, "x" * 4069, "x" * 9000]
    for left in [*halves, *(whole * 2 + half for half in halves)]:
        file.write_text(left)
        kept = Counts(tmp_path, max_bytes=100_000)
        kept.transcripts.add("alice", "3", "4")
        kept.wait(1)
        with file.open("a") as other:  # and by another process, while the file is open here
            other.write(left)
        kept.transcripts.add("alice", "5", "6")
        kept.transcripts.close()
        found = lines(file)
        assert len(found) == 2 * left.count("\n") + 2
        assert found[left.count("\n")] == {"prompt": "3", "answer": "4"}
        assert found[-1] == {"prompt": "5", "answer": "6"}


FULL_DISK = """
import json, resource, signal, subprocess, sys, time
from pathlib import Path
from synthia_vllm.telemetry.transcript import Transcripts
place, disk = Path(sys.argv[1]), sys.argv[2]
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
if disk == "tmpfs":
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        sys.exit(77)
    (place / "filler").write_bytes(bytes(32 * 1024))
done = []
kept = Transcripts(place, max_bytes=10**6, keep=2, fsync=sys.argv[3],
                   on_written=lambda n: done.extend("w" * n),
                   on_failed=lambda n: done.extend("f" * n))
if disk == "limit":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit(32 * 1024)
for number in range(100):
    kept.add("alice", str(number), "x" * 1000)
    kept.add("alice", "-", "y")  # so short that it may have room after a long one had none
while len(done) < 200:
    time.sleep(0.001)
full = (place / "alice.jsonl").read_text()
limit(resource.RLIM_INFINITY) if disk == "limit" else (place / "filler").unlink()
kept.add("alice", "last", "z")
kept.close()
print(json.dumps(["".join(done), full, (place / "alice.jsonl").read_text()]))
"""


@pytest.mark.parametrize("fsync", ["never", "always"])
@pytest.mark.parametrize("disk", ["limit", "tmpfs"])
def test_a_full_disk_costs_lines_and_nothing_else(tmp_path: Path, disk: str, fsync: str) -> None:
    """A write that is cut short leaves no half line; with room again, lines are kept again."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"] if disk == "tmpfs" else []
    try:
        out = subprocess.run(
            [*namespace, sys.executable, "-c", FULL_DISK, str(tmp_path), disk, fsync],
            check=False, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if out.returncode == 77 or (namespace and out.stderr.startswith("unshare:")):
        pytest.skip("no file system can be mounted here")
    assert out.returncode == 0, out.stderr
    done, full, content = json.loads(out.stdout)
    found = [json.loads(line) for line in content.split("\n")[:-1]]
    assert full.endswith("\n")
    assert content.endswith("\n")
    assert done.count("w") == len(found) > 20
    assert len(done) == 201
    assert found[-1]["prompt"] == "last"
    assert max(int(line["prompt"]) for line in found[:-1] if line["prompt"] != "-") < 40
    assert " cannot be written" in out.stderr
    assert out.stderr.rstrip().endswith("Transcripts of alice are written again.")
    assert "xxx" not in out.stderr


def test_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines count as kept when the disk has them, if that is asked for; else nobody asks it."""

    def failing(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    for fsync, kept_lines in (("never", 3), ("always", 0)):
        kept = Counts(tmp_path, fsync=fsync)
        for _ in range(3):
            kept.transcripts.add("alice", "1", "2")
        kept.transcripts.close()
        assert (kept.written, kept.failed) == (kept_lines, 3 - kept_lines)


def test_failing_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log says when a user's lines begin to be lost and when they no longer are, not what."""
    obstacle = tmp_path / "alice.jsonl"
    obstacle.mkdir()
    kept = Counts(tmp_path)
    for number in range(5):
        kept.transcripts.add("alice", "secret", "secret")
        kept.transcripts.add("bob", "secret", "secret")
        kept.wait(2 * number + 2)
    obstacle.rmdir()
    kept.transcripts.add("alice", "secret", "secret")
    kept.transcripts.add("alice", "secret", "secret")
    kept.transcripts.close()
    assert (kept.written, kept.failed) == (7, 5)
    first, last = caplog.messages
    assert first.startswith("Transcripts of alice cannot be written: ")
    assert last == "Transcripts of alice are written again."
    assert "secret" not in caplog.text


def unusable(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "file").write_text("")
    yield tmp_path / "file"
    yield tmp_path / "file" / "below"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    yield tmp_path / "link"
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        yield tmp_path / "closed"
    else:  # root may write anywhere but here
        yield Path("/proc")


def test_a_place_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    """The path and the setting to change are named, and no thread is left."""
    threads = threading.active_count()
    for place in unusable(tmp_path):
        with pytest.raises(StartupError, match=r"transcripts\.directory") as caught:
            Counts(place)
        assert str(place) in str(caught.value)
    assert threading.active_count() == threads


@pytest.mark.parametrize(("limit", "value"), [("_MAX_LINES", 1000), ("_MAX_BYTES", 500_000)])
def test_a_slow_disk_holds_nobody_up(
    tmp_path: Path,
    limit: str,
    value: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Beyond a bound, what comes faster than it can be written is lost and counted."""
    monkeypatch.setattr(transcript, limit, value)
    kept = Counts(tmp_path, max_bytes=10**8)
    with locked(tmp_path / "alice.jsonl"):
        for _ in range(3000):
            kept.transcripts.add("alice", "1", "x" * 1000)
        room = value if limit == "_MAX_LINES" else value // 1000
        assert 3000 - room - 256 <= kept.failed < 3000
        lost = kept.failed
        assert len(caplog.messages) == 1
    kept.wait(3000)
    kept.transcripts.add("alice", "1", "2")
    kept.transcripts.close()
    assert (kept.written, kept.failed) == (3001 - lost, lost)
    assert len(lines(tmp_path / "alice.jsonl")) == kept.written
    assert len(caplog.messages) == 2


def test_closing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing ends the thread and its files; what comes later is lost, counted and no error."""
    kept = Counts(tmp_path)
    files = len(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    for number in range(3000):
        kept.transcripts.add(f"u{number % 100}", "1", "2")
    kept.transcripts.close()
    assert (kept.written, kept.failed) == (3000, 0)
    assert threading.active_count() == threads - 1
    assert len(os.listdir("/proc/self/fd")) == files
    kept.transcripts.add("alice", "1", "2")
    kept.transcripts.close()
    assert (kept.written, kept.failed) == (3000, 1)

    monkeypatch.setattr(transcript, "_CLOSING_SECONDS", 0.2)
    kept = Counts(tmp_path)
    with locked(tmp_path / "alice.jsonl"):
        kept.transcripts.add("alice", "1", "2")
        while kept.transcripts._waiting:
            time.sleep(0.001)
        for _ in range(10):
            kept.transcripts.add("alice", "1", "2")
        kept.transcripts.close()
        assert (kept.written, kept.failed) == (0, 10)
    kept.wait(11)
    assert (kept.written, kept.failed) == (1, 10)


def test_many_users_few_open_files(tmp_path: Path) -> None:
    """However many users there are, only some files are open, and every line gets to its own."""
    kept = Counts(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(600):
        kept.transcripts.add(f"u{number % 200}", str(number), "")
    kept.wait(600)
    assert len(os.listdir("/proc/self/fd")) <= before + 64
    kept.transcripts.close()
    for user in range(200):
        found = [int(line["prompt"]) for line in lines(tmp_path / f"u{user}.jsonl")]
        assert found == [user, user + 200, user + 400]


WRITER = """
import sys, time
from pathlib import Path
from synthia_vllm.telemetry.transcript import Transcripts
kept = Transcripts(Path(sys.argv[1]), max_bytes=5_000, keep=500, fsync="never",
                   on_written=lambda n: None, on_failed=lambda n: print("lost"))
print("ready", flush=True)
sys.stdin.readline()  # so that all begin at once
for number in range(2000):
    kept.add("alice", sys.argv[2], str(number))
    if not number % 20:
        time.sleep(0.001)  # so that they take turns
kept.close()
"""


def test_processes_share_a_file(tmp_path: Path) -> None:
    """Writers that rotate under each other lose no line, tear none and keep their order.

    One of them is killed in the middle, and of its lines only the last ones are missing.
    """
    writers = {
        name: subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for name in ("a", "b", "killed")
    }  # fmt: skip
    for writer in writers.values():
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers.values():
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    while not (tmp_path / "alice.jsonl.5").exists():
        assert writers["a"].poll() is None
        time.sleep(0.001)
    writers["killed"].kill()
    assert [writer.communicate(timeout=60)[0] for writer in writers.values()] == ["", "", ""]
    numbers = range(len(list(tmp_path.iterdir())) - 1, 0, -1)
    files = [*(tmp_path / f"alice.jsonl.{number}" for number in numbers), tmp_path / "alice.jsonl"]
    assert len(files) > 20
    assert all(file.stat().st_size <= 5000 for file in files)
    found = [line for file in files for line in lines(file)]
    for name in writers:
        answers = [int(line["answer"]) for line in found if line["prompt"] == name]
        assert answers == list(range(2000 if name != "killed" else len(answers)))
