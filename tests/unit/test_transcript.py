"""Transcripts: whole lines, whatever the disk does."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from synthia_vllm.errors import StartupError
from synthia_vllm.transcript import Transcripts

if TYPE_CHECKING:
    from pathlib import Path


class Counts:
    """Transcripts in `directory`, and how many lines were written and lost."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.written = self.failed = 0
        limits = {"max_bytes": 10_000, "keep": 2, "fsync": "never"} | options
        self.transcripts = Transcripts(
            directory, on_written=self._wrote, on_failed=self._lost, **limits
        )

    def _wrote(self, lines: int) -> None:
        self.written += lines

    def _lost(self, lines: int) -> None:
        self.failed += lines


def lines(file: Path) -> list[dict[str, str]]:
    content = file.read_text()
    assert content.endswith("\n")
    return [json.loads(line) for line in content.splitlines()]


def test_the_cards_lines(tmp_path: Path) -> None:
    """One JSON object a line, for its user alone; files only their owner reads."""
    place = tmp_path / "a" / "b"
    kept = Counts(place, fsync="always")
    text = 'Où?\n\u2028"鯨" \\'
    kept.transcripts.add("alice", text, "yes")
    kept.transcripts.add("bob", "1", "2")
    kept.transcripts.add("alice", "3", "4")
    kept.transcripts.close()
    raw = (place / "alice.jsonl").read_text().split("\n")
    assert [json.loads(line) for line in raw[:-1]] == [
        {"prompt": text, "answer": "yes"},
        {"prompt": "3", "answer": "4"},
    ]
    assert lines(place / "bob.jsonl") == [{"prompt": "1", "answer": "2"}]
    assert (kept.written, kept.failed) == (3, 0)
    assert stat.S_IMODE((place / "bob.jsonl").stat().st_mode) == 0o600
    assert stat.S_IMODE(place.stat().st_mode) == 0o700


def test_an_open_file_is_closed_to_others(tmp_path: Path) -> None:
    """A file that others could read is narrowed; a link is not followed."""
    (tmp_path / "alice.jsonl").write_text("")
    (tmp_path / "alice.jsonl").chmod(0o644)
    (tmp_path / "bob.jsonl").symlink_to(tmp_path / "elsewhere")
    kept = Counts(tmp_path)
    kept.transcripts.add("alice", "1", "2")
    kept.transcripts.add("bob", "1", "2")
    kept.transcripts.close()
    assert stat.S_IMODE((tmp_path / "alice.jsonl").stat().st_mode) == 0o600
    assert not (tmp_path / "elsewhere").exists()
    assert (kept.written, kept.failed) == (1, 1)


def test_rotation(tmp_path: Path) -> None:
    """No file grows beyond the limit, the newest lines are in the newest file, old ones go."""
    kept = Counts(tmp_path, max_bytes=1000, keep=2)
    for number in range(100):
        kept.transcripts.add("alice", str(number), "x" * 50)
    kept.transcripts.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["alice.jsonl", "alice.jsonl.1", "alice.jsonl.2"]
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())
    found = [int(line["prompt"]) for name in reversed(names) for line in lines(tmp_path / name)]
    assert found == list(range(found[0], 100))


def test_half_a_line_is_cut_off(tmp_path: Path) -> None:
    """What a crash left at the end of a file does not spoil the next line."""
    file = tmp_path / "alice.jsonl"
    for left in ('{"prompt": "a"', '{"prompt":"1","answer":"2"}\n{"pro' + "x" * 9000):
        file.write_text(left)
        kept = Counts(tmp_path, max_bytes=100_000)
        kept.transcripts.add("alice", "3", "4")
        kept.transcripts.close()
        assert lines(file)[-1] == {"prompt": "3", "answer": "4"}
        assert len(lines(file)) == left.count("\n") + 1


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from synthia_vllm.transcript import Transcripts
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
done = []
kept = Transcripts(Path(sys.argv[1]), max_bytes=10**6, keep=2, fsync="never",
                   on_written=lambda n: done.append("w"), on_failed=lambda n: done.append("f"))
def wait(count):
    while len(done) < count: pass
for number in range(20):
    kept.add("alice", str(number), "x" * 80)
wait(20)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
kept.add("alice", "last", "y")
kept.close()
print("".join(done))
"""


def test_a_full_disk_costs_lines_and_nothing_else(tmp_path: Path) -> None:
    """A write that is cut short leaves no half line; with room again, lines are kept again."""
    out = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    done = out.stdout.strip()
    found = lines(tmp_path / "alice.jsonl")
    assert done.startswith("w")
    assert done.endswith("fw")
    assert done.count("w") == len(found)
    assert found[-1]["prompt"] == "last"
    assert out.stderr.count("cannot be written") == 1
    assert out.stderr.count("written again") <= 1


def test_a_place_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    """A path that is no directory is named, with the setting to change."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match=r"transcripts\.directory"):
        Counts(tmp_path / "file")


def test_a_slow_disk_holds_nobody_up(tmp_path: Path) -> None:
    """Lines that come faster than they can be written are lost and counted, not waited for."""
    kept = Counts(tmp_path)
    os.mkfifo(tmp_path / "alice.jsonl")  # opened for reading and writing: the lock waits below
    blocked = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl,os,sys,time;f=os.open(sys.argv[1],os.O_RDWR);fcntl.flock(f,2);"
            "print(1,flush=True);time.sleep(60)",
            str(tmp_path / "alice.jsonl"),
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert blocked.stdout is not None
        blocked.stdout.readline()
        for _ in range(10_100):
            kept.transcripts.add("alice", "1", "2")
        assert 99 <= kept.failed <= 100
    finally:
        blocked.kill()
        blocked.wait()
        blocked.stdout.close()  # type: ignore[union-attr]


WRITER = """
import sys
from pathlib import Path
from synthia_vllm.transcript import Transcripts
kept = Transcripts(Path(sys.argv[1]), max_bytes=20_000, keep=50, fsync="never",
                   on_written=lambda n: None, on_failed=lambda n: print("lost"))
for number in range(1000):
    kept.add("alice", sys.argv[2], str(number))
kept.close()
"""


def test_two_processes_share_a_file(tmp_path: Path) -> None:
    """Two writers with rotation between them lose no line, tear none, and keep their order."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), name], stdout=subprocess.PIPE
        )
        for name in "ab"
    ]
    assert [writer.communicate(timeout=60)[0] for writer in writers] == [b"", b""]
    names = sorted(tmp_path.iterdir(), key=lambda path: -int(path.suffix[1:].replace("jsonl", "0")))
    found = [line for path in names for line in lines(path)]
    for name in "ab":
        assert [line["answer"] for line in found if line["prompt"] == name] == [
            str(number) for number in range(1000)
        ]
    assert len(names) > 2
