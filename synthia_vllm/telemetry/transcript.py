"""Transcripts, where the operator asks for them: the model card's file, one for each user.

A line is ``{"prompt": ..., "answer": ...}``. One thread writes; nobody waits for the disk, and a
disk that fails costs lines, which are counted, but never an answer.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import stat
import sys
import tempfile
import threading
from collections import deque
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Final, Literal

from synthia_vllm.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

logger = logging.getLogger(__name__)

# What may wait for a slow disk; more is lost.
_MAX_LINES: Final = 10_000
_MAX_BYTES: Final = 64 * 1024 * 1024
_BATCH: Final = 256  # lines taken at a time, so that one fsync serves many
_OPEN_FILES: Final = 64
_CLOSING_SECONDS: Final = 5.0
_USER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Transcripts:
    """Appends whole lines to ``<directory>/<user>.jsonl``, from any number of processes.

    A file that would grow beyond `max_bytes` becomes ``<user>.jsonl.1``, that one ``.2`` and so
    on up to `keep`. `on_written` and `on_failed` are given numbers of lines, in the writer's
    thread or the caller's. Raises `StartupError` if `directory` cannot be used.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_bytes: int,
        keep: int,
        fsync: Literal["never", "always"],
        on_written: Callable[[int], None],
        on_failed: Callable[[int], None],
    ) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._keep = keep
        self._fsync = fsync == "always"
        self._on_written = on_written
        self._on_failed = on_failed
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass  # permissions do not tell all: the file system may be read-only
        except OSError as error:
            raise StartupError(
                f"Transcripts cannot be kept in {directory}: {error.strerror}. Make it a directory "
                "this user may write to, or set `transcripts.directory` to another or to null."
            ) from error
        self._waiting: deque[tuple[int, str, str, str]] = deque()  # size, user, prompt, answer
        self._bytes = 0  # the sum of the sizes
        self._overflowing = False
        self._closed = False
        self._changed = threading.Condition()  # guards the four above
        self._files: dict[str, int] = {}  # open ones by user, the last used last
        self._failing: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="transcripts", daemon=True)
        self._thread.start()

    def add(self, user: str, prompt: str, answer: str) -> None:
        """Keep one exchange. Returns at once; what cannot be taken is counted as failed."""
        size = sys.getsizeof(prompt) + sys.getsizeof(answer)  # in memory: no need to encode here
        with self._changed:
            full = len(self._waiting) >= _MAX_LINES or self._bytes + size > _MAX_BYTES
            if not full and not self._closed:
                self._waiting.append((size, user, prompt, answer))
                self._bytes += size
                self._changed.notify()
                return
            news = full and not self._overflowing
            self._overflowing |= full
        self._on_failed(1)
        if news:
            logger.warning("Transcripts come faster than they can be written: lines are lost.")

    def close(self) -> None:
        """Write what waits, as far as the disk does it within some seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(_CLOSING_SECONDS)
        with self._changed:
            lost = len(self._waiting)
            self._waiting.clear()
        if lost:
            self._on_failed(lost)
            logger.warning("%d lines of transcripts were not written in time.", lost)

    def _run(self) -> None:
        while batch := self._take():
            for user, lines in batch.items():
                self._write(user, lines)
        for file in self._files.values():
            os.close(file)

    def _take(self) -> dict[str, list[bytes]]:
        """The next lines of each user; none when there will be no more."""
        batch: dict[str, list[bytes]] = {}
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            taken = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]
            self._bytes -= sum(size for size, *_ in taken)
            caught_up = self._overflowing and not self._waiting
            self._overflowing &= not caught_up
        if caught_up:
            logger.warning("Transcripts can be written as fast as they come again.")
        for _, user, prompt, answer in taken:
            line = json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) + "\n"
            # A lone surrogate, if there ever is one, becomes the JSON escape it has.
            batch.setdefault(user, []).append(line.encode(errors="backslashreplace"))
        return batch

    def _write(self, user: str, lines: list[bytes]) -> None:
        """Append `lines`, each as a whole or not at all, and tell how many are there."""
        while lines:
            count, written = len(lines), 0
            problem: OSError | None = None
            try:
                with self._locked(user, lines[0]) as (file, size):
                    fitting = (size + end <= self._max_bytes for end in accumulate(map(len, lines)))
                    count = max(1, sum(fitting))
                    for line in lines[:count]:
                        try:
                            _append(file, line)
                            written += 1
                        except OSError as error:
                            problem = error
                    if self._fsync:
                        os.fsync(file)
            except OSError as error:  # of a failed fsync nobody knows what it kept
                problem, written = error, 0
            del lines[:count]
            self._tell(user, written, count - written, problem)

    def _tell(self, user: str, written: int, failed: int, problem: OSError | None) -> None:
        if written:
            self._on_written(written)
        if failed:
            self._on_failed(failed)
        if problem is not None and user not in self._failing:
            self._failing.add(user)
            logger.warning("Transcripts of %s cannot be written: %s.", user, problem)
        elif problem is None and user in self._failing:
            self._failing.remove(user)
            logger.warning("Transcripts of %s are written again.", user)

    @contextmanager
    def _locked(self, user: str, line: bytes) -> Iterator[tuple[int, int]]:
        """The file of `user` and its size, with room for `line` and closed to other processes."""
        if not _USER.fullmatch(user):
            raise OSError(errno.EINVAL, "The user's name cannot be a file's")
        path = self._directory / f"{user}.jsonl"
        for _ in range(100):  # more than other processes could rotate it meanwhile
            file = self._opened(user, path)
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                if _is_at(file, path):
                    size = _whole(file)
                    if not size or size + len(line) <= self._max_bytes:
                        yield file, size
                        return
                    self._rotate(path)
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)
            os.close(self._files.pop(user))  # rotated, here or by another process
        raise OSError(errno.EBUSY, "The file is always another one", str(path))

    def _opened(self, user: str, path: Path) -> int:
        file = self._files.pop(user, None)
        if file is None:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            file = _open(path)
        self._files[user] = file
        return file

    def _rotate(self, path: Path) -> None:
        """Free `path`, whose file is locked: it goes last, so nobody else rotates meanwhile."""
        places = [path, *(path.with_name(f"{path.name}.{n}") for n in range(1, self._keep + 1))]
        # A gap, left by a rotation that was cut short, is filled and nothing dropped.
        last = next((n for n, place in enumerate(places) if not place.exists()), self._keep)
        for n in range(last, 0, -1):
            places[n - 1].replace(places[n])


def _open(path: Path) -> int:
    """Open the regular file at `path` to append to, for its owner alone whatever the umask."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    file = os.open(path, flags, 0o600)
    try:
        mode = os.fstat(file).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        if stat.S_IMODE(mode) != 0o600:
            os.fchmod(file, 0o600)
    except OSError:
        os.close(file)
        raise
    return file


def _append(file: int, line: bytes) -> None:
    """Append `line` as a whole, or raise and leave nothing of it."""
    size = _whole(file)
    done = 0
    try:
        while done < len(line):
            done += os.write(file, line[done:])
    except OSError:
        os.ftruncate(file, size)
        raise


def _is_at(file: int, path: Path) -> bool:
    """Whether the open `file` is the one that `path` names now."""
    try:
        return os.path.samestat(os.fstat(file), path.lstat())
    except FileNotFoundError:
        return False


def _whole(file: int) -> int:
    """The size of `file` up to its last whole line; a half one, left by a crash, is cut off."""
    size = end = os.fstat(file).st_size
    found = -1
    while end and found < 0:
        start = max(0, end - 4096)
        found = os.pread(file, end - start, start).rfind(b"\n")
        end = start + found + 1
    if end != size:
        os.ftruncate(file, end)
    return end
